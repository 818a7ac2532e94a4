"""Decoders of real shapes with random weights, caches filled at random, and attention on them, for end_to_end.py.

An attention here has run(layer, query, key, value), which `Llama` calls, and plan(left=0), which a step starts with: of
one token for each of `batch` sequences, after which `left` more make `context`. `cycle` is the number of steps that
stand for all, those of left = cycle - 1 to 0: 1, or with Quest from a choice of pages to the next.
"""

import itertools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from peers import GPU_BACKENDS, note
from timing import graph_us, wall_us
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import quest_ops
from quest_ops import QuestAttention, QuestConfig
from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.model import Llama
from quest_ops.llama.weights import Checkpoint, expected_shapes

ANY_CONTEXT = 2**20  # random weights were trained at no length
CHOOSING_TURNS, CHOOSING_REPLAYS = 3, 3  # in turns, so that a CPU's other load meets all forms

# As in the config.json of meta-llama/Llama-2-7b-hf, meta-llama/Llama-3.1-8B and Qwen/Qwen2.5-7B.
SHAPES = {
    "llama-2-7b": LlamaConfig(
        "llama", 32000, 4096, 11008, 32, 32, 32, 128, ANY_CONTEXT, rms_norm_eps=1e-5, rope_theta=1e4
    ),
    "llama-3.1-8b": LlamaConfig(
        "llama", 128256, 4096, 14336, 32, 32, 8, 128, ANY_CONTEXT, rms_norm_eps=1e-5, rope_theta=5e5,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2.5-7b": LlamaConfig(
        "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, ANY_CONTEXT, rms_norm_eps=1e-6, rope_theta=1e6,
        attention_bias=True,
    ),
}  # fmt: skip


def random_decoder(config: LlamaConfig, dtype: torch.dtype, device: str, weights: str | None = None) -> Llama:
    """Weights of the usual initialisation, N(0, 0.02), made on the device; norms are 1.

    weights: as `Llama.from_checkpoint` takes it."""
    torch.manual_seed(0)
    state_dict = {
        name: torch.ones(shape, dtype=dtype, device=device)
        if "norm" in name
        else torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
        for name, shape in expected_shapes(config).items()
    }
    return Llama.from_checkpoint(Checkpoint(config, state_dict, None), weights=weights)


def random_kv(model: Llama, layer: int, batch: int, tokens: int) -> Tensor:
    """Keys and values [2, B, tokens, Hkv, D] of a layer, the same at every call.

    Values are standard normal. Each channel of a KV head's keys has its own mean and spread, as those of real models
    have (Liu et al., KIVI, ICML 2024, section 3.2); so pages differ, and a query prefers some of them.
    """
    heads = model.config.num_key_value_heads, model.config.head_dim
    generator = torch.Generator(model.device).manual_seed(layer)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=model.dtype, device=model.device).normal_(generator=generator)

    mean, spread = normal(*heads), (normal(*heads) / 2).exp()
    kv = normal(2, batch, tokens, *heads)
    kv[0].mul_(spread).add_(mean)
    return kv


class NoAttention:
    """Leaves the time of everything else."""

    cycle = 1

    def plan(self, left: int = 0) -> None:
        pass

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query


class FilledPool:
    """A PagedKVCache with `batch` sequences of all tokens of `context` but the last."""

    def __init__(self, model: Llama, batch: int, context: int, quest: QuestConfig):
        config, device = model.config, model.device
        self.model, self.batch, self.context = model, batch, context
        num_blocks = batch * -(-context // quest.block_size)
        self.cache = cache = model.new_cache(quest, num_blocks, max_sequence_tokens=context)
        tokens = context - 1
        self.seqs = [cache.add() for _ in range(batch)]
        cache.extend_all(self.seqs, [tokens] * batch)
        slots = torch.cat([cache.slots(seq, 0, tokens) for seq in self.seqs]).to(device)
        blocks, places = slots // cache.block_size, slots % cache.block_size
        table = torch.tensor([cache.block_ids(seq) for seq in self.seqs], dtype=torch.int32, device=device)
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        for layer in range(config.num_hidden_layers):
            keys, values = random_kv(model, layer, batch, tokens).flatten(1, 2)
            k_cache, metadata = cache.k_cache(layer), cache.page_metadata(layer)
            k_cache[blocks, places] = keys
            cache.v_cache(layer)[blocks, places] = values
            quest_ops.update_page_metadata(
                k_cache, metadata, table, lengths, torch.zeros_like(lengths),
                bound=quest.bound, bound_scale=quest.bound_scale,
            )  # fmt: skip


class PagedAttention:
    """A QuestAttention on a FilledPool; several may take turns on one. backend: "quest", "dense" or "flashinfer"."""

    def __init__(self, pool: FilledPool, backend: str, quest: QuestConfig):
        self.pool = pool
        self.attention = QuestAttention(
            quest,
            pool.cache,
            pool.model.config.num_attention_heads,
            backend=backend,
            max_batch_size=pool.batch,
            max_sequence_tokens=pool.context,
        )
        self.run = self.attention.run
        self.cycle = quest.select_every if backend == "quest" else 1

    def plan(self, left: int = 0) -> None:
        cache, seqs = self.pool.cache, self.pool.seqs
        for seq in seqs:
            ahead = cache.length(seq) - (self.pool.context - 1 - left)
            if ahead < 0:  # another attention on this pool has stopped earlier
                cache.extend(seq, -ahead)
            elif ahead > 0:  # not where this step goes on from the one before: Quest chooses pages
                cache.rollback(seq, ahead)
        self.attention.plan(seqs, 1)


class ContiguousAttention:
    """torch's SDPA on keys and values [B, Hkv, context, D] a layer, as an inference loop around it keeps them.

    It takes the fastest of SDPA's backends and of two forms of a group (its heads as heads, or as queries of their KV
    head), as timed on these caches when it is made.
    """

    cycle = 1

    def __init__(self, model: Llama, batch: int, context: int):
        self.config, self.device = model.config, model.device
        heads = self.config.num_key_value_heads, self.config.head_dim
        self.caches = []
        for layer in range(self.config.num_hidden_layers):
            cache = torch.empty(2, batch, heads[0], context, heads[1], dtype=model.dtype, device=model.device)
            cache[:, :, :, :-1] = random_kv(model, layer, batch, context - 1).transpose(2, 3)
            self.caches.append(cache)
        query = torch.randn(batch, self.config.num_attention_heads, heads[1], device=model.device).to(model.dtype)
        self.backend, self.form = self._fastest(query)

    def plan(self, left: int = 0) -> None:
        pass

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.caches[layer]
        keys[:, :, -1], values[:, :, -1] = key, value
        with sdpa_kernel(self.backend) if self.backend else nullcontext():
            return self.form(query, keys, values)

    def _fastest(self, query: Tensor) -> tuple:
        grouped = self.config.num_attention_heads > self.config.num_key_value_heads
        forms = (group_as_queries, group_as_heads) if grouped else (group_as_heads,)
        backends = GPU_BACKENDS if self.device.type == "cuda" else [None]
        timed = []
        for backend, form in CHOOSING_TURNS * list(itertools.product(backends, forms)):
            calls = [lambda cache=cache, form=form: form(query, *cache) for cache in self.caches]
            with sdpa_kernel(backend) if backend else nullcontext():
                try:
                    calls[0]()
                except RuntimeError as error:  # a backend that does not take this shape, or not in this memory
                    note(f"SDPA, {backend}, {form.__name__}: {str(error).splitlines()[0]}")
                    continue
                us = graph_us(calls, CHOOSING_REPLAYS) if backend else wall_us(calls, CHOOSING_REPLAYS)
            timed.append((us, backend, form))
        if not timed:
            raise RuntimeError(f"none of SDPA's backends takes {tuple(self.caches[0].shape)}")
        return min(timed, key=lambda entry: entry[0])[1:]


def group_as_queries(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.unflatten(1, (keys.size(1), -1)), keys, values).flatten(1, 2)


def group_as_heads(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    grouped = query.size(1) > keys.size(1)
    return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=grouped)[:, :, 0]

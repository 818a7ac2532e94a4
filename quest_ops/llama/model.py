"""A dense Llama, Mistral, Qwen2 or Qwen3 decoder over packed tokens. Attention is the caller's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest_ops.cache import PagedKVCache
from quest_ops.config import QuestConfig

from .compile_options import compile_options
from .config import LlamaConfig
from .humming_linear import humming_takes
from .linear import Linear, has_x86_vectors
from .packed_int4 import PACKED
from .quantized import QUANTIZED, check_weights, low_bit_linear, round_linears, take_packed
from .rope import RotaryEmbedding, rotate
from .weights import Checkpoint, expected_shapes, find_checkpoint, load_checkpoint, packing_of

# The linear layers of a Block, and those of a checkpoint's layer that each of them joins.
PROJECTIONS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """One projection for query, key and value; the three reach the cache and the kernels as slices of it."""

    def __init__(self, config: LlamaConfig, output_bias: bool):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o = Linear(self.heads * self.head_dim, config.hidden_size, bias=output_bias)
        # One row a query or key head, though heads of a kind share theirs: so one product norms them all.
        self.qk_norm = nn.Parameter(torch.empty(self.heads + self.kv_heads, self.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk, value = self.qkv(x).view(len(x), -1, self.head_dim).split([self.heads + self.kv_heads, self.kv_heads], 1)
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (self.head_dim,), None, self.eps) * self.qk_norm
        query, key = rotate(qk, cos, sin).split([self.heads, self.kv_heads], 1)
        return query, key, value


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """A layer, in the two parts between which the caller's attention runs.

    The MLP's output is added to the residual stream `x` at the start of the next block: there it shares a kernel with
    the norm, where these parts are compiled.
    """

    def __init__(self, config: LlamaConfig, output_bias: bool):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, output_bias)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before_attention(self, x: Tensor, delta: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x, query, key and value."""
        x = x + delta
        return x, *self.attention(self.attention_norm(x), cos, sin)

    def after_attention(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """x, and what the next block adds to it."""
        x = x + self.attention.o(out.flatten(1))
        return x, self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The decoder. Weights are uninitialised until `from_checkpoint` or `load` fills them; inference only.

    output_bias: the attention's output projection has a bias, which a config does not tell.
    """

    def __init__(self, config: LlamaConfig, *, output_bias: bool = False):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, output_bias) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, attention, last: Tensor | None = None, *, compiled: bool = False
    ) -> Tensor:
        """Logits of packed tokens of any number of sequences.

        tokens, positions: [N] int64, each token and its place in its own sequence. attention: a QuestAttention planned
        for these tokens, or any object whose run(layer, query [N, Hq, D], key [N, Hkv, D], value [N, Hkv, D]) returns
        [N, Hq, D]. last: [X] int64, the rows whose logits are wanted; None: all.
        compiled: torch.compile makes the parts around the attention, which takes seconds at a first N, on a GPU with
        16-bit weights up to half a minute, and once more for all other N. Equal up to rounding. Past 8 kinds of model
        and N in a process torch warns and runs them as they are (torch._dynamo.config.recompile_limit).
        Returns float32 [X or N, vocab_size].
        """
        rotations, before_attention, after_attention, head = (
            compiled_parts(type(self.blocks[0].mlp.down)) if compiled else PARTS
        )
        x = self.embedding(tokens)
        delta = torch.zeros_like(x)
        cos, sin = rotations(self.rope, positions)
        for layer, block in enumerate(self.blocks):
            x, query, key, value = before_attention(block, x, delta, cos, sin)
            x, delta = after_attention(block, x, attention.run(layer, query, key, value))
        if last is not None:
            x, delta = x[last], delta[last]
        return head(self, x, delta)

    def head(self, x: Tensor, delta: Tensor) -> Tensor:
        """The logits, in float32, after the last block."""
        return self.lm_head(self.norm(x + delta)).float()

    def new_cache(self, quest: QuestConfig, num_blocks: int, *, max_sequence_tokens: int | None = None) -> PagedKVCache:
        """An empty cache for this model, on its device and in its dtype, with the pages and metadata of a config in
        blocks of `quest.block_size` tokens. The others: as of PagedKVCache."""
        return PagedKVCache(
            self.config.num_hidden_layers,
            self.config.num_key_value_heads,
            self.config.head_dim,
            num_blocks,
            page_size=quest.page_size,
            pages_per_block=quest.block_size // quest.page_size,
            dtype=self.dtype,
            device=self.device,
            metadata_dtype=quest.metadata_dtype,
            max_sequence_tokens=max_sequence_tokens,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def weights(self) -> str:
        """What the layers' projections are in: "int8", "int4", or the name of the model's dtype."""
        return getattr(self.blocks[0].mlp.down, "kind", str(self.dtype).removeprefix("torch."))

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, weights: str | None = None, device: str | torch.device | None = None
    ) -> Llama:
        """The model of a checkpoint (see `load_checkpoint`), with its weights' dtype.

        weights: None: as they are. "int8", "int4": those of the layers' projections are rounded (see `quantized`), one
            layer after the other; norms and embedding stay in bfloat16, and lm_head does but where humming serves it:
            there it is in 8 bits, which halves its time and costs no accuracy that was seen. A checkpoint with a
            packing is in "int4" already: those 4 bits are taken over, and only None and "int4" are supported. device:
            where the model goes, also layer by layer; None: where the weights are.

        Empties `checkpoint.state_dict` as it goes: fusing copies, and a large model must not be in memory twice.
        Raises ValueError, before that, naming tensors that are missing, unknown or of another shape than the config's,
        and for weights that are neither of these.
        """
        config, state_dict, packing = checkpoint.config, checkpoint.state_dict, checkpoint.packing
        output_bias = "model.layers.0.self_attn.o_proj.bias" in state_dict
        expected = expected_shapes(config, output_bias, packing)
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if wrong := dict(sorted(found.items() ^ expected.items())):
            listed = ", ".join(f"{name}: {found.get(name)}, expected {expected.get(name)}" for name in list(wrong)[:4])
            raise ValueError(f"the state dict does not fit the config in {len(wrong)} tensors: {listed}")
        check_weights(weights, state_dict["model.embed_tokens.weight"].dtype, packing)
        with torch.device("meta"):
            model = cls(config, output_bias=output_bias)
        for module, tensors in _fuse(model, state_dict):
            tensors = {name: t.to(device=device) for name, t in tensors.items()}
            if packing:
                take_packed(module, tensors, packing)
            module.load_state_dict(tensors, assign=True)
            if weights in QUANTIZED and not packing:
                round_linears(module, weights)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embedding.weight
        lm_head = model.lm_head.weight
        if (packing or weights in QUANTIZED) and humming_takes(*lm_head.shape, lm_head.device):
            model.lm_head = low_bit_linear("int8", lm_head)
        model.rope = RotaryEmbedding(config).to(model.device)
        return model.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        device: str | torch.device = "cpu",
        progress: Callable | None = None,
    ):
        """(model, tokenizer) of "smollm2", a Hugging Face folder or hub id, or a .gguf file; see `load_checkpoint`.

        dtype None: `default_dtype(device)`. weights: "bf16", "int8" or "int4" (see `from_checkpoint`), each in a model
        of dtype bfloat16; then the checkpoint is read on the host, and the device never holds more than the model and a
        layer. None: as dtype, or the 4 bits of a GPTQ or AWQ checkpoint, likewise. "int4": those of a GGUF in Q4_0 or
        Q4_1, too. Raises ValueError for other weights, or with another dtype.
        """
        check_weights(weights, dtype or torch.bfloat16)
        path = find_checkpoint(source, progress)
        packing = packing_of(path)
        if weights is None and packing is None:
            checkpoint = load_checkpoint(path, dtype=dtype or default_dtype(device), device=device, progress=progress)
            return cls.from_checkpoint(checkpoint), checkpoint.tokenizer
        check_weights(weights, dtype or torch.bfloat16, packing)
        keep_int4 = weights == "int4"
        checkpoint = load_checkpoint(path, dtype=torch.bfloat16, device="cpu", progress=progress, keep_int4=keep_int4)
        return cls.from_checkpoint(checkpoint, weights=weights, device=device), checkpoint.tokenizer


PARTS = RotaryEmbedding.forward, Block.before_attention, Block.after_attention, Llama.head


@functools.cache
def compiled_parts(linear: type) -> tuple[Callable, ...]:
    """All layers share the code of these parts, so that compiling takes as long for 2 layers as for 80."""
    options = compile_options(linear)
    return tuple(torch.compile(part, options=options) for part in PARTS)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 on a GPU and on a CPU with AVX2 or AVX-512, else float32."""
    # Milliseconds in the linear layers of SmolLM2-135M for 512 tokens and for one (torch 2.13, 2 cores of an AMD EPYC
    # with avx512_bf16): bfloat16 111 and 10, float32 507 and 28, float16 1978 and 6. With AVX2: see `linear`.
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if has_x86_vectors() else torch.float32


def _fuse(model: Llama, weights: dict[str, Tensor]) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Modules of the model and their state dicts, from one with Hugging Face names, which is emptied on the way."""
    config = model.config
    yield model.embedding, {"weight": weights.pop("model.embed_tokens.weight")}
    yield model.norm, {"weight": weights.pop("model.norm.weight")}
    if not config.tie_word_embeddings:
        yield model.lm_head, {"weight": weights.pop("lm_head.weight")}
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for layer, block in enumerate(model.blocks):
        theirs = f"model.layers.{layer}."
        fused = {
            "attention_norm.weight": weights.pop(theirs + "input_layernorm.weight"),
            "mlp_norm.weight": weights.pop(theirs + "post_attention_layernorm.weight"),
        }
        for ours, names in PROJECTIONS.items():
            for kind in ("weight", "bias", *PACKED):
                parts = [weights.pop(f"{theirs}{name}.{kind}", None) for name in names]
                if parts[0] is not None:
                    dim = 1 if kind in PACKED else 0  # the outputs
                    fused[f"{ours}.{kind}"] = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        if config.qk_norm:
            norms = [weights.pop(f"{theirs}self_attn.{n}_norm.weight") for n in "qk"]
            fused["attention.qk_norm"] = torch.cat([w.expand(count, -1) for w, count in zip(norms, heads)])
        yield block, fused

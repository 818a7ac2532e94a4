"""Teacher-forced decoding: documents that are prefilled once, and what comes after them through decode steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from attend import OracleAttention
from policies import BLOCK_SIZE, Policy
from top_p import BoundedMasses, TopPAttention, Tuner
from torch import Tensor

import quest_ops
from quest_ops import PagedKVCache, QuestAttention, QuestConfig
from quest_ops.attention import MAX_ROWS_PER_REQUEST
from quest_ops.llama.model import Llama

PREFILL_CHUNK = {"cpu": 512, "cuda": 8192}
MOST_SEQUENCES = 32  # of a step: 256 rows
TUNING_TOKENS = 129  # of a continuation, each in a step of its own

# The layout of the documents' first cache, whose keys and values all others copy.
DENSE = QuestConfig(page_size=BLOCK_SIZE, bound="minmax", metadata_dtype=None)


@dataclass(frozen=True)
class Continuation:
    """tokens: what follows a document, all of it through decode steps; each token but the first is predicted."""

    document: int
    tokens: list[int]


@dataclass(frozen=True)
class Prediction:
    """Of each token of a continuation but the first: its loss in nats, whether it was the likeliest one, and how many
    tokens, in whole pages, a KV head may attend to in the step that predicts it, on average over heads and layers that
    choose."""

    loss: Tensor
    hit: Tensor
    attended: Tensor


class Documents:
    """Sequences of a model's cache, prefilled with dense attention, which all policies and budgets share.

    prefixes: the documents' tokens, longer than any budget. tail: the most tokens of a continuation.
    progress(done, total) counts prefilled tokens.
    """

    def __init__(self, model: Llama, prefixes: list[list[int]], tail: int, progress: Callable[[int, int], None]):
        self.model, self.prefixes = model, prefixes
        self.steps = -(-(tail - 1) // MAX_ROWS_PER_REQUEST)
        self.longest = max(map(len, prefixes)) + self.steps * MAX_ROWS_PER_REQUEST
        self.dense = self._new_cache(DENSE)
        self.caches = {(BLOCK_SIZE, None): self.dense}  # by page size and metadata dtype; the first, and one other
        attention = QuestAttention(
            DENSE, self.dense, model.config.num_attention_heads, max_batch_size=1,
            max_sequence_tokens=self.longest,
        )  # fmt: skip
        chunk, done, total = PREFILL_CHUNK[model.device.type], 0, sum(map(len, prefixes))
        for seq, prefix in enumerate(prefixes):
            for start in range(0, len(prefix), chunk):
                tokens = torch.tensor(prefix[start : start + chunk], device=model.device)
                attention.plan([seq], len(tokens), prefill=True)
                model(tokens, attention.positions, attention, tokens.new_zeros(1))
                done += len(tokens)
                progress(done, total)

    def predict(self, policy: Policy | None, budget: int, continuations: list[Continuation]) -> list[Prediction]:
        """Decodes the continuations with a policy, or with dense attention (None).

        8 tokens of a sequence at once: a row sees its own token and those before, and selects for itself, so that is
        the same as one token a step. Policies that keep pages over steps take one token a step, and so does top-p: the
        masses that it adds up are also those of the page being written, whose metadata is that of all 8.
        """
        attention = runs = self.attention_of(policy, budget)
        if policy and policy.oracle:
            runs = OracleAttention(attention)
        elif policy and policy.top_p:
            runs = TopPAttention(attention, policy.p)
        predictions = []
        for first in range(0, len(continuations), MOST_SEQUENCES):
            predictions += self.decode(attention, runs, continuations[first : first + MOST_SEQUENCES])
        return predictions

    def tuned(self, policy: Policy, budget: int, continuations: list[Continuation]) -> Policy:
        """A policy of top_p with the p that attends to `budget` tokens on average; any other as it is.

        First for the queries of a fixed budget, then for those of the p that they give: of the continuations' first
        tokens.
        """
        if not policy.top_p:
            return policy
        attention, p = self.attention_of(policy, budget), None
        continuations = [replace(c, tokens=c.tokens[:TUNING_TOKENS]) for c in continuations]
        for _ in range(2):
            tuner = Tuner(attention, p)
            for first in range(0, len(continuations), MOST_SEQUENCES):
                self.decode(attention, tuner, continuations[first : first + MOST_SEQUENCES])
            p = tuner.p
        return replace(policy, p=p)

    def attention_of(self, policy: Policy | None, budget: int) -> QuestAttention:
        """The attention of a policy (None: dense) on a cache that holds the documents with the policy's metadata."""
        config = policy.config(budget) if policy else DENSE
        cache = self._cache_of(config) if policy else self.dense
        if policy:
            self._rebuild_metadata(cache, config, blank=policy.recent_only)
        return QuestAttention(
            config, cache, self.model.config.num_attention_heads, backend="quest" if policy else "dense",
            max_batch_size=MOST_SEQUENCES, max_sequence_tokens=self.longest,
        )  # fmt: skip

    def decode(self, attention: QuestAttention, runs, continuations: list[Continuation]) -> list[Prediction]:
        """At most MOST_SEQUENCES continuations: `attention` plans the steps, `runs` attends in them."""
        one = attention.kept or isinstance(runs, BoundedMasses)
        rows, device = 1 if one else MAX_ROWS_PER_REQUEST, self.model.device
        width = -(-(max(len(c.tokens) for c in continuations) - 1) // rows) * rows
        padded = [c.tokens + c.tokens[-1:] * (width + 1 - len(c.tokens)) for c in continuations]
        tokens = torch.tensor(padded, device=device)  # [N, width + 1]
        loss = torch.empty(len(padded), width, device=device)
        hit = torch.empty(len(padded), width, dtype=torch.bool, device=device)
        attended = torch.empty(len(padded), width, device=device)
        forks = [attention.cache.fork(c.document) for c in continuations]
        for start in range(0, width, rows):
            given, asked = tokens[:, start : start + rows].flatten(), tokens[:, start + 1 : start + rows + 1].flatten()
            attention.plan(forks, rows)
            if attention.step_kind not in (attention.backend, "reuse"):
                raise RuntimeError(f"a step of {attention.backend} was {attention.step_kind}: its budget covers it all")
            logits = self.model(given, attention.positions, runs)
            loss[:, start : start + rows] = F.cross_entropy(logits, asked, reduction="none").view(-1, rows)
            hit[:, start : start + rows] = (logits.argmax(-1) == asked).view(-1, rows)
            pages = runs.pages if isinstance(runs, TopPAttention) else attention.page_budgets
            attended[:, start : start + rows] = (pages * attention.config.page_size).view(-1, rows)
        for fork in forks:
            attention.cache.free(fork)
        return [
            Prediction(*(of_all[i, : len(c.tokens) - 1].cpu() for of_all in (loss, hit, attended)))
            for i, c in enumerate(continuations)
        ]

    def _new_cache(self, config: QuestConfig) -> PagedKVCache:
        """An empty cache with the sequences 0, 1, ... of the documents."""
        tail = self.steps * MAX_ROWS_PER_REQUEST
        blocks_of_tail = -(-tail // config.block_size) + 1  # and the copied last one
        blocks_of_text = sum(-(-len(prefix) // config.block_size) for prefix in self.prefixes)
        cache = self.model.new_cache(config, blocks_of_text + MOST_SEQUENCES * blocks_of_tail)
        assert [cache.add() for _ in self.prefixes] == list(range(len(self.prefixes)))
        return cache

    def _cache_of(self, config: QuestConfig) -> PagedKVCache:
        """A cache with the documents' keys and values in the layout of a config."""
        layout = config.page_size, config.metadata_dtype
        if layout not in self.caches:
            self.caches = {(BLOCK_SIZE, None): self.dense}
            cache = self.caches[layout] = self._new_cache(config)
            for seq, prefix in enumerate(self.prefixes):
                cache.extend(seq, len(prefix))
                to, source = cache.block_ids(seq), self.dense.block_ids(seq)
                parts = config.block_size // BLOCK_SIZE  # of a block; those past the last token hold anything
                source += source[-1:] * (len(to) * parts - len(source))
                to, source = (torch.tensor(blocks, device=cache.device) for blocks in (to, source))
                kv = self.dense.pool[:, source].unflatten(1, (-1, parts))  # [layers, blocks, parts, 2, Hkv, S, D]
                cache.pool[:, to] = kv.movedim(2, 4).flatten(4, 5)
        return self.caches[layout]

    def _rebuild_metadata(self, cache: PagedKVCache, config: QuestConfig, blank: bool) -> None:
        blocks = [cache.block_ids(seq) for seq in range(len(self.prefixes))]
        table = torch.zeros(len(blocks), max(map(len, blocks)), dtype=torch.int32)
        for row, ids in zip(table, blocks):
            row[: len(ids)] = torch.tensor(ids)
        table = table.to(cache.device)
        lengths = torch.tensor([len(prefix) for prefix in self.prefixes], dtype=torch.int32, device=cache.device)
        for layer in range(cache.num_layers):
            metadata = cache.page_metadata(layer)
            if blank:
                metadata.zero_()
            else:
                quest_ops.update_page_metadata(
                    cache.k_cache(layer), metadata, table, lengths, torch.zeros_like(lengths),
                    bound=config.bound, bound_scale=config.bound_scale,
                )  # fmt: skip

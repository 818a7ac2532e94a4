"""What a choice of pages costs a decode step: the true attention mass that it misses, and the error of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_ops import ops
from quest_ops.attention import QuestAttention


class Step:
    """The decode step that `attention` has planned, op by op: for whoever asks more than `QuestAttention.run` tells.

    query [R, Hq, D], key and value [R, Hkv, D]: as `run` takes them. `append` writes the keys and values of a layer;
    after that the others say what its queries choose and attend to.
    """

    def __init__(self, attention: QuestAttention):
        self.attention, self.config, self.cache = attention, attention.config, attention.cache

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.attention.append(layer, key, value)

    def choose(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Page ids [R, Hs, K], padded with -1, and counts [R, Hs], int32, of what Quest chooses; of rows that keep
        their pages, those."""
        if self.attention.uses_kept:
            page_ids, page_counts = self.attention.kept_pages(layer, query)
            return page_ids.clone(), page_counts.clone()
        return self.attention.choose_pages(layer, query, self.attention.seq_lens)

    def quest(
        self, layer: int, query: Tensor, page_budget: int | None = None, page_budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """To the pages that Quest chooses: out and lse as of `exact`. page_budget: of each row, with page_budgets as
        the op takes them; None: both as planned."""
        config = self.config
        if page_budget is None:
            page_budget, page_budgets = self.attention.budgets_of(layer)
        return ops.quest_decode_attention(
            query,
            *self._pool(layer),
            self.cache.page_metadata(layer),
            self.attention.request_table,
            self.attention.seq_lens,
            page_budget,
            config.sink_pages,
            config.recent_pages,
            config.head_reduction,
            bound=config.bound,
            sm_scale=self.attention.sm_scale,
            page_budgets=page_budgets,
        )

    def exact(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """To all tokens: out [R, Hq, D] and lse [R, Hq] float32, natural log of the sum of exp(sm_scale * q . k)."""
        return self.listed(layer, query, None)

    def listed(
        self, layer: int, query: Tensor, page_ids: Tensor | None, page_counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """To the tokens of some pages, as `sparse_decode_attention` takes them: out and lse as of `exact`."""
        return ops.sparse_decode_attention(
            query,
            *self._pool(layer),
            self.attention.request_table,
            self.attention.seq_lens,
            page_ids,
            page_counts,
            page_size=self.config.page_size,
            sm_scale=self.attention.sm_scale,
        )

    def _pool(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.k_cache(layer), self.cache.v_cache(layer)


def compare(out: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor) -> Tensor:
    """[3, R, Hq] float64: |out - exact|^2, |exact|^2, and the share of the true attention mass that `out` attends to.

    out and exact [R, Hq, D], lse and exact_lse [R, Hq]: attention to some of the tokens, and to all. A token's mass is
    its weight in the exact softmax; that of some tokens is exp(lse - exact_lse).
    """
    truth = exact.double()
    return torch.stack(
        [(out.double() - truth).square().sum(-1), truth.square().sum(-1), (lse - exact_lse).exp().double()]
    )


def relative_error(error: Tensor, norm: Tensor, over: int | tuple[int, ...]) -> Tensor:
    """The root of the sum of |out - exact|^2 over that of |exact|^2, both over the dimensions `over`."""
    return (error.sum(over) / norm.sum(over)).sqrt()


def rounded(numbers: Tensor) -> float | list:
    """To 4 decimals."""
    return numbers.double().mul(1e4).round().div(1e4).tolist()

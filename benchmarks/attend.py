"""Ways to attend in a decode step, on the package's ops: to all tokens, as Quest chooses, as the true masses choose."""

import torch
from torch import Tensor

import quest_ops
from quest_ops import QuestAttention, fidelity
from quest_ops.attention import MAX_ROWS_PER_REQUEST


class Step(fidelity.Step):
    """The step that `attention` has planned, with `rows` rows a request, and two more ways to attend in it.

    They give out [R, Hq, D] and lse [R, Hq] of a layer's queries.
    """

    def __init__(self, attention: QuestAttention, rows: int = MAX_ROWS_PER_REQUEST):
        super().__init__(attention)
        self.rows = rows

    def policy(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """As `attention.run` would attend."""
        return self.exact(layer, query) if layer in self.config.dense_layers else self.quest(layer, query)

    def oracle(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Of the choices of pages that a KV head may make (sink, recent and budget as configured), the one that keeps
        most of the true mass of its query heads."""
        config = self.config
        chosen = quest_ops.select_topk_pages(
            self._page_masses(layer, query), self.attention.seq_lens, config.page_size, config.page_budget,
            config.sink_pages, config.recent_pages,
        )  # fmt: skip
        return self.listed(layer, query, *chosen)

    def _page_masses(self, layer: int, query: Tensor) -> Tensor:
        keys = self.cache.k_cache(layer)[self.attention.request_table].flatten(1, 2)  # [B, L, Hkv, D]
        return page_masses(query, keys, self.attention.seq_lens, self.config.page_size, self.attention.sm_scale)


def page_masses(query: Tensor, keys: Tensor, seq_lens: Tensor, page_size: int, sm_scale: float) -> Tensor:
    """[R, Hkv, P] float32: each page's share of the exact attention, summed over the query heads of a KV head.

    query [R, Hq, D]. keys [B, L, Hkv, D], L whole pages, each for R / B adjacent rows. seq_lens [R]: tokens of a row.
    """
    query = query.unflatten(1, (keys.size(2), -1)).unflatten(0, (len(keys), -1))  # [B, T, Hkv, G, D]
    logits = torch.einsum("bthgd,blhd->bthgl", query.float() * sm_scale, keys.float()).flatten(0, 1)
    seen = torch.arange(logits.size(-1), device=logits.device) < seq_lens[:, None]  # [R, L]
    shares = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return shares.sum(2).unflatten(-1, (-1, page_size)).sum(-1).contiguous()


class OracleAttention(Step):
    """For a decoder: the choice of whoever has read all keys."""

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.append(layer, key, value)
        return self.oracle(layer, query)[0]

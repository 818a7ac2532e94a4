"""KeptPages: what the rows of decode steps chose, kept until they choose again (`QuestConfig.select_every`)."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_ops.cache import PagedKVCache
from quest_ops.config import QuestConfig


class KeptPages:
    """The pages that each slot attends to in each layer, at addresses that stay, and when a slot chooses them anew.

    num_query_heads: of the model. page_budget: most pages K of a row. dense_length: rows up to it attend in full.

    A slot keeps its pages only in the step right after one in which it had them, of the same sequence, not rolled back
    since and now one token longer; even then not where the new token is number 0, n, 2 n, ... of its page, with n =
    `config.select_every`, and not in the step in which it outgrows `dense_length`. So a kept list names every page of
    the row that its choice could see, the one being written included: none has begun since. In particular it names all
    pages of a row that attends in full.
    """

    def __init__(
        self,
        config: QuestConfig,
        cache: PagedKVCache,
        num_query_heads: int,
        *,
        page_budget: int,
        dense_length: int,
        max_batch_size: int,
    ) -> None:
        self.config, self.cache = config, cache
        self.dense_length = dense_length
        heads = num_query_heads if config.head_reduction == "none" else cache.num_kv_heads
        lists = cache.num_layers, max_batch_size, heads
        self._page_ids = torch.full((*lists, page_budget), -1, dtype=torch.int32, device=cache.device)
        self._page_counts = torch.zeros(lists, dtype=torch.int32, device=cache.device)
        self._views: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by number of slots; then by layer
        # Of each slot's lists: sequence, how often it was rolled back, its length; None: the lists are empty.
        self._shown: list[tuple[int, int, int] | None] = [None] * max_batch_size

    def plan(self, seqs: list[int | None]) -> list[bool]:
        """Of a step of one row a slot, whose tokens the cache has reserved: whether the slot keeps its pages.

        The lists of an empty slot are to be empty: it "chooses" none, once. The step must then be run in all layers.
        """
        keeps = []
        for b, seq in enumerate(seqs):
            if seq is None:
                keeps.append(self._shown[b] is None)
                self._shown[b] = None
                continue
            sequence = self.cache.sequence(seq)
            length = sequence.length
            goes_on = self._shown[b] == (seq, sequence.rollbacks, length - 1)
            due = (length - 1) % self.config.page_size % self.config.select_every == 0
            keeps.append(goes_on and not due and length != self.dense_length + 1)
            self._shown[b] = seq, sequence.rollbacks, length
        return keeps

    def replace(self, layer: int, chosen: tuple[Tensor, Tensor], keeps: Tensor) -> None:
        """Writes what the slots have chosen that do not keep their pages.

        chosen: page_ids and page_counts as of `lists`. keeps [B] bool: as planned.
        """
        page_ids, page_counts = self.lists(layer, len(keeps))
        torch.where(keeps[:, None, None], page_ids, chosen[0], out=page_ids)
        torch.where(keeps[:, None], page_counts, chosen[1], out=page_counts)

    def lists(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """page_ids [slots, Hs, K] and page_counts [slots, Hs] int32, as `sparse_decode_attention` takes them."""
        if slots not in self._views:  # made once: a layer of a decode step has no time for them
            self._views[slots] = list(zip(self._page_ids[:, :slots], self._page_counts[:, :slots], strict=True))
        return self._views[slots][layer]

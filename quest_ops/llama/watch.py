"""What a generation looks like from inside: seconds in attention, pages that Quest chooses, KV bytes that it reads."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor

from quest_ops.attention import QuestAttention
from quest_ops.config import QuestConfig
from quest_ops.fidelity import Step


class Watch:
    """Stands between the model and the attention: times each run and notes the pages that Quest chooses.

    records: what to note in the next decode step: (slot, the step's number, where to put {(number, layer): page ids}),
        of slots for which Quest chooses.
    """

    def __init__(self, attention: QuestAttention):
        self.attention, self.cache, self.quest = attention, attention.cache, attention.config
        self.on_gpu = attention.cache.device.type == "cuda"
        self.records: list[tuple[int, int, dict[tuple[int, int], Tensor]]] = []
        self._seconds, self._events = 0.0, []

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        start = self._now()
        out = self.attention.run(layer, query, key, value)
        stop = self._now()
        if self.on_gpu:
            self._events.append((start, stop))
        else:
            self._seconds += stop - start
        chooses = self.attention.step_kind in ("quest", "reuse") and layer not in self.quest.dense_layers
        if chooses and self.records:
            # The fused op does not tell its choice: its first two steps again, with this step's key in the metadata.
            page_ids, counts = (x.cpu() for x in Step(self.attention).choose(layer, query))  # [R, Hs, K] and [R, Hs]
            for slot, step, pages in self.records:
                pages[step, layer] = page_ids[slot, :, : counts[slot].max()].clone()
        return out

    def seconds(self) -> float:
        """Seconds in attention so far."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
            self._events = []
        return self._seconds

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def kv_tokens_read(length: int, quest: QuestConfig, *, group: int = 1, metadata_scale: float = 1.0) -> float:
    """What a Quest layer reads in a decode step at `length` tokens, in places of a token's K and V: the mean over its
    KV heads, and over the layers that are not dense where `quest.head_budgets` differ.

    With n = ceil(length / page_size) pages: all n * page_size places where n fits the head's page budget; else

        n * metadata_scale + heads * page_budget * page_size

    A page's metadata, two vectors, weighs as much as one token's K and V times metadata_scale: its bytes a number
    over the cache's. heads is 1, or with head_reduction "none" the group: each of its query heads reads its own pages.
    """
    pages = -(-length // quest.page_size)
    heads = group if quest.head_reduction == "none" else 1

    def read(page_budget: int) -> float:
        if pages <= page_budget:
            return pages * quest.page_size
        return pages * metadata_scale + heads * page_budget * quest.page_size

    of_row = quest.row_page_budget(length)
    if quest.head_budgets is None:
        return read(of_row)
    by_layer = enumerate(quest.head_page_budgets)
    counts = Counter(budget for layer, heads in by_layer if layer not in quest.dense_layers for budget in heads)
    total = sum(count * read(budget * of_row // quest.page_budget) for budget, count in counts.items())
    return total / max(counts.total(), 1)

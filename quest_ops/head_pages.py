"""Page budgets by layer and head on the device, where a captured decode step finds them."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_ops.config import QuestConfig


class HeadPages:
    """config.head_budgets in pages, for the rows of a decode step.

    group: entries of a KV head: its query heads where each selects for itself, else 1. max_rows: of a step.
    """

    def __init__(self, config: QuestConfig, group: int, max_rows: int, device: torch.device):
        budgets = torch.tensor(config.head_page_budgets).repeat_interleave(group, 1)  # int64: products of pages
        self._mean, self._most = config.page_budget, int(budgets.max())
        self._budgets = budgets[:, None].to(device)  # [layers, 1, heads]
        self._buffer = torch.zeros(len(budgets), max_rows, budgets.size(1), dtype=torch.int32, device=device)

    def most(self, row_pages: int) -> int:
        """Pages of the largest head, of a row of so many pages on average."""
        return self._most * row_pages // self._mean

    def update(self, row_pages: Tensor, full: Tensor) -> Tensor:
        """Budgets [layers, N, heads] int32 in pages, those of a layer contiguous and always at the same address.

        row_pages: [N] int32, of a head on average, which all grow in proportion to; or, where full [N] bool says so,
        of each head.
        """
        shares = self._budgets * row_pages[:, None] // self._mean
        budgets = self._buffer[:, : len(row_pages)]
        return budgets.copy_(torch.where(full[:, None], row_pages[:, None], shares))

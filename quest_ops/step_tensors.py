"""What describes a step to the device: filled on the host, sent in one copy, at addresses that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_ops.cache import PagedKVCache


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for the device; on a CPU the tensor itself."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


class BlockTable:
    """tensor: [max_batch_size, max_blocks] int32 on the cache's device, the blocks of the sequence in each slot."""

    def __init__(self, cache: PagedKVCache, max_batch_size: int, max_blocks: int):
        self.cache = cache
        self.tensor = torch.zeros(max_batch_size, max_blocks, dtype=torch.int32, device=cache.device)
        self._on_cpu = cache.device.type == "cpu"
        self._host = self.tensor if self._on_cpu else torch.zeros_like(self.tensor, device="cpu")
        self._shown: list[tuple[int, int] | None] = [None] * max_batch_size  # (sequence, epoch) of each row

    def update(self, seqs: list[int | None]) -> None:
        """Sends the entries that have changed, in one copy for all rows. An empty slot's row stays as it is."""
        places, blocks = [], []
        for b, seq in enumerate(seqs):
            if seq is None:
                continue
            sequence = self.cache.sequence(seq)
            shown = (seq, sequence.epoch)
            if self._shown[b] == shown:
                continue
            row = self._host[b, : len(sequence.blocks)]
            now = torch.frombuffer(sequence.blocks, dtype=torch.int32)
            changed = (row != now).nonzero().flatten()
            self._shown[b] = shown
            if changed.numel():
                row[changed] = now[changed]
                places.append(changed + b * self._host.size(1))
                blocks.append(now[changed].long())
        if places and not self._on_cpu:
            places, blocks = to_device(torch.stack([torch.cat(places), torch.cat(blocks)]), self.cache.device)
            self.tensor.view(-1).scatter_(0, places, blocks.int())

    def blocks(self, slot: int) -> Tensor | slice:
        """Those of the sequence in a slot: a slice where they follow one another in the pool, else as on the device."""
        seq, _ = self._shown[slot]
        blocks = torch.frombuffer(self.cache.sequence(seq).blocks, dtype=torch.int32)
        first, count = int(blocks[0]), blocks.numel()
        if torch.equal(blocks, torch.arange(first, first + count, dtype=torch.int32)):
            return slice(first, first + count)
        return self.tensor[slot, :count]


def decode_rows(
    cache: PagedKVCache, seqs: list[int | None], rows_per_request: int
) -> tuple[list[int], list[int], list[int]]:
    """Slot in the pool, position and length of the last tokens of each sequence; of an empty slot -1, 0 and 0."""
    slots, positions, lengths = [], [], []
    for seq in seqs:
        if seq is None:
            slots += [-1] * rows_per_request
            positions += [0] * rows_per_request
            lengths += [0] * rows_per_request
            continue
        sequence = cache.sequence(seq)
        for position in range(sequence.length - rows_per_request, sequence.length):
            slots.append(sequence.blocks[position // cache.block_size] * cache.block_size + position % cache.block_size)
            positions.append(position)
            lengths.append(position + 1)
    return slots, positions, lengths


class StepRows:
    """Numbers of the rows of a decode step, in one buffer so that one copy sends them.

    `fill` returns slot_mapping, positions [N] int64, seq_lens, page_budgets, and of steps with kept pages choosing_lens
    [N] int32, keeps [N] bool.
    """

    def __init__(self, max_rows: int, device: torch.device):
        self._max_rows = max_rows
        self._buffer = torch.zeros(max_rows * 4, dtype=torch.int64, device=device)

    def fill(self, *numbers: list[int]) -> tuple[Tensor, ...]:
        """numbers: of all of these or the first few, one a row."""
        rows = len(numbers[0])
        # Fresh pinned memory for every copy: torch's host allocator reuses it only when the copy is done.
        on_cpu = self._buffer.device.type == "cpu"
        host = self._buffer if on_cpu else torch.empty_like(self._buffer, device="cpu", pin_memory=True)
        for to, values in zip(self._tensors(host, rows), numbers, strict=False):
            to.copy_(torch.tensor(values, dtype=to.dtype))
        if not on_cpu:
            self._buffer.copy_(host, non_blocking=True)
        return self._tensors(self._buffer, rows)

    def _tensors(self, buffer: Tensor, rows: int) -> tuple[Tensor, ...]:
        n = self._max_rows
        *shorts, keeps = buffer[2 * n :].view(torch.int32).view(4, n)
        return buffer[:rows], buffer[n : n + rows], *(x[:rows] for x in shorts), keeps.view(torch.bool)[:rows]

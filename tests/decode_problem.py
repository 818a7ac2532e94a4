"""A decode step made on the device itself: pools of any size within milliseconds, for tests of long or of many rows.

Whatever a step must not read holds NaN, and block tables numbers that would crash.
"""

import pytest
import torch
from cases import JUNK_BLOCKS, fill_nan

import quest_ops
from quest_ops import ops
from quest_ops.config import metadata_shape


class Problem:
    """Requests of `lengths` tokens; row t of `rows` sees `length - rows + 1 + t` tokens. Random keys and values."""

    def __init__(
        self,
        lengths,
        kv_heads=8,
        group=4,
        head_dim=128,
        *,
        page=16,
        parts=1,
        rows=1,
        dtype=torch.float16,
        metadata_dtype=None,
        max_pages=None,
        layout="NHD",
        bound="minmax",
        seed=0,
        device="cuda",
    ):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.page, self.parts, self.rows, self.device, self.dtype = page, parts, rows, device, dtype
        self.bound = bound
        block_size, batch = page * parts, len(lengths)
        max_blocks = -(-max(lengths) // block_size) if max_pages is None else max_pages // parts
        self.max_pages, self.capacity = max_blocks * parts, max_blocks * block_size
        num_blocks = batch * max_blocks + 1  # one is never used
        sizes = {
            "NHD": (num_blocks, block_size, kv_heads, head_dim),
            "HND": (num_blocks, kv_heads, block_size, head_dim),
        }
        pools = [torch.full(sizes[layout], torch.nan, dtype=dtype, device=device) for _ in range(2)]
        self.k, self.v = pools if layout == "NHD" else (pool.transpose(1, 2) for pool in pools)
        metadata_dtype = metadata_dtype or dtype
        of_page = metadata_shape(metadata_dtype, head_dim)
        self.metadata = torch.empty(num_blocks, kv_heads, parts, *of_page, dtype=metadata_dtype, device=device)
        blocks = torch.randperm(num_blocks, generator=self.generator, device=device)
        self.blocks = blocks[: batch * max_blocks].view(batch, max_blocks)
        self.query = self.random(batch * rows, kv_heads * group, head_dim)
        self.set_lengths(lengths)
        self.set_keys(self.random_tokens())
        self._write(self.v, self.random_tokens())

    def random(self, *shape):
        return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=self.generator)

    def random_tokens(self):
        """[B, capacity, Hkv, D]"""
        return self.random(len(self.blocks), self.capacity, *self.k.shape[2:])

    def random_per_page(self):
        """[B, P, 1, Hkv, D]: to be repeated for the tokens of a page by `tokens_of`."""
        return self.random(len(self.blocks), self.max_pages, 1, *self.k.shape[2:])

    def tokens_of(self, per_page):
        """[B, capacity, Hkv, D] of [B, P, 1 or page_size, Hkv, D]"""
        return per_page.expand(-1, -1, self.page, -1, -1).flatten(1, 2)

    def set_lengths(self, lengths):
        """The lengths of the requests, at most those that it was made with: their metadata stays."""
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        behind = torch.arange(1 - self.rows, 1, dtype=torch.int32, device=self.device)
        self.lens = (self.lengths[:, None] + behind).clamp(min=0).flatten()
        starts = torch.arange(self.blocks.size(1), device=self.device) * self.k.size(1)
        junk = torch.tensor(JUNK_BLOCKS, device=self.device)[torch.arange(len(starts), device=self.device) % 4]
        self.table = torch.where(starts < self.lengths[:, None], self.blocks, junk).int()

    def set_keys(self, keys):
        """keys [B, capacity, Hkv, D]; writes those within the lengths, and all metadata."""
        self._write(self.k, keys)
        fill_nan(self.metadata)
        starts = torch.zeros_like(self.lengths)
        quest_ops.update_page_metadata(self.k, self.metadata, self.table, self.lengths, starts, bound=self.bound)

    def forget_pages(self, pages):
        """Metadata of the pages [n] of every request becomes NaN: "unknown"."""
        self.metadata.view(torch.uint8)[self.blocks[:, pages // self.parts], :, pages % self.parts] = 0xFF

    def _write(self, pool, tokens):
        unseen = torch.arange(self.capacity, device=self.device) >= self.lengths[:, None]
        tokens = tokens.masked_fill(unseen[..., None, None], torch.nan)
        pool[self.blocks] = tokens.view(*self.blocks.shape, *pool.shape[1:])

    def fused(self, budget, sink=1, recent=2, reduction="max", **options):
        inputs = self.query, self.k, self.v, self.metadata, self.table, self.lens
        choice = budget, sink, recent, reduction
        return quest_ops.quest_decode_attention(*inputs, *choice, bound=self.bound, **options)

    def step(self, key, value, budget, sink=1, recent=2, reduction="max", **options):
        inputs = self.query, key, value, self.k, self.v, self.metadata, self.table, self.lens
        return quest_ops.quest_decode_step(*inputs, budget, sink, recent, reduction, bound=self.bound, **options)

    def select(self, budget, sink=1, recent=2, reduction="max", page_budgets=None):
        inputs = self.query, self.metadata, self.table, self.lens
        scores = quest_ops.estimate_page_scores(*inputs, self.page, reduction, bound=self.bound)
        return quest_ops.select_topk_pages(
            scores, self.lens, self.page, budget, sink, recent, page_budgets=page_budgets
        )

    def separate(self, budget, sink=1, recent=2, reduction="max", page_budgets=None, sm_scale=None):
        chosen = self.select(budget, sink, recent, reduction, page_budgets)
        return self.dense(*chosen, sm_scale=sm_scale)

    def dense(self, *chosen, **options):
        inputs = self.query, self.k, self.v, self.table, self.lens
        return quest_ops.sparse_decode_attention(*inputs, *chosen, page_size=self.page, **options)


def new_workspace(device="cuda"):
    return torch.zeros(ops.WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def assert_close(actual, expected):
    """Two ways to sum up the same attention. A page taken for another would show in lse, which is not rounded."""
    (out, lse), (expected_out, expected_lse) = actual, expected
    half = out.dtype == torch.float16
    torch.testing.assert_close(out, expected_out, rtol=2e-3 if half else 1.6e-2, atol=5e-4 if half else 4e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


def assert_one_launch(attend, *arguments, **options):
    """Only the one-launch path looks at the workspace's size."""
    with pytest.raises(RuntimeError, match="workspace has 64 bytes"):
        attend(*arguments, workspace=torch.zeros(64, dtype=torch.uint8, device="cuda"), **options)


def assert_fused_equals_separate(problem, budget, *args, workspace=None, **options):
    """The scores of both are the same bits, so the pages are the same ones; without a workspace it is like with one."""
    workspace = new_workspace(problem.device) if workspace is None else workspace
    assert_one_launch(problem.fused, budget, *args, **options)
    actual = problem.fused(budget, *args, workspace=workspace, **options)
    expected = problem.separate(budget, *args, **options)
    assert not expected[0].isnan().any()
    assert_close(actual, expected)
    assert not workspace.any(), "the workspace is not left as zeros"

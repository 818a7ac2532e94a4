"""The one-launch path of quest_decode_attention: its workspace, many launches, growing lengths."""

import pytest
import torch

import quest_ops

pytestmark = pytest.mark.gpu

PAGE, HEAD_DIM = 16, 128


class Problem:
    def __init__(self, batch, kv_heads, group, tokens, dtype=torch.float16, page=PAGE, head_dim=HEAD_DIM, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, device="cuda", generator=generator).to(dtype)  # noqa: E731
        blocks = batch * -(-tokens // page)
        self.query = random(batch, kv_heads * group, head_dim)
        self.k, self.v = random(blocks, page, kv_heads, head_dim), random(blocks, page, kv_heads, head_dim)
        self.metadata = torch.empty(blocks, kv_heads, 2, head_dim, dtype=dtype, device="cuda")
        table = torch.randperm(blocks, generator=generator, device="cuda", dtype=torch.int32)
        self.table = table.view(batch, -1)
        self.lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
        quest_ops.update_page_metadata(self.k, self.metadata, self.table, self.lens, torch.zeros_like(self.lens))
        self.page = page

    def fused(self, budget, sink=1, recent=2, reduction="max", **options):
        pools = (self.query, self.k, self.v, self.metadata, self.table, self.lens)
        return quest_ops.quest_decode_attention(*pools, budget, sink, recent, reduction, **options)

    def separate(self, budget, sink=1, recent=2, reduction="max", page_budgets=None):
        scores = quest_ops.estimate_page_scores(self.query, self.metadata, self.table, self.lens, self.page, reduction)
        chosen = quest_ops.select_topk_pages(
            scores, self.lens, self.page, budget, sink, recent, page_budgets=page_budgets
        )
        return quest_ops.sparse_decode_attention(self.query, self.k, self.v, self.table, self.lens, *chosen)


def assert_close(actual, expected):
    (out, lse), (expected_out, expected_lse) = actual, expected
    half = out.dtype == torch.float16
    torch.testing.assert_close(out, expected_out, rtol=2e-3 if half else 1.6e-2, atol=2e-4 if half else 1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


def assert_is_fused(problem):
    """Only the one-launch path looks at the workspace's size."""
    with pytest.raises(RuntimeError, match="workspace has 64 bytes"):
        problem.fused(8, workspace=torch.zeros(64, dtype=torch.uint8, device="cuda"))


def new_workspace():
    return torch.zeros(8 << 20, dtype=torch.uint8, device="cuda")


SHAPES = [  # batch, KV heads, group, tokens: teams of 16, 8, 4 and 2; 8 and 32 keys a thread
    (1, 8, 4, 5000),
    (1, 1, 7, 32768),
    (1, 32, 1, 9000),
    (3, 8, 3, 12345),
    (8, 8, 4, 4096),
    (16, 8, 8, 2000),
    (1, 8, 4, 131072),
    (1, 32, 1, 70000),
]


@pytest.mark.parametrize("batch, kv_heads, group, tokens", SHAPES)
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_fused_equals_the_separate_ops(batch, kv_heads, group, tokens, reduction):
    problem = Problem(batch, kv_heads, group, tokens)
    assert_is_fused(problem)
    workspace = new_workspace()
    for budget in (8, 64, 128):
        expected = problem.separate(budget, reduction=reduction)
        assert_close(problem.fused(budget, reduction=reduction, workspace=workspace), expected)
        assert_close(problem.fused(budget, reduction=reduction), expected)
    assert not workspace.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page", [8, 16, 32, 64, 128])
def test_every_instantiation(dtype, head_dim, page):
    for batch, kv_heads, group in ((1, 4, 4), (2, 16, 2)):
        for tokens in (40 * page - 3, 2100 * min(page, 16)):
            problem = Problem(batch, kv_heads, group, tokens, dtype, page, head_dim)
            problem.lens -= torch.arange(batch, device="cuda", dtype=torch.int32) * 7
            assert_is_fused(problem)
            assert_close(problem.fused(16), problem.separate(16))


def test_ragged_lengths_and_empty_slots():
    problem = Problem(6, 8, 4, 4096)
    problem.lens.copy_(torch.tensor([0, 1, 17, 300, 2049, 4096]))
    budgets = torch.tensor([8, 8, 8, 8, 16, 30], dtype=torch.int32, device="cuda")
    for page_budgets in (None, budgets):
        expected = problem.separate(32, page_budgets=page_budgets)
        assert_close(problem.fused(32, page_budgets=page_budgets), expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_pages_go_to_the_earlier_one(value):
    """Every key the same: the kept pages are the first ones; the values tell which they were."""
    problem = Problem(1, 8, 4, 32768)
    problem.k.fill_(value)
    quest_ops.update_page_metadata(
        problem.k, problem.metadata, problem.table, problem.lens, torch.zeros_like(problem.lens)
    )
    for page in range(problem.table.size(1)):
        problem.v[problem.table[0, page].item()] = page / 2048
    out, _ = problem.fused(64, sink=1, recent=2)
    kept = torch.tensor([*range(62), 2046, 2047]) / 2048
    torch.testing.assert_close(out, torch.full_like(out, kept.mean().item()), rtol=2e-3, atol=0)


def test_runs_give_the_same_bits():
    problem = Problem(2, 8, 4, 20000)
    workspace = new_workspace()
    out, lse = problem.fused(128, workspace=workspace)
    for _ in range(50):
        again_out, again_lse = problem.fused(128, workspace=workspace)
        assert torch.equal(out, again_out) and torch.equal(lse, again_lse)


def test_replays_follow_growing_lengths():
    """One captured graph, replayed while every length grows past page boundaries and past the budget."""
    problem = Problem(4, 8, 4, 3000)
    workspace, length = new_workspace(), torch.tensor([1, 500, 1000, 30], device="cuda", dtype=torch.int32)
    problem.lens.copy_(length)
    problem.fused(32, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            result = problem.fused(32, workspace=workspace)
    for step in range(0, 2000, 97):
        problem.lens.copy_(length + step)
        graph.replay()
        assert_close(result, problem.separate(32))
    assert not workspace.any()

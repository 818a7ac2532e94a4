"""Decode attention in one launch (sm_90 and later) against the separate ops: shapes, lengths, scores of all kinds."""

import itertools

import pytest
import torch
from cases import FP8, INT4, LAYOUTS, Shape, assert_attention_close, assert_same_bits, build
from decode_problem import Problem, assert_close, assert_fused_equals_separate, assert_one_launch, new_workspace

import quest_ops
from quest_ops import reference

HAS_TEAMS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TEAMS, reason="needs compute capability 9.0")]

DEVICE = "cuda"
PAGES_AND_PARTS = (4, 1), (4, 4), (4, 8), (8, 1), (8, 2), (8, 8), (16, 1), (16, 3), (32, 1), (64, 2), (128, 1)
METADATA = pytest.mark.parametrize("metadata_dtype", [None, FP8, INT4], ids=["16 bits", "8 bits", "4 bits"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
LONGEST = 2**17  # pages that one launch takes
# Where the kernel's instantiation and exchange (2,048 and 4,096 pages) or its rounds (1,024) change.
BORDERS = [n + i for n in (1024, 2048, 4096, 8192) for i in (-1, 0, 1)] + [LONGEST - 1, LONGEST]


def lengths_below(most, batch):
    """The longest one, an empty slot, one token, and others that end within pages."""
    return ([most, 0, 1] + [max(most - 37 * b, 2) for b in range(3, batch)])[:batch]


def teams_of(size):
    """So many teams that the planner gives each `size` blocks, whatever the chip."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    teams = (num_sms if size >= 8 else 2 * num_sms) // size  # a block an SM, or two
    _C = pytest.importorskip("quest_ops._C", reason="the pybind11 module quest_ops._C was not built")
    assert _C.plan_team(90, num_sms, teams=teams, group=2, head_dim=64, max_pages=300) == size
    return teams


@METADATA
@DTYPES
@pytest.mark.parametrize("bound", ["minmax", "principal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_instantiation(head_dim, bound, dtype, metadata_dtype):
    for page, pages in ((8, 300), (8, 3000), (8, 6000), (8, 12_000), (4, 300), (4, 6000)):
        sizes = {"page": page, "head_dim": head_dim, "dtype": dtype, "metadata_dtype": metadata_dtype, "bound": bound}
        problem = Problem([page * pages - 3], 2, 4, **sizes, device=DEVICE)
        assert_fused_equals_separate(problem, 70)
        assert_close(problem.fused(70), problem.separate(70))  # without a workspace


@METADATA
@pytest.mark.parametrize("page, parts", PAGES_AND_PARTS)
def test_every_page_size(page, parts, metadata_dtype):
    for layout, max_pages in (("NHD", 48), ("HND", 1008)):
        lengths = lengths_below(page * max_pages - 3, 4)
        sizes = {"page": page, "parts": parts, "layout": layout, "metadata_dtype": metadata_dtype}
        problem = Problem(lengths, 2, 2, 64, max_pages=max_pages, **sizes, device=DEVICE)
        assert_fused_equals_separate(problem, 20)


@METADATA
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_every_group(group, reduction, metadata_dtype):
    for head_dim, bound in itertools.product((64, 128, 256), ("minmax", "principal")):
        sizes = {"head_dim": head_dim, "metadata_dtype": metadata_dtype, "bound": bound}
        assert_fused_equals_separate(Problem([5000, 777], 2, group, **sizes, device=DEVICE), 24, reduction=reduction)


@METADATA
@pytest.mark.parametrize("size", [16, 8, 4, 2])
def test_every_team_size(size, metadata_dtype):
    lengths = lengths_below(16 * 300 - 9, teams_of(size))
    for parts in (1, 2):
        problem = Problem(lengths, 1, 2, 64, parts=parts, metadata_dtype=metadata_dtype, device=DEVICE)
        for budget in (4, 40, 299):
            assert_fused_equals_separate(problem, budget)


@METADATA
@pytest.mark.parametrize("head_dim", [64, 256])
def test_more_teams_than_fit_take_turns(head_dim, metadata_dtype):
    places = torch.cuda.get_device_properties(0).multi_processor_count * (2 if head_dim == 64 else 1)
    for teams in (places // 2 + 3, 2 * places):
        lengths = lengths_below(16 * 150 - 9, teams)
        problem = Problem(lengths, 1, 2, head_dim, metadata_dtype=metadata_dtype, device=DEVICE)
        for budget in (4, 40, 149):
            assert_fused_equals_separate(problem, budget)


@METADATA
@pytest.mark.parametrize(
    "batch, kv_heads, group, tokens",
    [(1, 8, 4, 32768), (1, 32, 1, 32768), (8, 8, 4, 9000), (1, 8, 4, 131072), (1, 32, 1, 70000), (16, 8, 8, 2000)],
)
def test_shapes_of_models(batch, kv_heads, group, tokens, metadata_dtype):
    problem = Problem([tokens] * batch, kv_heads, group, metadata_dtype=metadata_dtype, device=DEVICE)
    workspace = new_workspace(DEVICE)
    for budget in (32, 128):
        assert_fused_equals_separate(problem, budget, workspace=workspace)


@METADATA
@pytest.mark.parametrize("pages", BORDERS)
def test_every_number_of_pages(pages, metadata_dtype):
    """A block table of so many, and rows of so many in the largest table."""
    sizes = {"page": 8, "metadata_dtype": metadata_dtype}
    problem = Problem([8 * pages - 3], 1, 4, 64, **sizes, device=DEVICE)
    for budget in (20, 600):
        assert_fused_equals_separate(problem, budget)


@METADATA
def test_rows_of_every_number_of_pages(metadata_dtype):
    problem = Problem([8 * LONGEST], 2, 4, 64, page=8, metadata_dtype=metadata_dtype, device=DEVICE)
    workspace = new_workspace(DEVICE)
    for pages in (21, 31, *range(120, 172), 511, 513, *BORDERS):
        problem.set_lengths([8 * pages])
        assert_fused_equals_separate(problem, 20, workspace=workspace)


@pytest.mark.parametrize("max_pages", [1000, 5000, LONGEST])
def test_every_budget(max_pages):
    """From one page that competes to all but one; above 1,024 pages a budget outgrows the shortlists."""
    problem = Problem([8 * max_pages - 1, 8 * max_pages - 900], 1, 2, 64, page=8, device=DEVICE)
    workspace = new_workspace(DEVICE)
    for sink, recent in ((0, 1), (1, 2), (5, 40)):
        for budget in (sink + recent + 1, 64, 128, 500, 1024, 1025, max_pages - 114, max_pages - 1):
            assert_fused_equals_separate(problem, budget, sink, recent, workspace=workspace)


def test_more_sink_and_recent_pages_than_a_block_has_keys():
    problem = Problem([8 * 6000], 1, 4, 64, page=8, device=DEVICE)
    for sink, recent in ((0, 1500), (1500, 1), (1100, 1200), (2990, 2990)):
        assert_fused_equals_separate(problem, sink + recent + 5, sink, recent)


@METADATA
@pytest.mark.parametrize("rows", range(2, 9))
def test_several_rows_a_request(rows, metadata_dtype):
    lengths = [3000, 0, 1, rows, 16 * 40 + rows // 2]
    problem = Problem(lengths, 1, 4, 64, rows=rows, metadata_dtype=metadata_dtype, device=DEVICE)
    assert_fused_equals_separate(problem, 24)


@pytest.mark.parametrize("max_pages", [400, 5000])
def test_page_budgets(max_pages):
    lengths = [0, 1, 17, 300, 16 * max_pages, 16 * max_pages - 5, 16 * 350, 16 * 33]
    problem = Problem(lengths, 2, 4, 64, device=DEVICE)
    budgets = torch.tensor([[8, 0], [8, 3], [-5, 40], [8, 17], [16, 40], [2**31 - 1, 4], [30, 39], [32, 33]])
    budgets = budgets.to(DEVICE, torch.int32)
    for page_budgets in (budgets, budgets[:, 1].contiguous()):
        for budget in (40, max_pages, max_pages + 7):  # the others too are above what some rows may keep
            assert_fused_equals_separate(problem, budget, page_budgets=page_budgets)


def test_lengths_past_the_block_table_are_clamped():
    problem = Problem([2000, 1600, 16], max_pages=125, device=DEVICE)
    expected = problem.separate(20)
    problem.lens[0] = 2**31 - 1
    problem.lens[2] = -7
    out, lse = problem.fused(20, workspace=new_workspace(DEVICE))
    assert_close((out[:2], lse[:2]), (expected[0][:2], expected[1][:2]))
    assert not out[2].any() and (lse[2] == -torch.inf).all()


# Scores that random keys do not give. Each makes keys [B, P, 1 or page_size, Hkv, D].


def alike(problem):
    """All pages the same but for their values."""
    return problem.random_per_page()[:, :1].expand(-1, problem.max_pages, -1, -1, -1)


def three_kinds(problem):
    """Few pages are the best ones, hundreds tie at the threshold."""
    kv_heads, head_dim = problem.k.shape[2:]
    query = problem.query.view(-1, kv_heads, problem.query.size(1) // kv_heads, head_dim)[0].mean(1)
    sizes = torch.tensor([1.0, 3.0, 8.0], device=problem.device)[:, None, None, None]
    kinds = sizes * query / query.norm(dim=-1, keepdim=True)  # [3, 1, Hkv, D]
    chances = torch.tensor([0.5, 0.49, 0.01], device=problem.device)
    which = torch.multinomial(chances, problem.max_pages, replacement=True, generator=problem.generator)
    return kinds[which].to(problem.dtype)[None]


def clustered(problem):
    """Nearly the same everywhere, with many ties after rounding, but for a few huge ones."""
    keys = problem.random_per_page()[:, :1] + 2e-3 * problem.random_per_page()
    keys[:, torch.randperm(problem.max_pages, generator=problem.generator, device=problem.device)[:6]] *= 1000
    return keys


def sixty_binades(problem):
    """Of both signs and of any size."""
    exponents = torch.randint(-30, 31, (problem.max_pages, 1, 1, 1), generator=problem.generator, device=problem.device)
    return problem.random_per_page() * (2.0**exponents).to(problem.dtype)


def ascending(problem):
    """The later, the better: no part of the pages is like another."""
    sizes = torch.linspace(0.1, 4, problem.max_pages, device=problem.device).to(problem.dtype)
    return problem.random_per_page()[:, :1] * sizes[:, None, None, None]


def descending(problem):
    return ascending(problem).flip(1)


def best_ones_together(problem):
    """In the pages of one warp of one block, more of them than its shortlist holds."""
    keys = problem.random_per_page() * 0.1
    keys[:, 16:32] *= 100
    keys[:, 2064:2080] *= 100
    return keys


@METADATA
@pytest.mark.parametrize("pages", [100, 1500, 4000, 12_000])
@pytest.mark.parametrize(
    "make_keys", [alike, three_kinds, clustered, sixty_binades, ascending, descending, best_ones_together]
)
def test_scores_of_all_kinds(make_keys, pages, metadata_dtype):
    """Their spread makes the logits' too: sm_scale keeps them small, so that every chosen page tells in the output."""
    dtype = torch.bfloat16 if make_keys is sixty_binades else torch.float16
    sizes = {"page": 8, "dtype": dtype, "metadata_dtype": metadata_dtype}
    problem = Problem([8 * pages], 2, 4, 64, **sizes, device=DEVICE)
    keys = make_keys(problem)
    problem.set_keys(problem.tokens_of(keys))
    sm_scale = 1 / (8 * keys.float().abs().max().item())
    workspace = new_workspace(DEVICE)
    for budget in (8, 64, 90):
        for reduction in ("max", "mean"):
            assert_fused_equals_separate(problem, budget, 1, 2, reduction, sm_scale=sm_scale, workspace=workspace)


@METADATA
@pytest.mark.parametrize("pages", [100, 2048, 9000])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_equal_pages_go_to_the_earlier_one(value, pages, metadata_dtype):
    """Every key is the same: the pages that are kept are the first ones. Values are the bits of a page's number."""
    problem = Problem([8 * pages], 2, 4, 64, page=8, metadata_dtype=metadata_dtype, device=DEVICE)
    problem.set_keys(torch.full_like(problem.random_tokens(), value))
    bits = (torch.arange(pages, device=DEVICE)[:, None] >> torch.arange(64, device=DEVICE) & 1).half()
    problem.v[problem.blocks[0]] = bits[:, None, None]
    workspace = new_workspace(DEVICE)
    for budget in (4, 64, 99):
        out, _ = problem.fused(budget, workspace=workspace)
        kept = bits[[*range(budget - 2), pages - 2, pages - 1]].float().mean(0)
        torch.testing.assert_close(out.float(), kept.expand_as(out), rtol=1e-3, atol=0)
    assert not workspace.any()


@METADATA
@pytest.mark.parametrize("pages", [200, 3000, 9000])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_unknown_pages_come_first(share, pages, metadata_dtype):
    """NaN in the metadata, on fewer pages than the budget and on many more."""
    problem = Problem([8 * pages - 1], 2, 4, 64, page=8, metadata_dtype=metadata_dtype, device=DEVICE)
    unknown = torch.randperm(pages, generator=problem.generator, device=DEVICE)[: int(share * pages)]
    problem.forget_pages(unknown)
    workspace = new_workspace(DEVICE)
    for budget in (5, 64, 150):
        assert_fused_equals_separate(problem, budget, workspace=workspace)
        page_ids, _ = problem.select(budget)
        middle = unknown[(unknown >= 1) & (unknown < pages - 2)]
        expected = middle.sort().values[: budget - 3]
        assert torch.isin(expected, page_ids[0, 0]).all()


@METADATA
def test_a_nan_key_is_never_hidden(metadata_dtype):
    problem = Problem([9000, 50], 2, 4, metadata_dtype=metadata_dtype, device=DEVICE)
    keys = problem.random_tokens()
    keys[0, 4321, 1, 77] = torch.nan
    problem.set_keys(keys)
    out, lse = problem.fused(16, workspace=new_workspace(DEVICE))
    expected = problem.separate(16)
    assert out[0, 4:].isnan().all() and not out[0, :4].isnan().any() and not out[1].isnan().any()
    torch.testing.assert_close(out, expected[0], rtol=2e-3, atol=5e-4, equal_nan=True)
    torch.testing.assert_close(lse.isnan(), expected[1].isnan())


@METADATA
def test_runs_give_the_same_bits(metadata_dtype):
    for tokens, batch in ((20_000, 2), (80_000, 1)):
        problem = Problem([tokens] * batch, metadata_dtype=metadata_dtype, device=DEVICE)
        workspace = new_workspace(DEVICE)
        first = problem.fused(128, workspace=workspace)
        for _ in range(50):
            for again, result in zip(problem.fused(128, workspace=workspace), first, strict=True):
                assert torch.equal(again, result)


# Dense attention with a workspace.


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dense_equals_its_twin(head_dim, rows):
    for i, layout in enumerate(LAYOUTS):
        page, parts = ((16, 1), (8, 3))[i % 2]
        dtype = (torch.float16, torch.bfloat16)[i % 2]
        sizes = {"rows_per_request": rows, "group": (1, 3, 4, 7, 8)[i], "head_dim": head_dim, "dtype": dtype}
        case = build(Shape((0, 1, 15, 16, 17, 150), 12, page, parts, layout=layout, **sizes), DEVICE)
        inputs = case.query, case.k_cache, case.v_cache, case.block_table, case.seq_lens
        exact = case.exact()
        expected = reference.sparse_decode_attention(
            exact.query, exact.k_cache, exact.v_cache, exact.block_table, exact.seq_lens, page_size=page
        )
        workspace = new_workspace(DEVICE)
        assert_one_launch(quest_ops.sparse_decode_attention, *inputs, page_size=page)
        actual = quest_ops.sparse_decode_attention(*inputs, page_size=page, workspace=workspace)
        assert_attention_close(*actual, *expected)
        assert not workspace.any()


def assert_dense_equals_portable(problem):
    workspace = new_workspace(DEVICE)
    assert_one_launch(problem.dense)
    expected = problem.dense()
    assert not expected[0].isnan().any()
    assert_close(problem.dense(workspace=workspace), expected)
    assert not workspace.any()


@DTYPES
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dense_with_a_workspace_equals_dense_without(head_dim, group, dtype):
    lengths = [0, 1, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 4097, 20_000]
    for page, parts, layout in ((16, 1, "NHD"), (8, 2, "HND"), (128, 1, "NHD")):
        sizes = {"page": page, "parts": parts, "layout": layout, "dtype": dtype}
        assert_dense_equals_portable(Problem(lengths, 1, group, head_dim, **sizes, device=DEVICE))


@pytest.mark.parametrize("size", [16, 8, 4, 2])
def test_dense_by_every_team_size(size):
    teams = teams_of(size)
    for tokens in (40, 1000, 3000):
        assert_dense_equals_portable(Problem(lengths_below(tokens, teams), 1, 4, 64, device=DEVICE))


@pytest.mark.parametrize("tokens", [131_080, 1_000_000])
def test_dense_takes_any_length(tokens):
    assert_dense_equals_portable(Problem([tokens], 1, 4, 64, device=DEVICE))


def test_a_covering_budget_takes_one_launch():
    problem = Problem([2000, 1999, 3], device=DEVICE)
    expected = problem.dense()
    for budget in (125, 126, 10_000):
        assert_close(problem.fused(budget, workspace=new_workspace(DEVICE)), expected)
    problem.set_lengths([700, 800, 1])  # shorter than the block table
    assert_close(problem.fused(60, workspace=new_workspace(DEVICE)), problem.dense())


# What is fetched ahead. The kernel peeks at block numbers and lengths before its predecessor has ended.


class ChangingStep:
    """Steps that change everything right before they attend: the block table, the lengths, a part of the keys."""

    STEPS = 4

    def __init__(self, metadata_dtype, lengths):
        self.problem = problem = Problem(lengths, 2, 4, metadata_dtype=metadata_dtype, seed=1, device=DEVICE)
        problem.k.nan_to_num_(), problem.v.nan_to_num_()
        self.pages = problem.blocks.numel()
        self.workspace = new_workspace(DEVICE)
        self.inputs = self.draw(0)

    def draw(self, seed):
        """What each step changes: tables, lengths, blocks and their keys, the new token and its slot."""
        problem, batch = self.problem, len(self.problem.blocks)
        random = {"device": DEVICE, "generator": torch.Generator(DEVICE).manual_seed(seed)}
        steps, size = self.STEPS, self.pages // 4
        tables = torch.stack([torch.randperm(self.pages, **random) for _ in range(steps)])
        tables = tables.view(steps, *problem.blocks.shape)
        lens = torch.randint(problem.capacity // 2, problem.capacity + 1, (steps, batch), **random)
        blocks = torch.stack([torch.randperm(self.pages, **random)[:size] for _ in range(steps)])
        keys = 3 * torch.randn(steps, size, *problem.k.shape[1:], **random)
        tokens = torch.randn(2, steps, batch, *problem.k.shape[2:], **random)
        last = tables.gather(2, (lens[..., None] - 1) // problem.page).squeeze(2)
        slots = last * problem.page + (lens - 1) % problem.page
        return [tables.int(), lens.int(), blocks, keys.to(problem.dtype), tokens.to(problem.dtype), slots]

    def prepare(self, inputs):
        for ours, new in zip(self.inputs, inputs, strict=True):
            ours.copy_(new)

    def run(self, attend):
        problem, (tables, lens, blocks, keys, tokens, slots) = self.problem, self.inputs
        results = []
        for step in range(self.STEPS):
            problem.k.index_copy_(0, blocks[step], keys[step])
            if step % 2 == 0:  # on odd steps the table changes last of all
                problem.table.copy_(tables[step]), problem.lens.copy_(lens[step])
            start = torch.zeros_like(lens[step])
            quest_ops.update_page_metadata(problem.k, problem.metadata, tables[step], lens[step], start)
            pools = problem.k, problem.v, problem.metadata
            quest_ops.append_paged_kv(*tokens[:, step], *pools, slots[step])
            if step % 2 == 1:
                problem.table.copy_(tables[step]), problem.lens.copy_(lens[step])
            results += attend(problem)
        return results


@METADATA
@pytest.mark.parametrize("lengths", [[1800] * 4, [9000], [1600] * 20, [70_000]])
def test_everything_changes_right_before_a_step(lengths, metadata_dtype):
    captured, eager = ChangingStep(metadata_dtype, lengths), ChangingStep(metadata_dtype, lengths)
    workspace = captured.workspace

    def attend(problem):
        return problem.fused(32, workspace=workspace), problem.dense(workspace=workspace)

    assert_one_launch(captured.problem.fused, 32)
    captured.run(attend)
    eager.run(lambda problem: [])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured.run(attend)
    for replay in range(1, 6):
        inputs = captured.draw(replay)
        captured.prepare(inputs), eager.prepare(inputs)
        graph.replay()
        expected = eager.run(lambda problem: [problem.separate(32), problem.dense()])
        for actual, wanted in zip(results, expected, strict=True):
            assert_close(actual, wanted)
        assert_same_bits(captured.problem.metadata, eager.problem.metadata)
    assert not workspace.any()


def test_replays_follow_growing_lengths():
    """One captured graph, replayed while every length grows past page boundaries and past the budget."""
    problem = Problem([3000] * 4, device=DEVICE)
    workspace, length = new_workspace(DEVICE), torch.tensor([1, 500, 1000, 30], device=DEVICE, dtype=torch.int32)
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

"""quest_decode_step: the append of a step's tokens and the attention to them in one call, as the two ops do it."""

import pytest
import torch
from cases import FP8, INT4, assert_same_bits, fill_nan
from decode_problem import Problem, new_workspace

import quest_ops
from quest_ops import reference

METADATA = pytest.mark.parametrize("metadata_dtype", [None, FP8, INT4], ids=["16 bits", "8 bits", "4 bits"])


class Step:
    """A Problem's last tokens, taken out of a copy of its cache: they are to be appended."""

    def __init__(self, problem):
        self.problem, self.bound = problem, problem.bound
        self.workspace = new_workspace(problem.device) if problem.device == "cuda" else None
        block_size = problem.k.size(1)
        at = problem.lens.long().clamp(max=problem.capacity) - 1
        requests = torch.arange(len(at), device=at.device) // problem.rows
        block = problem.blocks[requests, (at // block_size).clamp(min=0)]
        self.slots = torch.where(at < 0, -1, block * block_size + at % block_size)
        places = block, at.clamp(min=0) % block_size
        self.key, self.value = problem.k[places], problem.v[places]
        self.key[at < 0], self.value[at < 0] = torch.nan, torch.nan

    def caches(self):
        """Before the step: the new tokens and what is known of their pages are NaN."""
        problem = self.problem
        k, v, metadata = problem.k.clone(), problem.v.clone(), problem.metadata.clone()
        used = self.slots[self.slots >= 0]
        places = used // k.size(1), used % k.size(1)
        k[places], v[places] = torch.nan, torch.nan
        metadata.view(torch.uint8)[places[0], :, places[1] // problem.page] = 0xFF
        return k, v, metadata

    def run(self, budget, ops=quest_ops, reduction="max", **options):
        """(out, lse, k, v, metadata) of the one call"""
        problem, caches = self.problem, self.caches()
        if ops is quest_ops:
            options["workspace"] = self.workspace
        tables = problem.table, problem.lens
        step = ops.quest_decode_step(
            problem.query, self.key, self.value, *caches, *tables, budget, 1, 2, reduction, bound=self.bound, **options
        )
        return *step, *caches

    def run_apart(self, budget, reduction="max", **options):
        problem, caches = self.problem, self.caches()
        quest_ops.append_paged_kv(self.key, self.value, *caches, self.slots, bound=self.bound)
        inputs = problem.query, *caches, problem.table, problem.lens, budget, 1, 2, reduction
        options = {"bound": self.bound, "workspace": self.workspace} | options
        return *quest_ops.quest_decode_attention(*inputs, **options), *caches


def assert_step(step, budget, **options):
    for actual, expected in zip(step.run(budget, **options), step.run_apart(budget, **options), strict=True):
        assert_same_bits(actual, expected)
    if step.workspace is not None:
        assert not step.workspace.any()


def lengths_of(page):
    """An empty slot, a first token, a page's first and last, within one, rows that the budget covers, and others."""
    return [40 * page, 0, 1, 39 * page + 1, 39 * page + 3, 2 * page, 30 * page - 1, 8]


@METADATA
@pytest.mark.parametrize("page, parts", [(4, 1), (4, 4), (8, 1), (8, 2), (16, 1), (16, 3), (32, 1), (128, 1)])
def test_as_the_two_ops(device, page, parts, metadata_dtype):
    for layout, bound in (("NHD", "minmax"), ("HND", "mean_std"), ("NHD", "principal")):
        sizes = {"page": page, "parts": parts, "layout": layout, "metadata_dtype": metadata_dtype, "max_pages": 42}
        step = Step(Problem(lengths_of(page), 2, 2, 64, **sizes, bound=bound, device=device))
        for budget in (5, 41, 64):
            assert_step(step, budget)


@METADATA
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_reductions_and_budgets_by_row(device, reduction, metadata_dtype):
    budgets = torch.tensor([4, 9, 5], dtype=torch.int32, device=device)
    for bound in ("cuboid", "principal"):
        problem = Problem([640, 333, 0], 2, 4, 64, metadata_dtype=metadata_dtype, bound=bound, device=device)
        assert_step(Step(problem), 9, reduction=reduction, page_budgets=budgets)


@METADATA
@pytest.mark.parametrize("rows", [2, 8])
def test_rows_of_one_request_see_each_other(device, rows, metadata_dtype):
    problem = Problem([640, 5, 333], 2, 2, 64, rows=rows, metadata_dtype=metadata_dtype, device=device)
    assert_step(Step(problem), 9)


@METADATA
@pytest.mark.parametrize("bound", ["mean_std", "principal"])
def test_as_the_twin(device, bound, metadata_dtype):
    step = Step(Problem([200, 97, 0], 2, 2, 64, metadata_dtype=metadata_dtype, bound=bound, device=device))
    out, lse, *caches = step.run(6)
    twin_out, twin_lse, *twin_caches = step.run(6, reference)
    torch.testing.assert_close(out, twin_out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, twin_lse, atol=1e-3, rtol=1e-3)
    for actual, expected in zip(caches, twin_caches, strict=True):
        assert_same_bits(actual, expected)


def test_lengths_past_the_table_end_at_its_last_token(device):
    problem = Problem([640, 640], 2, 2, 64, device=device)
    expected = Step(problem).run(9)
    problem.lens += 50
    for actual, wanted in zip(Step(problem).run(9), expected, strict=True):
        assert_same_bits(actual, wanted)


def test_own_outputs(device):
    step = Step(Problem([640, 100], 2, 2, 64, device=device))
    out, lse, *_ = step.run(9)
    given = torch.empty_like(out)
    result = step.run(9, out=given)
    assert result[0] is given
    assert_same_bits(given, out)
    assert_same_bits(result[1], lse)


@pytest.mark.parametrize("wrong", ["rows", "heads", "dtype", "bound"])
def test_wrong_tokens_write_nothing(device, wrong):
    step = Step(Problem([640, 100], 2, 2, 64, device=device))
    key = {
        "rows": step.key[:1], "heads": step.key[:, :1], "dtype": step.key.float().double(), "bound": step.key,
    }[wrong]  # fmt: skip
    caches, problem = step.caches(), step.problem
    before = [cache.clone() for cache in caches]
    message = {"rows": "key|value has", "heads": "num_kv_heads", "dtype": "must be float16", "bound": "mean_std"}[wrong]
    with pytest.raises(RuntimeError, match=message):
        quest_ops.quest_decode_step(
            problem.query, key, step.value, *caches, problem.table, problem.lens, 9, 1, 2, "max",
            bound="median" if wrong == "bound" else "minmax",
        )  # fmt: skip
    for cache, old in zip(caches, before, strict=True):
        assert_same_bits(cache, old)


@pytest.mark.gpu
@METADATA
@pytest.mark.parametrize(
    "batch, kv_heads, group, tokens, page, head_dim",
    [
        (1, 8, 4, 32768, 16, 128),
        (1, 8, 4, 131072, 16, 128),
        (1, 32, 1, 32768, 8, 128),
        (1, 8, 4, 60000, 8, 256),
        (1, 8, 4, 131072, 4, 128),
        (1, 32, 1, 32768, 4, 128),
        (8, 8, 4, 9000, 4, 64),
        (8, 8, 4, 9000, 16, 128),
        (16, 16, 2, 2000, 8, 64),  # a team of one launch each, and few blocks to spare
        (3, 44, 2, 2000, 16, 64),  # none to spare on 132 multiprocessors: they come last
        (40, 8, 4, 2000, 16, 128),  # more teams than fit
    ],
)
def test_shapes_of_models(batch, kv_heads, group, tokens, page, head_dim, metadata_dtype):
    sizes = {"page": page, "parts": 16 // page, "layout": "HND", "metadata_dtype": metadata_dtype}
    lengths = [max(tokens - 37 * b, 1) for b in range(batch)]
    step = Step(Problem(lengths, kv_heads, group, head_dim, **sizes, bound="mean_std", device="cuda"))
    for budget in (512 // page, 2048 // page, step.problem.max_pages):  # the last: all are attended to
        assert_step(step, budget)


def growing_rows(metadata_dtype, steps, first=1000):
    """A problem of two requests, their caches before `steps` tokens come to each, and these: (key, value, lengths)."""
    page = 4 if metadata_dtype == INT4 else 8
    sizes = {"page": page, "parts": 16 // page, "layout": "HND", "metadata_dtype": metadata_dtype}
    problem = Problem([first + steps, first - 300 + steps], 4, 4, 128, **sizes, device="cuda")
    tokens = []
    for back in reversed(range(steps)):
        problem.set_lengths([first + steps - back, first - 300 + steps - back])
        step = Step(problem)
        tokens.append((step.key.clone(), step.value.clone(), problem.lens.clone()))
    caches = problem.k.clone(), problem.v.clone(), problem.metadata.clone()
    fill_nan(caches[2])
    known = tokens[0][2] - 1
    quest_ops.update_page_metadata(caches[0], caches[2], problem.table, known, torch.zeros_like(known))
    return problem, caches, tokens


@pytest.mark.gpu
@METADATA
def test_a_replayed_step_appends_and_sees_one_token_after_the_other(metadata_dtype):
    problem, caches, tokens = growing_rows(metadata_dtype, 200)
    key, value, lens = (tensor.clone() for tensor in tokens[0])
    workspace = new_workspace()

    def step():
        return quest_ops.quest_decode_step(
            problem.query, key, value, *caches, problem.table, lens, 40, 1, 2, "max", workspace=workspace
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for token in tokens:
        for given, new in zip((key, value, lens), token, strict=True):
            given.copy_(new)
        graph.replay()
        expected = quest_ops.quest_decode_attention(
            problem.query, *caches, problem.table, lens, 40, 1, 2, "max", workspace=workspace
        )
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])
    assert_same_bits(caches[0], problem.k)
    assert_same_bits(caches[1], problem.v)
    rebuilt = fill_nan(torch.empty_like(problem.metadata))
    quest_ops.update_page_metadata(problem.k, rebuilt, problem.table, problem.lengths, torch.zeros_like(lens))
    assert_same_bits(caches[2], rebuilt)


@pytest.mark.gpu
@METADATA
@pytest.mark.parametrize("recent_pages", [1, 2, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_a_step_that_starts_before_the_last_one_has_ended(metadata_dtype, recent_pages, apart):
    """Launches one after the other on one layer: what the last one appends to is read by the next one."""
    problem, caches, tokens = growing_rows(metadata_dtype, 60)
    workspace = new_workspace()
    at = [lens.long() - 1 for _, _, lens in tokens]
    slots = [problem.blocks.gather(1, i[:, None] // 16)[:, 0] * 16 + i % 16 for i in at]
    results = [(torch.empty_like(problem.query), problem.query.new_empty(2, 16, dtype=torch.float32)) for _ in tokens]

    def run(caches, number):
        key, value, lens = tokens[number]
        out, lse = results[number]
        choice = problem.table, lens, 40, 1, recent_pages, "max"
        options = {"workspace": workspace, "out": out, "lse": lse}
        if not apart:
            quest_ops.quest_decode_step(problem.query, key, value, *caches, *choice, **options)
        else:
            quest_ops.append_paged_kv(key, value, *caches, slots[number])
            quest_ops.quest_decode_attention(problem.query, *caches, *choice, **options)

    alone = [cache.clone() for cache in caches]
    for number in range(len(tokens)):
        run(alone, number)
        torch.cuda.synchronize()
    expected = [(out.clone(), lse.clone()) for out, lse in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # allocates nothing, so that it can be captured under compute-sanitizer
        for number in range(len(tokens)):
            run(caches, number)
    graph.replay()
    for now, wanted in zip(results, expected, strict=True):
        assert_same_bits(now[0], wanted[0])
        assert_same_bits(now[1], wanted[1])
    for now, wanted in zip(caches, alone, strict=True):
        assert_same_bits(now, wanted)

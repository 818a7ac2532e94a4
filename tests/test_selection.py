"""select_topk_pages: exact under ties, NaN and infinities; page for page what the twin selects."""

import pytest
import torch
from cases import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference

NAN_BITS = (0x7FC00000, 0xFFC00000 - 2**32, 0x7F800001, 0xFFFFFFFF - 2**32)
# Scores that tie, differ in the last bit only, or sort badly as integers.
HARD_SCORES = torch.cat(
    [
        torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf]),
        torch.tensor([1.0, 1.0]).nextafter(torch.tensor([2.0, 0.0])),
        torch.tensor(NAN_BITS, dtype=torch.int32).view(torch.float32),
    ]
)


def lengths_of(pages, page_size, generator):
    """int32 `[R]`: lengths of that many pages, the last one full to any degree."""
    pages = torch.tensor(pages)
    last = torch.randint(1, page_size + 1, pages.shape, generator=generator)
    return ((pages - 1) * page_size + last).where(pages > 0, 0).int()


def poison_past_the_end(scores, seq_lens, page_size):
    pages = (seq_lens + page_size - 1) // page_size
    past = torch.arange(scores.size(2))[None, None] >= pages[:, None, None]
    return scores.masked_fill(past, torch.nan)


def assert_selects_as_twin(device, scores, seq_lens, page_size, budget, sink, recent, page_budgets=None):
    args = (page_size, budget, sink, recent)
    expected = reference.select_topk_pages(scores, seq_lens, *args, page_budgets=page_budgets)
    on_device = None if page_budgets is None else page_budgets.to(device)
    actual = quest_ops.select_topk_pages(scores.to(device), seq_lens.to(device), *args, page_budgets=on_device)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.int32
        assert_same_bits(a, e)


@given(data=st.data())
def test_selection_is_exact_under_ties(device, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    num_pages = data.draw(st.sampled_from([1, 2, 7, 31, 32, 33, 64, 100, 257, 1000, 1025, 3000]))
    rows, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    kind = data.draw(st.sampled_from(["hard", "hard finite", "normal", "coarse", "all equal"]))
    if kind == "hard":
        scores = HARD_SCORES[torch.randint(len(HARD_SCORES), (rows, heads, num_pages), generator=generator)]
    elif kind == "hard finite":
        scores = HARD_SCORES[torch.randint(6, (rows, heads, num_pages), generator=generator)]
    elif kind == "all equal":
        scores = torch.full((rows, heads, num_pages), data.draw(st.sampled_from(HARD_SCORES.tolist())))
    else:
        scores = torch.randn(rows, heads, num_pages, generator=generator)
        scores = (scores * 3).round() if kind == "coarse" else scores
    pages = [data.draw(st.one_of(st.integers(0, num_pages), st.just(num_pages))) for _ in range(rows)]
    page_size = data.draw(st.sampled_from([4, 8, 16, 128]))
    seq_lens = lengths_of(pages, page_size, generator)
    sink, recent = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6))
    budget = sink + recent + data.draw(st.sampled_from([1, 2, 3, 5, 60, 128, 500]))
    page_budgets = None
    ratio = data.draw(st.sampled_from([None, (rows,), (rows, heads)]))
    if ratio is not None:
        page_budgets = torch.randint(-3, budget + 10, ratio, generator=generator, dtype=torch.int32)
    scores = poison_past_the_end(scores, seq_lens, page_size)
    assert_selects_as_twin(device, scores, seq_lens, page_size, budget, sink, recent, page_budgets)


@pytest.mark.parametrize("num_pages", [4096, 8192, 65536])
def test_selection_is_exact_over_long_contexts(device, num_pages):
    """Up to 1M tokens of 16 a page, with many ties at the cut."""
    generator = torch.Generator().manual_seed(num_pages)
    seq_lens = lengths_of([num_pages, num_pages // 2 + 1], 16, generator)
    scores = torch.randn(2, 2, num_pages, generator=generator)
    scores[:, 1] = (scores[:, 1] * 4).round()
    scores = poison_past_the_end(scores, seq_lens, 16)
    for budget in (6, 128, 1024):
        assert_selects_as_twin(device, scores, seq_lens, 16, budget, 1, 4)


def test_the_order_is_nan_then_inf_then_numbers(device):
    order = [torch.nan, torch.inf, 2.0, 0.5, -0.5, -torch.inf]
    scores = torch.tensor(order[::-1] + [0.0]).view(1, 1, -1).to(device)  # the last page is kept as recent
    seq_lens = torch.tensor([7 * 16], dtype=torch.int32, device=device)
    for budget in range(2, 8):
        page_ids, _ = quest_ops.select_topk_pages(scores, seq_lens, 16, budget, 0, 1)
        assert page_ids[0, 0].tolist() == list(range(7 - budget, 7))


def test_zeros_of_both_signs_tie(device):
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0]]], device=device)
    seq_lens = torch.tensor([5 * 16], dtype=torch.int32, device=device)
    page_ids, _ = quest_ops.select_topk_pages(scores, seq_lens, 16, 3, 0, 1)
    assert page_ids[0, 0].tolist() == [0, 1, 4]


def test_all_pages_where_they_fit(device):
    scores = torch.full((4, 2, 20), torch.nan, device=device)
    seq_lens = torch.tensor([0, 1, 160, 320], dtype=torch.int32, device=device)
    page_ids, page_counts = quest_ops.select_topk_pages(scores, seq_lens, 16, 24, 1, 4)
    assert page_counts[:, 0].tolist() == [0, 1, 10, 20]
    for r, count in enumerate([0, 1, 10, 20]):
        assert page_ids[r, 1].tolist() == list(range(count)) + [-1] * (24 - count)


def test_sink_and_recent_pages_are_kept_whatever_they_score(device):
    scores = torch.rand(1, 1, 50, device=device)
    scores[..., :2] = -torch.inf
    scores[..., -3:] = -torch.inf
    seq_lens = torch.tensor([50 * 16], dtype=torch.int32, device=device)
    page_ids, _ = quest_ops.select_topk_pages(scores, seq_lens, 16, 8, 2, 3)
    assert page_ids[0, 0, :2].tolist() == [0, 1] and page_ids[0, 0, -3:].tolist() == [47, 48, 49]


def test_streaming_heads_take_sink_and_recent_pages_alone(device):
    """A head budget of 0 is clamped to sink + recent; one above page_budget to page_budget."""
    scores = torch.rand(1, 3, 50, device=device)
    seq_lens = torch.tensor([50 * 16], dtype=torch.int32, device=device)
    page_budgets = torch.tensor([[0, 10, 99]], dtype=torch.int32, device=device)
    page_ids, page_counts = quest_ops.select_topk_pages(scores, seq_lens, 16, 16, 1, 2, page_budgets=page_budgets)
    assert page_counts[0].tolist() == [3, 10, 16]
    assert page_ids[0, 0, :4].tolist() == [0, 48, 49, -1]


def test_lengths_clamp_to_the_scores(device):
    scores = torch.rand(2, 2, 40, device=device)
    full = torch.full((2,), 40 * 16, dtype=torch.int32, device=device)
    expected = quest_ops.select_topk_pages(scores, full, 16, 8, 1, 2)
    actual = quest_ops.select_topk_pages(scores, torch.full_like(full, 2**31 - 1), 16, 8, 1, 2)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)

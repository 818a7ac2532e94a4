"""quest_decode_attention: the three steps in one call, page for page what they do one by one."""

import dataclasses

import pytest
import torch
from cases import (
    GROUPS,
    HEAD_DIMS,
    HEAD_REDUCTIONS,
    LAYOUTS,
    METADATA_DTYPES,
    PAGE_SIZES,
    Shape,
    assert_attention_close,
    assert_same_bits,
    assert_same_selection,
    build,
    dtypes,
    score_tolerance,
    selection_is_clear,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference


def quest(case, budget, sink=1, recent=2, head_reduction="max", op=quest_ops.quest_decode_attention, **options):
    inputs = case.query, case.k_cache, case.v_cache, case.page_metadata, case.block_table, case.seq_lens
    return op(*inputs, budget, sink, recent, head_reduction, **options)


def dense(case, shape):
    inputs = case.query, case.k_cache, case.v_cache, case.block_table, case.seq_lens
    return quest_ops.sparse_decode_attention(*inputs, page_size=shape.page_size)


def assert_equals_composition(case, shape, budget, sink, recent, head_reduction, page_budgets=None):
    """Against the twins where no page is within rounding of the cut; returns the share of heads where none is."""
    args, bound = (shape.page_size, budget, sink, recent), shape.bound[0]
    scores = quest_ops.estimate_page_scores(
        case.query, case.page_metadata, case.block_table, case.seq_lens, shape.page_size, head_reduction, bound=bound
    )
    page_ids, _ = quest_ops.select_topk_pages(scores, case.seq_lens, *args, page_budgets=page_budgets)

    exact = case.exact()
    exact_scores = reference.estimate_page_scores(
        exact.query, exact.page_metadata, exact.block_table, exact.seq_lens, shape.page_size, head_reduction,
        bound=bound,
    )  # fmt: skip
    host_budgets = None if page_budgets is None else page_budgets.cpu()
    exact_ids, exact_counts = reference.select_topk_pages(
        exact_scores, exact.seq_lens, *args, page_budgets=host_budgets
    )
    tolerance = 2 * score_tolerance(exact, shape.page_size, head_reduction)
    tolerance = tolerance.masked_fill(~tolerance.isfinite(), 0).amax(-1)
    assert_same_selection(page_ids, exact_ids, exact_scores, tolerance)

    clear = selection_is_clear(exact_scores, exact_ids, sink, recent, shape.page_size, exact.seq_lens, tolerance)
    expected = reference.sparse_decode_attention(
        exact.query,
        exact.k_cache,
        exact.v_cache,
        exact.block_table,
        exact.seq_lens,
        exact_ids,
        exact_counts,
        page_size=shape.page_size,
    )
    clear = clear.repeat_interleave(shape.num_heads // clear.size(1), 1)
    actual = quest(case, budget, sink, recent, head_reduction, bound=bound, page_budgets=page_budgets)
    assert_attention_close(*actual, *expected, where=clear)
    return clear.float().mean() if clear.numel() else 1.0


@given(data=st.data())
def test_quest_attention_equals_its_three_steps(device, data):
    shape = data.draw(shapes(device, page_size=data.draw(st.sampled_from([4, 8, 16, 32]))))
    sink, recent = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    budget = sink + recent + data.draw(st.integers(1, 12))
    head_reduction = data.draw(st.sampled_from(HEAD_REDUCTIONS))
    page_budgets = None
    if data.draw(st.booleans()):
        heads = shape.num_heads if head_reduction == "none" else shape.kv_heads
        size = data.draw(st.sampled_from([(shape.num_rows,), (shape.num_rows, heads)]))
        page_budgets = torch.randint(0, budget + 2, size, generator=shape.generator(4), dtype=torch.int32).to(device)
    assert_equals_composition(build(shape, device), shape, budget, sink, recent, head_reduction, page_budgets)


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_instantiation(device, head_dim, head_reduction, metadata_dtype):
    clear = []
    for i, group in enumerate(GROUPS):
        for dtype in dtypes(device):
            sizes = (300, 121), 40, PAGE_SIZES[i % 3], 2, 1 + i % 3, 2, group, head_dim, dtype
            shape = Shape(*sizes, seed=i, metadata_dtype=metadata_dtype)
            clear.append(assert_equals_composition(build(shape, device), shape, 6, 1, 2, head_reduction))
    assert sum(clear) / len(clear) > 0.9, "too few selections are far from a tie to say anything"


@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_a_covering_budget_equals_dense(device, head_reduction):
    for rows_per_request in (1, 3):
        shape = Shape((500, 33, 0), 40, 16, 1, rows_per_request, group=4, head_dim=128)
        case = build(shape, device)
        expected = [x.cpu().double() for x in dense(case, shape)]
        for budget in (32, 40, 300):
            assert_attention_close(*quest(case, budget, head_reduction=head_reduction), *expected)


@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
@pytest.mark.parametrize("group", GROUPS)
def test_equal_pages_tie_to_the_earlier(device, head_reduction, group):
    """All pages hold the same keys but other values: whatever the arithmetic, the first ones are chosen."""
    for dtype in dtypes(device):
        shape = Shape((60 * 16,), 60, group=group, head_dim=128, dtype=dtype)
        page = torch.randn(16, shape.kv_heads, 128, generator=shape.generator(8))
        case = build(shape, device, keys=[page.repeat(60, 1, 1)])
        for budget, sink, recent in ((12, 1, 2), (7, 0, 1), (33, 3, 4)):
            first = list(range(budget - recent)) + list(range(60 - recent, 60))
            page_ids = torch.tensor(first, dtype=torch.int32).view(1, 1, -1)
            exact = case.exact()
            expected = reference.sparse_decode_attention(
                exact.query, exact.k_cache, exact.v_cache, exact.block_table, exact.seq_lens, page_ids
            )
            assert_attention_close(*quest(case, budget, sink, recent, head_reduction), *expected)


def test_the_matching_page_is_found(device):
    """A key along the query, deep in the context, dominates the answer although the budget is 5 of 64 pages."""
    shape = Shape((1024,), 64, group=2, head_dim=128)
    case = build(shape, device)
    for head in range(shape.kv_heads):
        page, offset = 20 + 11 * head, 3 + head
        block = int(case.block_table[0, page])
        query = case.query[0, 2 * head]
        case.query[0, 2 * head + 1] = query
        case.k_cache[block, offset, head] = 4 * query
        case.v_cache[block, offset, head] = head + 1
    starts = torch.zeros_like(case.request_lens)
    quest_ops.update_page_metadata(case.k_cache, case.page_metadata, case.block_table, case.request_lens, starts)
    out, _ = quest(case, 5)
    expected = torch.tensor([1.0, 1.0, 2.0, 2.0], device=device)[None, :, None].expand_as(out)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_pages_that_are_not_selected_are_not_read(device):
    shape = Shape((640,), 40, kv_heads=1, group=4, head_dim=128)
    case = build(shape, device)
    expected = quest(case, 8)
    assert not expected[0].isnan().any()
    exact = case.exact()
    scores = reference.estimate_page_scores(
        exact.query, exact.page_metadata, exact.block_table, exact.seq_lens, 16, "max"
    )
    page_ids, _ = reference.select_topk_pages(scores, exact.seq_lens, 16, 8, 1, 2)
    unread = case.block_table[0, [i for i in range(40) if i not in page_ids[0, 0].tolist()]].long()
    case.k_cache[unread] = torch.nan
    case.v_cache[unread] = torch.nan
    for a, e in zip(quest(case, 8), expected, strict=True):
        assert_same_bits(a, e)


def test_a_page_of_unknown_bounds_is_kept(device):
    """NaN metadata ranks first: the page is attended within the budget, and its keys need not be NaN."""
    shape = Shape((640,), 40, head_dim=128)
    case = build(shape, device)
    case.page_metadata[int(case.block_table[0, 17])] = torch.nan
    exact = case.exact()
    page_ids = torch.tensor([[[0, 17, 38, 39]]], dtype=torch.int32)
    expected = reference.sparse_decode_attention(
        exact.query, exact.k_cache, exact.v_cache, exact.block_table, exact.seq_lens, page_ids
    )
    assert_attention_close(*quest(case, 4, 1, 2), *expected)


def test_a_nan_key_reaches_the_output(device):
    shape = Shape((640,), 40, kv_heads=1, head_dim=128)
    case = build(shape, device)
    case.k_cache[int(case.block_table[0, 17]), 5, 0, 100] = torch.nan
    starts = torch.zeros_like(case.request_lens)
    quest_ops.update_page_metadata(case.k_cache, case.page_metadata, case.block_table, case.request_lens, starts)
    assert quest(case, 4, 1, 2)[0].isnan().all()


def test_empty_slots_give_zero_and_minus_infinity(device):
    shape = Shape((0, 400, 0), 25, rows_per_request=2)
    case = build(shape, device)
    out, lse = quest(case, 4)
    assert (out[[0, 1, 4, 5]] == 0).all() and (lse[[0, 1, 4, 5]] == -torch.inf).all()
    assert lse[2:4].isfinite().all()


def test_every_layout_gives_the_same_bits(device):
    for head_dim in HEAD_DIMS:
        results = []
        for layout in LAYOUTS:
            shape = Shape((600, 21), 20, 16, 2, 1, 2, 3, head_dim, layout=layout)
            results.append(quest(build(shape, device), 6))
        for result in results[1:]:
            for a, e in zip(result, results[0], strict=True):
                assert_same_bits(a, e)


def test_metadata_may_be_one_layer_of_a_larger_tensor(device):
    shape = Shape((600, 21), 20, 16, 2, head_dim=128)
    case = build(shape, device)
    expected = quest(case, 6)
    larger = torch.full((shape.num_blocks, 3, *case.page_metadata.shape[1:]), torch.nan, dtype=shape.dtype)
    larger = larger.to(device)
    larger[:, 1] = case.page_metadata
    case.page_metadata = larger[:, 1]
    for a, e in zip(quest(case, 6), expected, strict=True):
        assert_same_bits(a, e)


def test_out_and_lse_are_written_in_place(device):
    shape = Shape((600, 21, 0), 40)
    case = build(shape, device)
    expected = quest(case, 6)
    out, lse = torch.full_like(expected[0], torch.nan), torch.full_like(expected[1], torch.nan)
    returned = quest(case, 6, out=out, lse=lse)
    assert returned[0] is out and returned[1] is lse
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
    assert_same_bits(quest(case, 6, out=out.zero_())[1], expected[1])
    assert_same_bits(quest(case, 6, lse=lse.zero_())[0], expected[0])


def test_one_million_tokens(device):
    """65,536 pages: against the twins, and the same after everything outside the selection is NaN."""
    shape = Shape((2**20 - 5,), 2**16, kv_heads=1, group=2, head_dim=64)
    case = build(shape, device)
    assert assert_equals_composition(case, shape, 128, 1, 4, "max") == 1.0


def test_offsets_into_a_pool_are_64_bit(device):
    """A pool of more than 2^31 elements, of which the blocks at its two ends are used."""
    shape = Shape((80, 75), 5, 16, 2, head_dim=256)
    small = build(shape, device)
    block_elements = 2 * shape.block_size * shape.kv_heads * shape.head_dim
    num_blocks = 2**31 // block_elements + 2 * shape.num_blocks
    # Left uninitialised: on a CPU only the touched blocks take memory.
    pool = torch.empty(num_blocks, 2, *small.k_cache.shape[1:], dtype=shape.dtype, device=device)
    metadata = torch.empty(num_blocks, *small.page_metadata.shape[1:], dtype=shape.dtype, device=device)
    moved = torch.arange(shape.num_blocks, device=device)
    moved = torch.where(moved % 2 == 0, moved, num_blocks - 1 - moved)
    k_cache, v_cache = pool.unbind(1)
    k_cache[moved], v_cache[moved], metadata[moved] = torch.nan, torch.nan, torch.nan
    used = small.block_table >= 0
    used &= small.block_table < shape.num_blocks
    block_table = torch.where(used, moved[small.block_table.clamp(0, shape.num_blocks - 1).long()], 2**30).int()
    large = dataclasses.replace(
        small, k_cache=k_cache, v_cache=v_cache, page_metadata=metadata, block_table=block_table
    )
    for b, length in enumerate(shape.lengths):
        tokens = torch.arange(length, device=device)
        blocks, offsets = tokens // shape.block_size, tokens % shape.block_size
        from_blocks, to_blocks = small.block_table[b, blocks].long(), block_table[b, blocks].long()
        keys, values = small.k_cache[from_blocks, offsets], small.v_cache[from_blocks, offsets]
        quest_ops.append_paged_kv(keys, values, k_cache, v_cache, metadata, to_blocks * shape.block_size + offsets)
    for a, e in zip(quest(large, 4) + dense(large, shape), quest(small, 4) + dense(small, shape), strict=True):
        assert_same_bits(a, e)


def test_no_rows_and_no_blocks_are_empty_batches(device):
    shape = Shape((600, 21), 40)
    case = build(shape, device)
    none = dataclasses.replace(case, query=case.query[:0], block_table=case.block_table[:0], seq_lens=case.seq_lens[:0])
    for out, lse in (quest(none, 6), dense(none, shape)):
        assert out.shape == (0, shape.num_heads, shape.head_dim) and lse.shape == (0, shape.num_heads)
    none = dataclasses.replace(case, block_table=case.block_table[:, :0])
    for out, lse in (quest(none, 6), dense(none, shape)):
        assert (out == 0).all() and (lse == -torch.inf).all()
    scores = quest_ops.estimate_page_scores(none.query, none.page_metadata, none.block_table, none.seq_lens, 16, "max")
    assert scores.shape == (2, shape.kv_heads, 0)
    page_ids, page_counts = quest_ops.select_topk_pages(scores, none.seq_lens, 16, 6, 1, 2)
    assert (page_ids == -1).all() and (page_counts == 0).all()


def test_any_stride_that_the_ops_allow_gives_the_same_bits(device):
    """A block table cut from a wider one, outputs inside larger tensors, one table or query expanded to all rows."""
    shape = Shape((600, 590), 40, group=3, head_dim=128)
    case = build(shape, device)
    expected = quest(case, 6)
    wider = torch.full((2, 100), 2**30, dtype=torch.int32, device=device)
    wider[:, 30:70] = case.block_table
    out = torch.zeros(shape.num_heads, 2, 3, 128, dtype=shape.dtype, device=device)[:, :, 1].transpose(0, 1)
    lse = torch.zeros(2, shape.num_heads, device=device)
    quest(dataclasses.replace(case, block_table=wider[:, 30:70]), 6, out=out, lse=lse)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
    query, block_table = case.query[:1].expand_as(case.query), case.block_table[:1].expand_as(case.block_table)
    expanded = dataclasses.replace(case, query=query, block_table=block_table)
    contiguous = dataclasses.replace(case, query=query.contiguous(), block_table=block_table.contiguous())
    for a, e in zip(quest(expanded, 6), quest(contiguous, 6), strict=True):
        assert_same_bits(a, e)

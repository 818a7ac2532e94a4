"""sparse_decode_attention: exact softmax attention over the listed pages, and over nothing else."""

import pytest
import torch
from cases import (
    GROUPS,
    HEAD_DIMS,
    LAYOUTS,
    PAGE_SIZES,
    Shape,
    assert_attention_close,
    assert_same_bits,
    build,
    dtypes,
    random_page_ids,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference


def attend(case, shape, page_ids=None, page_counts=None, op=quest_ops.sparse_decode_attention, **options):
    inputs = case.query, case.k_cache, case.v_cache, case.block_table, case.seq_lens
    return op(*inputs, page_ids, page_counts, page_size=shape.page_size, **options)


def assert_attends_as_twin(case, shape, page_ids=None, page_counts=None, **options):
    actual = attend(case, shape, page_ids, page_counts, **options)
    on_cpu = [None if x is None else x.cpu() for x in (page_ids, page_counts)]
    exact = attend(case.exact(), shape, *on_cpu, op=reference.sparse_decode_attention, **options)
    assert_attention_close(*actual, *exact)


@given(data=st.data())
def test_dense_attention_is_its_twin(device, data):
    shape = data.draw(shapes(device))
    assert_attends_as_twin(build(shape, device), shape)


@given(data=st.data())
def test_sparse_attention_is_its_twin(device, data):
    shape = data.draw(shapes(device))
    heads = data.draw(st.sampled_from([1, shape.kv_heads, shape.num_heads]))
    page_ids, page_counts = random_page_ids(shape, heads, data.draw(st.integers(1, 20)), device)
    page_counts = data.draw(st.sampled_from([page_counts, None]))
    sm_scale = data.draw(st.sampled_from([None, 0.05, 1.0]))
    assert_attends_as_twin(build(shape, device), shape, page_ids, page_counts, sm_scale=sm_scale)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_instantiation(device, head_dim, group):
    for i, dtype in enumerate(dtypes(device)):
        for rows_per_request in (1, 4):
            shape = Shape((300, 21), 24, 16, 2, rows_per_request, 2, group, head_dim, dtype, seed=i)
            case = build(shape, device)
            assert_attends_as_twin(case, shape)
            assert_attends_as_twin(case, shape, *random_page_ids(shape, shape.kv_heads, 8, device))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("pages_per_block", range(1, 9))
def test_every_page_and_block_size(device, page_size, pages_per_block):
    capacity = 3 * page_size * pages_per_block
    shape = Shape((capacity, capacity // 2 + 1), 3, page_size, pages_per_block)
    case = build(shape, device)
    assert_attends_as_twin(case, shape)
    assert_attends_as_twin(case, shape, *random_page_ids(shape, shape.kv_heads, 4, device))


def test_page_size_defaults_to_the_block(device):
    shape = Shape((150, 33), 12)
    case = build(shape, device)
    page_ids, page_counts = random_page_ids(shape, 2, 4, device)
    inputs = case.query, case.k_cache, case.v_cache, case.block_table, case.seq_lens, page_ids, page_counts
    for a, e in zip(
        quest_ops.sparse_decode_attention(*inputs), attend(case, shape, page_ids, page_counts), strict=True
    ):
        assert_same_bits(a, e)


def test_every_page_listed_equals_dense(device):
    for rows_per_request in (1, 3):
        shape = Shape((500, 33, 0), 40, rows_per_request=rows_per_request, group=4, head_dim=128)
        case = build(shape, device)
        page_ids = torch.arange(40, dtype=torch.int32, device=device).expand(shape.num_rows, 1, 40).contiguous()
        counts = ((case.seq_lens + 15) // 16)[:, None].contiguous()
        sparse, dense = attend(case, shape, page_ids, counts), attend(case, shape)
        assert_attention_close(*sparse, *(x.cpu().double() for x in dense))


def test_the_last_page_is_attended_once_whether_listed_or_not(device):
    shape = Shape((150,), 12)  # 10 pages
    case = build(shape, device)
    lists = torch.tensor([[2, 5, -1, -1], [2, 5, 9, -1]], dtype=torch.int32, device=device)
    unlisted, listed = (attend(case, shape, ids.view(1, 1, 4)) for ids in lists)
    exact = attend(case.exact(), shape, lists[1:].cpu().view(1, 1, 4), op=reference.sparse_decode_attention)
    assert_attention_close(*unlisted, *exact)
    assert_attention_close(*listed, *exact)


def test_an_empty_list_attends_the_last_page_alone(device):
    shape = Shape((150, 33), 12)
    case = build(shape, device)
    page_ids = torch.full((2, 2, 3), -1, dtype=torch.int32, device=device)
    assert_attends_as_twin(case, shape, page_ids)
    page_ids.fill_(1)
    assert_attends_as_twin(case, shape, page_ids, torch.zeros(2, 2, dtype=torch.int32, device=device))


def test_a_selection_may_be_reused_after_the_length_changed(device):
    """Later steps add the page being written; after a rollback, pages past the last one hold no token of the row."""
    shape = Shape((180,), 12)  # 12 pages
    case = build(shape, device)
    page_ids = torch.tensor([[[0, 3, 6, 8]]], dtype=torch.int32, device=device)
    for length in (180, 144, 140, 129, 112, 100, 49, 20, 1):
        case.seq_lens.fill_(length)
        assert_attends_as_twin(case, shape, page_ids)


def test_entries_past_the_count_are_not_followed(device):
    shape = Shape((150, 33), 12)
    case = build(shape, device)
    page_ids, page_counts = random_page_ids(shape, 2, 6, device)
    expected = attend(case, shape, page_ids, page_counts)
    past = torch.arange(6, device=device) >= page_counts[..., None]
    for a, e in zip(attend(case, shape, page_ids.masked_fill(past, 2**30), page_counts), expected, strict=True):
        assert_same_bits(a, e)


def test_pages_that_are_not_listed_are_not_read(device):
    shape = Shape((320,), 20, group=4, head_dim=128)
    case = build(shape, device)
    page_ids = torch.tensor([[[0, 7, 13]]], dtype=torch.int32, device=device)
    expected = attend(case, shape, page_ids)
    unlisted = case.block_table[0, [i for i in range(19) if i not in (0, 7, 13)]].long()
    case.k_cache[unlisted] = torch.nan
    case.v_cache[unlisted] = torch.nan
    for a, e in zip(attend(case, shape, page_ids), expected, strict=True):
        assert_same_bits(a, e)
    assert not expected[0].isnan().any()


@pytest.mark.parametrize("length", [1, 5, 15, 17])
def test_tokens_past_the_length_are_not_read(device, length):
    """NaN right behind a row's last token, in its own page, for keys and for values."""
    shape = Shape((64,), 4, head_dim=128)
    case = build(shape, device)
    case.seq_lens.fill_(length)
    expected = attend(case, shape)
    tokens = torch.arange(length, 64, device=device)
    blocks, offsets = case.block_table[0, tokens // 16].long(), tokens % 16
    case.k_cache[blocks, offsets] = torch.nan
    case.v_cache[blocks, offsets] = torch.nan
    for a, e in zip(attend(case, shape), expected, strict=True):
        assert_same_bits(a, e)
    assert not expected[0].isnan().any()


def test_empty_slots_give_zero_and_minus_infinity(device):
    shape = Shape((0, 40, 0), 4)
    case = build(shape, device)
    page_ids = torch.zeros(3, 1, 2, dtype=torch.int32, device=device)
    for out, lse in (attend(case, shape), attend(case, shape, page_ids)):
        for empty in (0, 2):
            assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
        assert lse[1].isfinite().all()
    case.seq_lens[0] = -3
    assert (attend(case, shape)[1][0] == -torch.inf).all()


def test_one_token_returns_its_value(device):
    for dtype in dtypes(device):
        shape = Shape((1,), 1, group=3, head_dim=128, dtype=dtype)
        case = build(shape, device)
        value = case.v_cache[int(case.block_table[0, 0]), 0].repeat_interleave(3, 0)
        torch.testing.assert_close(attend(case, shape)[0][0], value, rtol=1e-6, atol=0)


def test_lengths_clamp_to_the_table(device):
    shape = Shape((192, 192), 12)
    case = build(shape, device)
    expected = attend(case, shape)
    case.seq_lens.fill_(2**31 - 1)
    for a, e in zip(attend(case, shape), expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_layout_gives_the_same_bits(device, head_dim):
    for dtype in dtypes(device):
        for kv_heads in (1, 3):
            results = []
            for layout in LAYOUTS:
                shape = Shape((300, 21), 12, 16, 2, 1, kv_heads, 3, head_dim, dtype, layout)
                case = build(shape, device)
                ids = random_page_ids(shape, kv_heads, 6, device)
                results.append(attend(case, shape) + attend(case, shape, *ids))
            for result in results[1:]:
                for a, e in zip(result, results[0], strict=True):
                    assert_same_bits(a, e)


def test_large_logits_neither_overflow_nor_vanish(device):
    for dtype in dtypes(device):
        shape = Shape((200,), 16, dtype=dtype)
        case = build(shape, device)
        case.query *= 30
        assert_attends_as_twin(case, shape)
        assert_attends_as_twin(case, shape, *random_page_ids(shape, 2, 5, device))
        case.query *= 0
        assert_attends_as_twin(case, shape)


def test_minus_infinity_logits_weigh_nothing(device):
    """A whole page of them comes before the rest: a running maximum must not turn -inf - -inf into NaN."""
    shape = Shape((200,), 16, kv_heads=1)
    case = build(shape, device)
    case.query.abs_()
    case.k_cache[case.block_table[0, :3].long()] = -torch.inf
    out, lse = attend(case, shape)
    listed = torch.arange(3, 13, dtype=torch.int32, device=device).view(1, 1, -1)
    expected = attend(case.exact(), shape, listed.cpu(), op=reference.sparse_decode_attention)
    assert_attention_close(out, lse, *expected)


def test_out_and_lse_are_written_in_place(device):
    for dtype in dtypes(device):
        shape = Shape((150, 33, 0), 12, dtype=dtype)
        case = build(shape, device)
        page_ids, page_counts = random_page_ids(shape, 2, 4, device)
        expected = attend(case, shape, page_ids, page_counts)
        out = torch.full_like(expected[0], torch.nan)
        lse = torch.full_like(expected[1], torch.nan)
        returned = attend(case, shape, page_ids, page_counts, out=out, lse=lse)
        assert returned[0] is out and returned[1] is lse
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])
        assert_same_bits(attend(case, shape, page_ids, page_counts, out=out.zero_())[1], expected[1])
        assert_same_bits(attend(case, shape, page_ids, page_counts, lse=lse.zero_())[0], expected[0])


def test_sequences_may_share_blocks(device):
    shape = Shape((96, 90), 6)
    case = build(shape, device)
    case.block_table[1] = case.block_table[0]
    assert_attends_as_twin(case, shape)


@pytest.mark.parametrize("tokens", [100_000])
def test_long_contexts(device, tokens):
    shape = Shape((tokens,), -(-tokens // 16), kv_heads=1, group=3)
    case = build(shape, device)
    assert_attends_as_twin(case, shape)
    assert_attends_as_twin(case, shape, *random_page_ids(shape, 1, 128, device))

"""estimate_page_scores: a true upper bound of q . k over each page, -inf past the last one."""

import pytest
import torch
from cases import (
    BOUNDS,
    FP8,
    GROUPS,
    HEAD_DIMS,
    HEAD_REDUCTIONS,
    METADATA_DTYPES,
    PAGE_SIZES,
    PRINCIPAL,
    Shape,
    assert_same_bits,
    build,
    dtypes,
    fill_nan,
    numbers_of,
    pages_of_rows,
    score_tolerance,
    set_nan,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference

SLACK = 1e-5  # rounding of the score, relative to the largest sum of the magnitudes of q . k's terms


def scores_of(case, shape, head_reduction, op=quest_ops.estimate_page_scores):
    inputs = case.query, case.page_metadata, case.block_table, case.seq_lens
    return op(*inputs, shape.page_size, head_reduction, bound=shape.bound[0])


def assert_scores_are_the_twins(case, shape, head_reduction):
    scores = scores_of(case, shape, head_reduction)
    exact_case = case.exact()
    exact = scores_of(exact_case, shape, head_reduction, reference.estimate_page_scores)
    assert scores.dtype == torch.float32 and scores.shape == exact.shape
    within = exact.isfinite()
    assert torch.equal(scores.cpu() == -torch.inf, ~within)
    off = (scores.cpu().double() - exact).abs()
    tolerance = score_tolerance(exact_case, shape.page_size, head_reduction)
    assert (off <= tolerance)[within].all(), f"off by {(off - tolerance)[within].max():g} more than rounding"


@given(data=st.data())
def test_scores_are_the_twins(device, data):
    shape = data.draw(shapes(device))
    head_reduction = data.draw(st.sampled_from(HEAD_REDUCTIONS))
    assert_scores_are_the_twins(build(shape, device), shape, head_reduction)


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_instantiation(device, head_dim, head_reduction, metadata_dtype):
    for i, group in enumerate(GROUPS):
        for dtype in dtypes(device):
            sizes = (300, 21), 40, PAGE_SIZES[i % 3], 2, 3, 2, group, head_dim, dtype
            for bound in (BOUNDS[0], PRINCIPAL):
                shape = Shape(*sizes, seed=i, metadata_dtype=metadata_dtype, bound=bound)
                assert_scores_are_the_twins(build(shape, device), shape, head_reduction)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("pages_per_block", range(1, 9))
def test_every_page_and_block_size(device, page_size, pages_per_block):
    capacity = 3 * page_size * pages_per_block
    for metadata_dtype in METADATA_DTYPES:
        lengths = capacity, capacity // 2 + 1
        shape = Shape(lengths, 3, page_size, pages_per_block, metadata_dtype=metadata_dtype)
        assert_scores_are_the_twins(build(shape, device), shape, "max")


def test_every_8_bit_number_is_read_exactly(device):
    """Subnormals and NaN too: a query of one channel scores that channel's bound."""
    bounds = torch.arange(256, dtype=torch.uint8).view(FP8).to(device)
    for dtype in dtypes(device):
        for channel in (0, 9, 23, 63):
            for sign in (-1, 1):
                metadata = torch.zeros(256, 1, 2, 64, device=device).to(FP8)
                metadata[:, 0, (sign + 1) // 2, channel] = bounds
                query = torch.zeros(1, 1, 64, dtype=dtype, device=device)
                query[..., channel] = sign
                table = torch.arange(256, dtype=torch.int32, device=device)[None]
                lens = torch.tensor([256 * 8], dtype=torch.int32, device=device)
                scores = quest_ops.estimate_page_scores(query, metadata, table, lens, 8, "max")
                assert_same_bits(scores[0, 0], sign * bounds.float() + 0.0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_4_bit_code_and_scale_is_read_exactly(device, head_dim):
    """Subnormal scales and NaN too: a query of one channel scores that channel's number."""
    generator = torch.Generator().manual_seed(head_dim)
    scales = torch.cat([torch.arange(0x7C00), torch.tensor([0x7E00])]).short().view(torch.float16)
    scales = scales[torch.randperm(len(scales), generator=generator)]
    codes = torch.randint(1, 16, (2, len(scales), head_dim), generator=generator)
    pages = torch.cat([(codes[0] | codes[1] << 4).to(torch.uint8), torch.zeros(len(scales), head_dim // 8).byte()], -1)
    pages[:, head_dim:].view(torch.float16)[:] = scales[:, None]
    table = torch.arange(len(scales), dtype=torch.int32, device=device)[None]
    lens = torch.tensor([len(scales) * 8], dtype=torch.int32, device=device)
    numbers = numbers_of(pages)
    for dtype in dtypes(device):
        for channel in (0, 9, 23, head_dim - 1):
            for sign in (-1, 1):
                query = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
                query[..., channel] = sign
                inputs = query, pages[:, None, None].to(device), table, lens, 8, "max"
                scores = quest_ops.estimate_page_scores(*inputs)
                expected = sign * numbers[:, (sign + 1) // 2, channel] + 0.0
                assert_same_bits(scores[0, 0], expected)
                scores = quest_ops.estimate_page_scores(*inputs, bound="principal")
                assert_same_bits(scores[0, 0], (sign * numbers[:, :, channel] + 0.0).amax(1))


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_bound_really_bounds(device, head_dim, metadata_dtype):
    for dtype in dtypes(device):
        shape = Shape((500, 77), 32, group=3, head_dim=head_dim, dtype=dtype, metadata_dtype=metadata_dtype)
        # Up to 448 and down to 8-bit subnormals.
        scale = torch.logspace(-4, 2, head_dim)
        keys = [torch.randn(n, 2, head_dim, generator=shape.generator(n)).clamp(-4.4, 4.4) for n in shape.lengths]
        case = build(shape, device, [scale * k for k in keys])
        scores = scores_of(case, shape, "none").cpu().double()
        exact = case.exact()
        for r, length in enumerate(shape.lengths):
            tokens = torch.arange(length)
            keys = exact.k_cache[exact.block_table[r, tokens // 16].long(), tokens % 16]  # [length, Hkv, D]
            keys = keys.repeat_interleave(shape.group, 1)
            logits = torch.einsum("hd,thd->ht", exact.query[r], keys)
            slack = SLACK * torch.einsum("hd,thd->ht", exact.query[r].abs(), keys.abs()).max()
            for page in range(-(-length // 16)):
                best = logits[:, page * 16 : page * 16 + 16].amax(1)
                assert (scores[r, :, page] >= best - slack).all()


def test_a_page_of_one_key_scores_its_logit(device):
    """The bound is tight where a page holds one token."""
    shape = Shape((1,), 1, 16, group=4, head_dim=128)
    case = build(shape, device)
    exact = case.exact()
    key = exact.k_cache[int(case.block_table[0, 0]), 0].repeat_interleave(4, 0)
    scores = scores_of(case, shape, "none").cpu().double()
    torch.testing.assert_close(scores[0, :, 0], (exact.query[0] * key).sum(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_a_page_of_nan_metadata_scores_nan(device, metadata_dtype):
    for head_reduction in HEAD_REDUCTIONS:
        shape = Shape((200,), 16, 16, group=4, metadata_dtype=metadata_dtype)
        case = build(shape, device)
        fill_nan(case.page_metadata[int(case.block_table[0, 3])])
        nan = scores_of(case, shape, head_reduction).isnan()
        assert nan[..., 3].all() and nan.sum() == nan[..., 3].numel()


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bound", [BOUNDS[0], PRINCIPAL])
def test_one_nan_survives_the_reduction(device, bound, group, metadata_dtype):
    """A NaN in one channel of a key, or in one head of a group, whatever the other terms and heads are."""
    for head_reduction in HEAD_REDUCTIONS:
        shape = Shape((200,), 16, 16, group=group, metadata_dtype=metadata_dtype, bound=bound)
        case = build(shape, device)
        case.query[:, :, 5] = 0.0  # a product with zero must not hide it
        set_nan(case.page_metadata, int(case.block_table[0, 3]), 0, 5)
        nan = scores_of(case, shape, head_reduction).isnan()
        of_head = nan.size(1) // shape.kv_heads
        assert nan[:, :of_head, 3].all() and nan.sum() == of_head
        if head_reduction != "none":
            case = build(shape, device)
            case.query[0, group - 1, 11] = torch.nan
            nan = scores_of(case, shape, head_reduction).isnan()
            assert nan[0, 0, :13].all() and nan.sum() == 13


def test_metadata_without_parts_means_one_page_a_block(device):
    shape = Shape((150, 33), 12)
    case = build(shape, device)
    expected = scores_of(case, shape, "max")
    case.page_metadata = case.page_metadata.squeeze(2)
    assert_same_bits(scores_of(case, shape, "max"), expected)


def test_lengths_clamp_to_the_table(device):
    shape = Shape((192, 192), 12)
    case = build(shape, device)
    expected = scores_of(case, shape, "max")
    case.seq_lens.fill_(2**31 - 1)
    assert_same_bits(scores_of(case, shape, "max"), expected)
    case.seq_lens.fill_(-5)
    assert (scores_of(case, shape, "max") == -torch.inf).all()


def test_rows_of_a_request_see_their_own_lengths(device):
    shape = Shape((130, 7, 0), 12, rows_per_request=8)
    case = build(shape, device)
    finite = scores_of(case, shape, "none").isfinite().sum(-1)
    expected = torch.tensor(pages_of_rows(case.seq_lens, 16), device=finite.device)
    assert torch.equal(finite, expected[:, None].expand_as(finite))


def test_a_contiguous_query_gives_the_same_bits_as_a_slice(device):
    shape = Shape((150, 33), 12, group=3)
    case = build(shape, device)
    assert not case.query.is_contiguous()
    expected = scores_of(case, shape, "mean")
    case.query = case.query.contiguous()
    assert_same_bits(scores_of(case, shape, "mean"), expected)


def test_points_score_as_the_better_one(device):
    """Whatever the sign of the query: of keys on a line through their mean, both sides are known."""
    keys = torch.tensor([2.0, 4.0] * 8)[:, None, None] * torch.ones(1, 1, 64)
    shape = Shape((16,), 1, 16, kv_heads=1, group=2, bound=PRINCIPAL)
    case = build(shape, device, [keys])
    case.query[0, 0], case.query[0, 1] = 0.5, -0.5
    deviation = 0.5**0.25  # half of them deviate by 1 to that side
    expected = [0.5 * 64 * (3 + deviation), -0.5 * 64 * (3 - deviation)]
    assert scores_of(case, shape, "none").flatten().tolist() == pytest.approx(expected, rel=1e-3)
    assert scores_of(case, shape, "max").item() == pytest.approx(expected[0], rel=1e-3)
    assert scores_of(case, shape, "mean").item() == pytest.approx(sum(expected) / 2, abs=0.1)

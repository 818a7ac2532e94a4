"""update_page_metadata: the bounds of keys that other code wrote, with append's bits."""

import pytest
import torch
from cases import (
    BOUNDS,
    FP8,
    HEAD_DIMS,
    INT4,
    LAYOUTS,
    METADATA_DTYPES,
    Shape,
    assert_same_bits,
    build,
    dtypes,
    make_block_table,
    make_metadata,
    numbers_of,
    shapes,
    slots_of,
)
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference
from quest_ops.config import metadata_shape


def update(case, page_metadata, start_lens, request_lens=None, **bound):
    lens = case.request_lens if request_lens is None else request_lens
    quest_ops.update_page_metadata(case.k_cache, page_metadata, case.block_table, lens, start_lens, **bound)


@given(data=st.data())
def test_update_is_its_twin_and_leaves_earlier_pages(device, data):
    shape = data.draw(shapes(device))
    case = build(shape, device)
    starts = [data.draw(st.integers(0, length + 20)) for length in shape.lengths]
    starts = torch.tensor(starts, dtype=torch.int32)
    metadata, expected = make_metadata(shape, device).fill_(3), make_metadata(shape, "cpu").fill_(3)
    update(case, metadata, starts.to(device), **shape.bound_options)
    host = case.on("cpu")
    tables = host.block_table, host.request_lens
    reference.update_page_metadata(host.k_cache, expected, *tables, starts, **shape.bound_options)
    assert_same_bits(metadata, expected)


def test_update_covers_only_pages_that_hold_a_token_of_the_span(device):
    shape = Shape((40,), 4)  # pages 0..2 of 16 tokens
    case = build(shape, device)
    blocks = make_block_table(shape)[0].tolist()
    for start, updated in [(0, {0, 1, 2}), (15, {0, 1, 2}), (16, {1, 2}), (39, {2}), (40, set()), (1000, set())]:
        metadata = make_metadata(shape, device).fill_(7)
        update(case, metadata, torch.tensor([start], dtype=torch.int32, device=device))
        touched = {i for i, block in enumerate(blocks) if not (metadata[block] == 7).all()}
        assert touched == updated
        others = [b for b in range(shape.num_blocks) if b not in blocks]
        assert (metadata[others] == 7).all()


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size, pages_per_block", [(4, 8), (8, 8), (16, 3), (128, 1)])
@pytest.mark.parametrize("bound", BOUNDS[:3])
def test_update_equals_append(device, layout, page_size, pages_per_block, metadata_dtype, bound):
    sizes = {"lengths": (300, 129), "max_blocks": 10, "page_size": page_size, "pages_per_block": pages_per_block}
    for dtype in dtypes(device):
        shape = Shape(**sizes, head_dim=128, dtype=dtype, layout=layout, metadata_dtype=metadata_dtype, bound=bound)
        case = build(shape, device)
        updated, appended = make_metadata(shape, device), make_metadata(shape, device)
        update(case, updated, torch.zeros_like(case.request_lens), **shape.bound_options)
        for b, length in enumerate(shape.lengths):
            slots = slots_of(make_block_table(shape), b, 0, length, shape.block_size).to(device)
            keys = case.k_cache[slots // shape.block_size, slots % shape.block_size]
            values = case.v_cache[slots // shape.block_size, slots % shape.block_size]
            caches = case.k_cache, case.v_cache, appended
            quest_ops.append_paged_kv(keys, values, *caches, slots, **shape.bound_options)
        assert_same_bits(updated, appended)


def test_lengths_clamp_to_the_table(device):
    shape = Shape((64,), 4)
    case = build(shape, device)
    expected, metadata = make_metadata(shape, device), make_metadata(shape, device)
    starts = torch.zeros_like(case.request_lens)
    update(case, expected, starts)
    update(case, metadata, starts, torch.full_like(case.request_lens, 2**31 - 1))
    assert_same_bits(metadata, expected)


def test_requests_may_share_blocks(device):
    shape = Shape((48, 48), 3)
    case = build(shape, device)
    case.block_table[1] = case.block_table[0]
    metadata = make_metadata(shape, device)
    update(case, metadata, torch.zeros_like(case.request_lens))
    blocks = case.block_table[0].long()
    assert_same_bits(metadata[blocks], case.page_metadata[blocks])


def test_metadata_without_parts_means_one_page_a_block(device):
    shape = Shape((50,), 4)
    case = build(shape, device)
    metadata = make_metadata(shape, device).squeeze(2)
    update(case, metadata, torch.zeros_like(case.request_lens))
    assert_same_bits(metadata, case.page_metadata.squeeze(2))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_nan_keys_stay_nan_in_their_channel(device, metadata_dtype, bound):
    shape = Shape((48,), 3, metadata_dtype=metadata_dtype, bound=bound)
    case = build(shape, device)
    block = int(case.block_table[0, 1])
    case.k_cache[block, 5, 1, 9] = torch.nan
    metadata = make_metadata(shape, device)
    update(case, metadata, torch.zeros_like(case.request_lens), **shape.bound_options)
    numbers = numbers_of(metadata)
    assert numbers[block, 1, 0, :, 9].isnan().all()
    # An axis is of all channels, a scale of 32.
    unknown = 2 * 64 if bound[0] == "principal" else 2 * 32 if metadata_dtype == INT4 else 2
    assert numbers[case.block_table[0].long()].isnan().sum() == unknown


def every_number(dtype):
    """Finite, infinite or NaN: all those of a 16-bit dtype; of float32 those beside an 8-bit number and many others."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
    fits = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    infinity = torch.tensor(torch.inf)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**15,), generator=torch.Generator().manual_seed(0))
    return torch.cat([fits, fits.nextafter(infinity), fits.nextafter(-infinity), bits.int().view(torch.float32)])


def test_8_bit_bounds_of_every_number_are_the_nearest_outward(device):
    """Stored by the op as by the twin: still a bound, the closest there is, saturating at 448; exact where it fits."""
    grid = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    grid = grid[grid.isfinite()].unique()
    for dtype in dtypes(device):
        key = every_number(dtype).view(-1, 64)
        k_cache = key[:, None, None].repeat(1, 8, 1, 1)  # [num_blocks, 8, 1, 64]
        table = torch.arange(len(key), dtype=torch.int32)[:, None]
        lens = torch.ones(len(key), dtype=torch.int32)
        inputs = table, lens, torch.zeros_like(lens)
        expected = torch.zeros(len(key), 1, 1, 2, 64).to(FP8)
        metadata = expected.to(device)
        reference.update_page_metadata(k_cache, expected, *inputs)
        quest_ops.update_page_metadata(k_cache.to(device), metadata, *(x.to(device) for x in inputs))
        assert_same_bits(metadata, expected)

        key, (lo, hi) = key.float(), expected[:, 0, 0].float().unbind(1)
        assert torch.equal(lo.isnan(), key.isnan()) and torch.equal(hi.isnan(), key.isnan())
        assert (lo.abs()[key.abs() > 448] == 448).all() and (hi.abs()[key.abs() > 448] == 448).all()
        within = key.abs() <= 448
        key, lo, hi = key[within], lo[within], hi[within]
        below, above = grid[torch.searchsorted(grid, key, right=True) - 1], grid[torch.searchsorted(grid, key)]
        assert torch.equal(lo, below) and torch.equal(hi, above)
        assert (lo <= key).all() and (key <= hi).all()
        zero = torch.cat([lo[lo == 0], hi[hi == 0]])
        assert len(zero) and not zero.signbit().any()


def metadata_of(keys, device, bound, metadata_dtype, op=quest_ops.update_page_metadata):
    """lo and hi `[n, 2, D]`, in 4 bits `[n, 9 * D / 8]`, of n pages that hold `keys` `[n, tokens, D]`."""
    count, tokens, dim = keys.shape
    k_cache = torch.full((count, 128, 1, dim), torch.nan, dtype=keys.dtype)
    k_cache[:, :tokens, 0] = keys
    dtype = metadata_dtype or keys.dtype
    metadata = torch.zeros(count, 1, 1, *metadata_shape(dtype, dim), device=device).to(dtype)
    lens = torch.full((count,), tokens, dtype=torch.int32)
    inputs = torch.arange(count, dtype=torch.int32)[:, None], lens, torch.zeros_like(lens)
    op(k_cache.to(device), metadata, *(x.to(device) for x in inputs), bound=bound[0], bound_scale=bound[1])
    return metadata[:, 0, 0]


def test_mean_bounds_of_the_twin_are_the_statistics_of_torch():
    keys = torch.randn(7, 13, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys += torch.linspace(-3, 3, 64)
    mean = keys.mean(1)
    radii = {"cuboid": (keys - mean[:, None]).abs().mean(1), "mean_std": keys.std(1, correction=0)}
    for name, scale in (bound for bound in BOUNDS if bound[0] in radii):
        lo, hi = metadata_of(keys, "cpu", (name, scale), None, reference.update_page_metadata).unbind(1)
        torch.testing.assert_close((lo + hi) / 2, mean)
        torch.testing.assert_close((hi - lo) / 2, scale * radii[name])
        assert (hi > lo).all()


def test_points_of_the_twin_are_on_the_principal_axis():
    """Of keys that deviate along one line, that is the line; in any case it is the power method's step."""

    def check(keys, axis, scale):  # axis [7, 64], its sign that of the farthest key
        mean = keys.mean(1)
        along = ((keys - mean[:, None]) * axis[:, None]).sum(-1)
        above, below = ((along * sign).clamp(min=0).pow(4).mean(1).pow(0.25) for sign in (1, -1))
        lo, hi = metadata_of(keys, "cpu", ("principal", scale), None, reference.update_page_metadata).unbind(1)
        torch.testing.assert_close(lo, mean - scale * below[:, None] * axis)
        torch.testing.assert_close(hi, mean + scale * above[:, None] * axis)
        return along

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(7, 13, 64, dtype=torch.float64, generator=generator)
    line = torch.nn.functional.normalize(torch.randn(7, 64, dtype=torch.float64, generator=generator), dim=-1)
    along = torch.randn(7, 13, dtype=torch.float64, generator=generator)
    centred = along - along.mean(1, keepdim=True)
    sign = centred.gather(1, centred.abs().argmax(1, keepdim=True)).sign()
    for scale in (1.0, 0.5):
        check(3 + along[..., None] * line[:, None], sign * line, scale)
    deviation = noise - noise.mean(1, keepdim=True)
    farthest = deviation[torch.arange(7), deviation.norm(dim=-1).argmax(1)]
    step = torch.einsum("pt,ptd->pd", torch.einsum("ptd,pd->pt", deviation, farthest), deviation)
    along = check(noise, torch.nn.functional.normalize(step, dim=-1), 1.0)
    assert (along.std(1, correction=0) > torch.linalg.svdvals(deviation)[:, 0] / 13**0.5 * 0.8).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_mean_bounds_have_the_twins_bits_for_any_number_of_tokens(device, metadata_dtype, head_dim):
    """Of keys over many orders of magnitude, with cancellation: no order or fusion of the sums but one gives them."""
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.logspace(-9, 3, head_dim)
    for dtype in dtypes(device):
        for tokens in (1, 2, 3, 7, 8, 9, 16, 31, 100, 128):
            keys = torch.randn(3, tokens, head_dim, generator=generator)
            keys = ((keys + 3 * torch.randn(3, 1, head_dim, generator=generator)) * magnitudes).to(dtype)
            for bound in BOUNDS[1:]:
                expected = metadata_of(keys, "cpu", bound, metadata_dtype, reference.update_page_metadata)
                assert_same_bits(metadata_of(keys, device, bound, metadata_dtype), expected)


def test_mean_bounds_past_the_largest_number_saturate_or_are_infinite(device):
    """A sum past float32's largest number leaves no mean: NaN, the page is unknown."""
    keys = torch.tensor([60000.0, -60000.0] * 4, dtype=torch.float16)[:, None].repeat(1, 64)[None]
    for bound in (("cuboid", 2.0), ("mean_std", 2.0), ("principal", 2.0)):
        lo, hi = metadata_of(keys, device, bound, None).unbind(1)
        assert (lo == -torch.inf).all() and (hi == torch.inf).all()
        lo, hi = metadata_of(keys, device, bound, FP8).float().unbind(1)
        assert (lo == -448).all() and (hi == 448).all()
    keys = torch.full((1, 8, 64), 3e38, dtype=torch.bfloat16)
    for bound in (("cuboid", 2.0), ("mean_std", 2.0), ("principal", 2.0)):
        for metadata_dtype in METADATA_DTYPES:
            expected = metadata_of(keys, "cpu", bound, metadata_dtype, reference.update_page_metadata)
            assert_same_bits(metadata_of(keys, device, bound, metadata_dtype), expected)
            assert numbers_of(expected)[:, 0].isnan().all()


def test_8_bit_mean_bounds_of_every_number_are_the_nearest(device):
    """Ties to the even mantissa, saturating at 448, zero as +0; a page of one token has no deviation."""
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448, even mantissas at even places
    for dtype in dtypes(device):
        key = every_number(dtype).view(-1, 1, 64)
        bounds = metadata_of(key, device, BOUNDS[1], FP8)
        assert_same_bits(bounds, metadata_of(key, "cpu", BOUNDS[1], FP8, reference.update_page_metadata))
        lo, hi = bounds.cpu().unbind(1)
        assert_same_bits(lo, hi)
        key, lo = key[:, 0].float(), lo.float()
        assert torch.equal(lo.isnan(), ~key.isfinite())
        key, lo = key[key.isfinite()], lo[key.isfinite()]
        above = torch.searchsorted(grid, key.abs()).clamp(1, 126)
        below = above - 1
        to_above, to_below = grid[above].double() - key.abs(), key.abs().double() - grid[below]
        up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
        nearest = torch.where(up, grid[above], grid[below])
        assert torch.equal(lo, nearest.copysign(key))
        assert not lo[lo == 0].signbit().any()


def test_4_bit_bounds_of_every_number(device):
    """A page of one token: minimum and maximum are the nearest multiples of their scale outward, a mean is the nearest
    one, ties to even; they saturate at 7 * 65504. A NaN hides the 32 numbers of its scale, a zero is +0."""
    for dtype in dtypes(device):
        key = every_number(dtype).view(-1, 1, 64)
        key = torch.cat([key[: len(key) // 2], key.flatten()[torch.randperm(key.numel())].view_as(key)])
        for bound in (BOUNDS[0], BOUNDS[1]):
            packed = metadata_of(key, device, bound, INT4)
            assert_same_bits(packed, metadata_of(key, "cpu", bound, INT4, reference.update_page_metadata))
            numbers = numbers_of(packed.cpu()).unflatten(-1, (-1, 32)).double()  # [n, 2, D / 32, 32]
            x = key[:, 0].unflatten(-1, (-1, 32)).double()
            known = x.isfinite().all(-1) if bound == BOUNDS[1] else ~x.isnan().any(-1)  # no mean is infinite
            lo, hi = numbers.unbind(1)
            assert torch.equal(lo.isnan(), ~known[..., None].expand_as(lo)) and torch.equal(hi.isnan(), lo.isnan())
            x, lo, hi = x[known], lo[known], hi[known]
            largest = x.abs().amax(-1, keepdim=True)
            scale = packed[:, 64:].cpu().view(torch.float16).unflatten(-1, (2, -1)).double()
            assert torch.equal(scale[:, 0][known], scale[:, 1][known])
            scale = scale[:, 0][known][:, None]
            assert (7 * scale >= largest.clamp(max=7 * 65504)).all()
            # To eleven bits, and one in the last place of them upward.
            assert (7 * scale <= largest * (1 + 2**-10) + 7 * 2**-24).all()
            within = x.clamp(-7 * 65504, 7 * 65504)
            down = torch.where(scale > 0, (within / scale).floor() * scale, 0)
            up = torch.where(scale > 0, (within / scale).ceil() * scale, 0)
            if bound == BOUNDS[0]:
                assert torch.equal(lo, down) and torch.equal(hi, up)
            else:
                assert torch.equal(lo, hi) and ((lo == down) | (lo == up)).all()
                assert ((lo - within).abs() <= scale / 2 * (1 + 1e-6)).all()
            assert not lo[lo == 0].signbit().any() and not hi[hi == 0].signbit().any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_4_bit_numbers_are_where_params_h_says(device, head_dim):
    """Channel 32 c + 8 t + i is 4 bits of word `packed_word(D, c, t)` of its vector; then come the scales."""
    keys = torch.randn(1, 1, head_dim, generator=torch.Generator().manual_seed(head_dim))
    page = bytes(metadata_of(keys.half(), device, BOUNDS[0], INT4)[0].tolist())
    numbers = numbers_of(torch.tensor([list(page)], dtype=torch.uint8))[0]
    scales = torch.frombuffer(bytearray(page[head_dim:]), dtype=torch.float16).view(2, -1)
    together = min(head_dim // 32, 4)
    for vector in range(2):
        words = memoryview(page[vector * head_dim // 2 : (vector + 1) * head_dim // 2]).cast("I")
        for channel in range(head_dim):
            c, t, i = channel // 32, channel // 8 % 4, channel % 8
            word = words[c // together * 4 * together + t * together + c % together]
            code = (word >> (i % 2 * 16 + i // 2 * 4) & 15) - 8
            assert -7 <= code <= 7 and numbers[vector, channel] == code * scales[vector, c].float()

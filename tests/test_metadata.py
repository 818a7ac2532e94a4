"""update_page_metadata: the bounds of keys that other code wrote, with append's bits."""

import pytest
import torch
from cases import LAYOUTS, Shape, assert_same_bits, build, dtypes, make_block_table, make_metadata, shapes, slots_of
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference


def update(case, page_metadata, start_lens, request_lens=None):
    lens = case.request_lens if request_lens is None else request_lens
    quest_ops.update_page_metadata(case.k_cache, page_metadata, case.block_table, lens, start_lens)


@given(data=st.data())
def test_update_is_its_twin_and_leaves_earlier_pages(device, data):
    shape = data.draw(shapes(device))
    case = build(shape, device)
    starts = [data.draw(st.integers(0, length + 20)) for length in shape.lengths]
    starts = torch.tensor(starts, dtype=torch.int32)
    metadata, expected = make_metadata(shape, device).fill_(-3), make_metadata(shape, "cpu").fill_(-3)
    update(case, metadata, starts.to(device))
    host = case.on("cpu")
    reference.update_page_metadata(host.k_cache, expected, host.block_table, host.request_lens, starts)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size, pages_per_block", [(8, 8), (16, 3), (128, 1)])
def test_update_equals_append(device, layout, page_size, pages_per_block):
    for dtype in dtypes(device):
        shape = Shape((300, 129), 7, page_size, pages_per_block, head_dim=128, dtype=dtype, layout=layout)
        case = build(shape, device)
        updated, appended = make_metadata(shape, device), make_metadata(shape, device)
        update(case, updated, torch.zeros_like(case.request_lens))
        for b, length in enumerate(shape.lengths):
            slots = slots_of(make_block_table(shape), b, 0, length, shape.block_size).to(device)
            keys = case.k_cache[slots // shape.block_size, slots % shape.block_size]
            values = case.v_cache[slots // shape.block_size, slots % shape.block_size]
            quest_ops.append_paged_kv(keys, values, case.k_cache, case.v_cache, appended, slots)
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


def test_nan_keys_stay_nan_in_their_channel(device):
    shape = Shape((48,), 3)
    case = build(shape, device)
    block = int(case.block_table[0, 1])
    case.k_cache[block, 5, 1, 9] = torch.nan
    metadata = make_metadata(shape, device)
    update(case, metadata, torch.zeros_like(case.request_lens))
    assert metadata[block, 1, 0, :, 9].isnan().all()
    assert metadata[case.block_table[0].long()].isnan().sum() == 2


def test_twin_rounds_8_bit_bounds_outward():
    """What the twins store in float8_e4m3fn is still a bound, saturates at 448, and keeps what fits exactly."""
    keys = torch.cat([torch.linspace(-448, 448, 8001), torch.logspace(-12, 2, 400), -torch.logspace(-12, 2, 400)])
    fits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    keys = torch.cat([keys, fits[fits.isfinite()], torch.zeros(63)])[: 64 * (8801 // 64)].view(-1, 1, 1, 64)
    k_cache = torch.cat([keys, torch.full((1, 1, 1, 64), 1e4), torch.full((1, 1, 1, 64), -torch.inf)])
    metadata = torch.zeros(k_cache.size(0), 1, 1, 2, 64).to(torch.float8_e4m3fn)
    table = torch.arange(k_cache.size(0), dtype=torch.int32)[:, None]
    lens = torch.ones(k_cache.size(0), dtype=torch.int32)
    reference.update_page_metadata(k_cache, metadata, table, lens, torch.zeros_like(lens))
    lo, hi = metadata[:, 0, 0, 0].float(), metadata[:, 0, 0, 1].float()
    key = k_cache[:, 0, 0]
    within = key.abs() <= 448
    assert (lo <= key)[within].all() and (hi >= key)[within].all()
    assert (hi - lo <= key.abs().clamp(min=2**-6) / 8 + 1e-6)[within].all(), "more than one step apart"
    exact = key.to(torch.float8_e4m3fn).float() == key
    assert torch.equal(lo[within & exact], key[within & exact]) and torch.equal(hi[within & exact], key[within & exact])
    assert (lo[-2:].abs() == 448).all() and (hi[-2:].abs() == 448).all()

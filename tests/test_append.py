"""append_paged_kv: the cache and its metadata after any history equal a fresh build, bit for bit."""

import dataclasses

import pytest
import torch
from cases import (
    BOUNDS,
    FP8,
    INT4,
    LAYOUTS,
    METADATA_DTYPES,
    Shape,
    assert_same_bits,
    build,
    dtypes,
    fused_slices,
    make_block_table,
    make_metadata,
    make_pool,
    numbers_of,
    shapes,
    slots_of,
)
from hypothesis import given
from hypothesis import strategies as st

import quest_ops
from quest_ops import reference


class Pool:
    """An empty cache of a shape, to append to by token positions of a request."""

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        self.k_cache, self.v_cache = make_pool(shape, device)
        self.page_metadata = make_metadata(shape, device)
        self.block_table = make_block_table(shape)

    def append(self, request, start, key, value):
        slots = slots_of(self.block_table, request, start, start + key.size(0), self.shape.block_size)
        self.append_slots(slots, key, value)

    def append_slots(self, slots, key, value, op=quest_ops.append_paged_kv):
        caches = self.k_cache, self.v_cache, self.page_metadata
        op(key, value, *caches, slots.to(self.device), **self.shape.bound_options)

    def assert_same(self, other):
        assert_same_bits(self.k_cache, other.k_cache)
        assert_same_bits(self.v_cache, other.v_cache)
        assert_same_bits(self.page_metadata, other.page_metadata)


def random_tokens(shape, count, device, salt=5):
    _, key, value = fused_slices(shape, count, shape.generator(salt), device)
    return key, value


@given(data=st.data())
def test_append_is_its_twin(device, data):
    """Over two steps, with skipped slots in between and padding rows behind: the whole pool, untouched slots too."""
    shape = data.draw(shapes(device))
    ours, twin = Pool(shape, device), Pool(shape, "cpu")
    cut = [data.draw(st.integers(0, length)) for length in shape.lengths]
    generator = shape.generator(6)
    for step in (0, 1):
        spans = [(0, c) if step == 0 else (c, n) for c, n in zip(cut, shape.lengths, strict=True)]
        slots = [slots_of(ours.block_table, b, *span, shape.block_size) for b, span in enumerate(spans)]
        slots = torch.cat(slots)
        # A skip before every token with probability 1/4: -1 and other negative numbers.
        skips = torch.rand(slots.numel(), generator=generator) < 0.25
        slots = torch.stack([torch.where(skips, -1 - slots, 2**62), slots], 1).flatten()
        slots = slots[slots != 2**62]
        key, value = random_tokens(shape, slots.numel() + 3, device, salt=step)
        key[slots.numel() :] = torch.nan
        value[slots.numel() :] = torch.nan
        ours.append_slots(slots, key, value)
        twin.append_slots(slots, key.cpu(), value.cpu(), op=reference.append_paged_kv)
        ours.assert_same(twin)


@given(data=st.data())
def test_append_in_chunks_equals_rebuild(device, data):
    shape = data.draw(shapes(device))
    case = build(shape, device)
    pool = Pool(shape, device)
    for b, length in enumerate(shape.lengths):
        done = 0
        while done < length:
            stop = data.draw(st.integers(done + 1, length)) if data.draw(st.booleans()) else min(length, done + 100)
            blocks = pool.block_table[b, torch.arange(done, stop) // shape.block_size].long().to(device)
            offsets = (torch.arange(done, stop) % shape.block_size).to(device)
            pool.append(b, done, case.k_cache[blocks, offsets], case.v_cache[blocks, offsets])
            done = stop
    assert_same_bits(pool.k_cache, case.k_cache)
    assert_same_bits(pool.v_cache, case.v_cache)
    assert_same_bits(pool.page_metadata, case.page_metadata)
    rebuilt = make_metadata(shape, device)
    starts = torch.zeros_like(case.request_lens)
    tables = case.block_table, case.request_lens
    quest_ops.update_page_metadata(pool.k_cache, rebuilt, *tables, starts, **shape.bound_options)
    assert_same_bits(pool.page_metadata, rebuilt)


@given(data=st.data())
def test_rejected_drafts_leave_no_trace_in_metadata(device, data):
    """Append drafts, take some back, append others over them: the bounds are those of the tokens that stayed."""
    shape = data.draw(shapes(device, lengths=(200,), max_blocks=32, page_size=16, pages_per_block=2))
    key, value = random_tokens(shape, 200, device)
    drafts, _ = random_tokens(shape, 200, device, salt=7)
    pool, fresh = Pool(shape, device), Pool(shape, device)
    length = 0
    while length < 200:
        tried = min(200, length + data.draw(st.integers(1, 40)))
        pool.append(0, length, 100 * drafts[length:tried], value[length:tried])
        kept = data.draw(st.integers(length + 1, tried))
        pool.append(0, length, key[length:kept], value[length:kept])
        length = kept
    fresh.append(0, 0, key, value)
    assert_same_bits(pool.page_metadata, fresh.page_metadata)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_reused_block_forgets_its_former_tokens(device, bound):
    shape = Shape(lengths=(32,), max_blocks=2, bound=bound)
    key, value = random_tokens(shape, 32, device)
    pool, fresh = Pool(shape, device), Pool(shape, device)
    pool.append(0, 0, 100 * key, value)
    for token in range(5):
        for each in (pool, fresh):
            each.append(0, token, key[token : token + 1], value[token : token + 1])
    first = int(pool.block_table[0, 0])
    assert_same_bits(pool.page_metadata[first], fresh.page_metadata[first])
    assert not fresh.page_metadata[first].isnan().any()


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_copied_partial_page_needs_no_metadata(device, bound):
    """Copy-on-write may copy keys alone: the next append reads them, and no earlier metadata."""
    shape = Shape(lengths=(12, 12), max_blocks=1, bound=bound)
    key, value = random_tokens(shape, 12, device)
    pool = Pool(shape, device)
    source, target = pool.block_table[:, 0].tolist()
    pool.append(0, 0, key, value)
    pool.k_cache[target, :11] = pool.k_cache[source, :11]
    pool.append(1, 11, key[11:], value[11:])
    assert_same_bits(pool.page_metadata[target], pool.page_metadata[source])


def test_tokens_past_the_highest_written_are_not_read(device):
    shape = Shape(lengths=(16,), max_blocks=1)
    key, value = random_tokens(shape, 16, device)
    pool = Pool(shape, device)
    pool.append(0, 0, key, value)
    pool.append(0, 3, key[3:4], value[3:4])
    bounds = pool.page_metadata[int(pool.block_table[0, 0]), :, 0]
    assert_same_bits(bounds[:, 0], key[:4].amin(0) + 0.0)
    assert_same_bits(bounds[:, 1], key[:4].amax(0) + 0.0)


@pytest.mark.parametrize("bound", BOUNDS)
def test_slots_of_a_page_may_come_in_any_order(device, bound):
    shape = Shape(lengths=(48,), max_blocks=3, bound=bound)
    key, value = random_tokens(shape, 48, device)
    pool, shuffled = Pool(shape, device), Pool(shape, device)
    pool.append(0, 0, key, value)
    order = torch.cat([page * 16 + torch.randperm(16, generator=shape.generator(page)) for page in (2, 0, 1)])
    slots = slots_of(pool.block_table, 0, 0, 48, 16)
    shuffled.append_slots(slots[order], key[order.to(device)], value[order.to(device)])
    shuffled.assert_same(pool)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("token", [0, 7, 15])
def test_a_nan_key_is_never_hidden(device, token, metadata_dtype, bound):
    shape = Shape(lengths=(16,), max_blocks=1, head_dim=128, metadata_dtype=metadata_dtype, bound=bound)
    key, value = random_tokens(shape, 16, device)
    key[token, 1, [0, 77, 127]] = torch.nan
    pool = Pool(shape, device)
    pool.append(0, 0, key, value)
    nan = numbers_of(pool.page_metadata)[int(pool.block_table[0, 0]), :, 0].isnan()  # [Hkv, 2, D]
    assert nan[1][:, [0, 77, 127]].all()
    # An axis is of all channels, a scale of 32.
    assert nan.sum() == (2 * 128 if bound[0] == "principal" else 2 * 96 if metadata_dtype == INT4 else 6)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_zero_bounds_are_plus_zero(device, metadata_dtype, bound):
    for dtype in dtypes(device):
        shape = Shape(lengths=(16,), max_blocks=1, dtype=dtype, metadata_dtype=metadata_dtype, bound=bound)
        key, value = random_tokens(shape, 16, device)
        key[:, :, :32] = -0.0
        key[8:, :, :16] = 0.0
        pool = Pool(shape, device)
        pool.append(0, 0, key, value)
        bounds = numbers_of(pool.page_metadata)[int(pool.block_table[0, 0]), :, 0, :, :32]
        assert_same_bits(bounds, torch.zeros_like(bounds))


@pytest.mark.parametrize("bound", BOUNDS[1:])
def test_an_infinite_key_makes_a_mean_unknown(device, bound):
    shape = Shape(lengths=(16,), max_blocks=1, bound=bound)
    key, value = random_tokens(shape, 16, device)
    key[3, 0, 0], key[4, 1, 1] = torch.inf, -torch.inf
    pool = Pool(shape, device)
    pool.append(0, 0, key, value)
    nan = pool.page_metadata[int(pool.block_table[0, 0]), :, 0].isnan()
    if bound[0] == "principal":  # in no direction is anything known
        assert nan.all()
    else:
        assert nan.sum() == 4 and nan[0, :, 0].all() and nan[1, :, 1].all()


@pytest.mark.parametrize("metadata_dtype, largest", [(None, torch.inf), (FP8, 448.0), (INT4, 7 * 65504.0)])
def test_infinite_keys_give_the_largest_bound_there_is(device, metadata_dtype, largest):
    shape = Shape(lengths=(16,), max_blocks=1, metadata_dtype=metadata_dtype)
    key, value = random_tokens(shape, 16, device)
    key[3, 0, 0], key[4, 1, 1] = torch.inf, -torch.inf
    pool = Pool(shape, device)
    pool.append(0, 0, key, value)
    bounds = numbers_of(pool.page_metadata)[int(pool.block_table[0, 0]), :, 0].float()
    assert bounds[0, 1, 0] == largest and bounds[1, 0, 1] == -largest


@pytest.mark.parametrize("slots", [[], [-1, -1, -5]], ids=["empty", "skipped"])
def test_nothing_to_write_writes_nothing(device, slots):
    shape = Shape(lengths=(16,), max_blocks=1)
    key, value = random_tokens(shape, 4, device)
    pool = Pool(shape, device)
    pool.append_slots(torch.tensor(slots, dtype=torch.int64), key, value)
    assert pool.k_cache.isnan().all() and pool.v_cache.isnan().all() and pool.page_metadata.isnan().all()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_layout_and_dtype_ends_in_the_same_bits(device, head_dim, metadata_dtype, bound):
    for dtype in dtypes(device):
        pools = []
        for layout in LAYOUTS:
            shape = Shape((100, 47), 4, 16, 2, head_dim=head_dim, dtype=dtype, layout=layout)
            shape = dataclasses.replace(shape, metadata_dtype=metadata_dtype, bound=bound)
            pools.append(Pool(shape, device))
            for b, length in enumerate(shape.lengths):
                pools[-1].append(b, 0, *random_tokens(shape, length, device, salt=b))
            pools[-1].assert_same(pools[0])


def test_metadata_without_parts_means_one_page_a_block(device):
    shape = Shape((50,), 4)
    key, value = random_tokens(shape, 50, device)
    pool, flat = Pool(shape, device), Pool(shape, device)
    flat.page_metadata = flat.page_metadata.squeeze(2)
    pool.append(0, 0, key, value)
    flat.append(0, 0, key, value)
    assert_same_bits(pool.page_metadata.squeeze(2), flat.page_metadata)


def test_one_head_and_strange_strides_of_size_one(device):
    """A size-1 dimension's stride says nothing: torch itself leaves any number there."""
    shape = dataclasses.replace(Shape((20,), 2), kv_heads=1)
    key, value = random_tokens(shape, 20, device)
    pool, strange = Pool(shape, device), Pool(shape, device)
    n, s, _, d = strange.k_cache.shape
    strange.k_cache = strange.k_cache.as_strided((n, s, 1, d), (s * d, d, 3, 1))
    strange.v_cache = strange.v_cache.as_strided((n, s, 1, d), (s * d, d, 3, 1))
    pool.append(0, 0, key, value)
    strange.append(0, 0, key.as_strided(key.shape, (key.stride(0), 5, 1)), value)
    pool.assert_same(strange)

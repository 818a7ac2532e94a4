"""PagedKVCache against a dictionary of lists, over any history."""

from collections import Counter

import pytest
import torch
from cases import BOUNDS, FP8, INT4, PRINCIPAL, assert_same_bits, fill_nan, numbers_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from quest_ops import ops
from quest_ops.cache import OutOfPagesError, PagedKVCache

LAYERS, HEADS, DIM, PAGE, BLOCKS = 2, 2, 64, 8, 9
TOKENS = torch.randn(2, 4096, HEADS, DIM, generator=torch.Generator().manual_seed(0))


def make_cache(device="cpu", **settings):
    layout = {"page_size": PAGE, "pages_per_block": 1, "metadata_dtype": None}
    settings = layout | {"dtype": torch.float16, "device": device} | settings
    cache = PagedKVCache(LAYERS, HEADS, DIM, BLOCKS, **settings)
    cache.pool.fill_(torch.nan)
    for layer in range(LAYERS):
        fill_nan(cache.page_metadata(layer))
    return cache


def tokens_of(names, layer, cache):
    """K and V [n, Hkv, D] of the tokens with these names; layers differ."""
    return (TOKENS[:, names].roll(layer, -1)).to(cache.device, cache.dtype)


def write(cache, seq, start, names, **bound):
    """Appends tokens to the room that was reserved at `start`."""
    slots = cache.slots(seq, start, start + len(names)).to(cache.device)
    for layer in range(LAYERS):
        key, value = tokens_of(names, layer, cache)
        tensors = cache.k_cache(layer), cache.v_cache(layer), cache.page_metadata(layer)
        ops.append_paged_kv(key, value, *tensors, slots, **bound)


def state_of(cache):
    """Everything that an operation which raises must leave alone."""
    sequences = {s: (cache.length(s), cache.block_ids(s), cache.sequence(s).epoch) for s in cache._sequences}
    return sequences, list(cache._free), list(cache._references)


def contents(cache, seq, layer):
    slots = cache.slots(seq, 0, cache.length(seq)).to(cache.device)
    blocks, offsets = slots // cache.block_size, slots % cache.block_size
    return cache.k_cache(layer)[blocks, offsets], cache.v_cache(layer)[blocks, offsets]


class History(RuleBasedStateMachine):
    device = "cpu"
    pages_per_block = 1
    metadata_dtype = None
    bound = BOUNDS[0]

    def __init__(self):
        super().__init__()
        settings = {"pages_per_block": self.pages_per_block, "metadata_dtype": self.metadata_dtype}
        self.cache = make_cache(self.device, **settings)
        self.bound_options = {"bound": self.bound[0], "bound_scale": self.bound[1]}
        self.model = {}  # sequence -> names of its tokens
        self.cut = set()  # sequences rolled back since their last append: their last page's metadata is a looser bound
        self.next_name = 0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model)), label="sequence")

    def holders(self):
        return Counter(block for seq in self.model for block in self.cache.block_ids(seq))

    def blocks_needed(self, seq, n, holders):
        """Of one extend; takes its copy out of `holders`."""
        size = self.cache.block_size
        length = len(self.model[seq])
        needed = -(-(length + n) // size) - -(-length // size)
        if n and length % size:
            last = self.cache.block_ids(seq)[-1]
            if holders[last] > 1:
                holders[last] -= 1
                needed += 1
        return needed

    def extend(self, growth):
        holders = self.holders()
        needed = sum(self.blocks_needed(seq, n, holders) for seq, n in growth.items())
        if needed > self.cache.free_blocks:
            before = state_of(self.cache)
            with pytest.raises(OutOfPagesError, match=f"{needed} blocks.*{self.cache.free_blocks} of {BLOCKS}"):
                self.cache.extend_all(list(growth), list(growth.values()))
            assert state_of(self.cache) == before
            return
        free = self.cache.free_blocks
        self.cache.extend_all(list(growth), list(growth.values()))
        assert self.cache.free_blocks == free - needed
        for seq, n in growth.items():
            names = [(self.next_name + i) % TOKENS.size(1) for i in range(n)]
            self.next_name += n
            write(self.cache, seq, len(self.model[seq]), names, **self.bound_options)
            self.model[seq] += names
            if n:
                self.cut.discard(seq)

    @precondition(lambda self: len(self.model) < 5)
    @rule()
    def add(self):
        seq = self.cache.add()
        assert seq not in self.model
        self.model[seq] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data(), n=st.integers(0, 3 * PAGE))
    def extend_one(self, data, n):
        self.extend({self.pick(data): n})

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def extend_several(self, data):
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=2, unique=True), label="sequences")
        self.extend({seq: data.draw(st.integers(0, PAGE), label="tokens") for seq in seqs})

    @precondition(lambda self: self.model)
    @rule(data=st.data(), n=st.integers(0, 2 * PAGE + 1))
    def rollback(self, data, n):
        seq = self.pick(data)
        if n > len(self.model[seq]):
            before = state_of(self.cache)
            with pytest.raises(ValueError, match=f"{n} tokens"):
                self.cache.rollback(seq, n)
            assert state_of(self.cache) == before
        else:
            self.cache.rollback(seq, n)
            del self.model[seq][len(self.model[seq]) - n :]
            if n:
                self.cut.add(seq)

    @precondition(lambda self: 0 < len(self.model) < 5)
    @rule(data=st.data())
    def fork(self, data):
        seq = self.pick(data)
        if len(self.model[seq]) % self.cache.block_size and not self.cache.free_blocks:
            before = state_of(self.cache)
            with pytest.raises(OutOfPagesError):
                self.cache.fork(seq)
            assert state_of(self.cache) == before
        else:
            child = self.cache.fork(seq)
            self.model[child] = list(self.model[seq])
            if seq in self.cut:
                self.cut.add(child)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        seq = self.pick(data)
        self.cache.free(seq)
        del self.model[seq]
        self.cut.discard(seq)
        with pytest.raises(ValueError, match=f"sequence {seq} is not in this cache"):
            self.cache.length(seq)

    @invariant()
    def every_block_is_free_or_counted(self):
        holders = self.holders()
        assert list(self.cache._references) == [holders[block] for block in range(BLOCKS)]
        free = list(self.cache._free)
        assert self.cache.free_blocks == len(free) and sorted(free) == [b for b in range(BLOCKS) if not holders[b]]

    @invariant()
    def every_token_is_where_it_was_written(self):
        for seq, names in self.model.items():
            assert self.cache.length(seq) == len(names)
            assert len(self.cache.block_ids(seq)) == -(-len(names) // self.cache.block_size)
            for layer in range(LAYERS):
                key, value = tokens_of(names, layer, self.cache)
                stored = contents(self.cache, seq, layer)
                assert torch.equal(stored[0], key) and torch.equal(stored[1], value)

    @invariant()
    def metadata_is_that_of_a_fresh_build(self):
        for seq, names in self.model.items():
            if not names:
                continue
            pages = -(-len(names) // PAGE)
            exact = pages - 1 if seq in self.cut and len(names) % PAGE else pages
            table = torch.tensor([self.cache.block_ids(seq)], dtype=torch.int32, device=self.device)
            lengths = torch.tensor([len(names)], dtype=torch.int32, device=self.device)
            for layer in range(LAYERS):
                kept = self.cache.page_metadata(layer)
                fresh = fill_nan(torch.empty_like(kept))
                starts = torch.zeros_like(lengths)
                keys = self.cache.k_cache(layer)
                ops.update_page_metadata(keys, fresh, table, lengths, starts, **self.bound_options)
                kept, fresh = (m[table[0].long()].transpose(1, 2).flatten(0, 1)[:pages] for m in (kept, fresh))
                assert_same_bits(kept[:exact], fresh[:exact])
                kept, fresh = kept[exact:].float(), fresh[exact:].float()
                if self.bound[0] == "minmax" and self.metadata_dtype != INT4:  # a smaller scale may be luckier
                    assert (kept[:, :, 0] <= fresh[:, :, 0]).all() and (kept[:, :, 1] >= fresh[:, :, 1]).all()


HISTORIES = [
    (1, None, BOUNDS[0]), (2, None, BOUNDS[0]), (2, FP8, BOUNDS[0]), (1, None, BOUNDS[1]), (2, FP8, BOUNDS[3]),
    (2, INT4, PRINCIPAL),
]  # fmt: skip


@pytest.mark.parametrize("pages_per_block, metadata_dtype, bound", HISTORIES)
def test_any_history_is_exact(device, pages_per_block, metadata_dtype, bound):
    settings_of_cache = {"pages_per_block": pages_per_block, "metadata_dtype": metadata_dtype, "bound": bound}
    machine = type("History", (History,), {"device": device} | settings_of_cache)
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=50))


def test_pools_are_hnd_views_of_one_allocation():
    cache = PagedKVCache(3, 2, 64, 5, page_size=16, pages_per_block=2, metadata_dtype=None)
    assert cache.pool.shape == (3, 5, 2, 2, 32, 64) and cache.pool.is_contiguous()
    k_cache, v_cache = cache.k_cache(1), cache.v_cache(1)
    assert k_cache.shape == v_cache.shape == (5, 32, 2, 64) and k_cache.stride() == v_cache.stride()
    assert k_cache.stride() == (2 * 2 * 32 * 64, 64, 32 * 64, 1)
    assert k_cache.data_ptr() == cache.pool[1, 0, 0].data_ptr()
    assert v_cache.data_ptr() == cache.pool[1, 0, 1].data_ptr()
    assert cache.page_metadata(1).shape == (5, 2, 2, 2, 64) and cache.page_metadata(1).is_contiguous()
    assert cache.kv_bytes == 3 * 5 * 2 * 2 * 32 * 64 * 2
    assert cache.metadata_bytes == cache.kv_bytes // 16 and cache.metadata_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, share", [(FP8, 1 / 2), (INT4, 9 / 32)])
def test_narrow_metadata_is_a_share_of_16_bits_and_is_copied_with_its_block(device, dtype, share):
    cache = make_cache(device, metadata_dtype=dtype)
    assert cache.metadata_dtype == dtype and cache.dtype == torch.float16
    assert cache.metadata_bytes == LAYERS * BLOCKS * HEADS * 2 * DIM * 2 * share == cache.kv_bytes // PAGE * share
    parent = cache.add()
    cache.extend(parent, PAGE + 3)
    write(cache, parent, 0, list(range(PAGE + 3)))
    child = cache.fork(parent)  # copies the partial block
    cache.rollback(child, 4)
    cache.extend(child, 1)  # copies the full one: 7 of its 8 tokens are still shared
    (first, last), (copy, _) = cache.block_ids(parent), cache.block_ids(cache.fork(parent))
    assert copy == first != cache.block_ids(child)[0]
    for layer in range(LAYERS):
        metadata = cache.page_metadata(layer)
        assert metadata.dtype == dtype and not numbers_of(metadata[[first, last]]).isnan().any()
        assert_same_bits(metadata[cache.block_ids(child)[0]], metadata[first])
        assert_same_bits(metadata[cache.block_ids(cache.fork(parent))[1]], metadata[last])


def test_extending_a_shared_block_copies_it_first():
    cache = make_cache()
    parent = cache.add()
    cache.extend(parent, 2 * PAGE)
    write(cache, parent, 0, list(range(2 * PAGE)))
    child = cache.fork(parent)
    assert cache.block_ids(child) == cache.block_ids(parent) and cache.free_blocks == BLOCKS - 2

    cache.rollback(child, 3)
    assert cache.block_ids(child) == cache.block_ids(parent)  # nothing is copied before it must be
    cache.extend(child, 1)
    write(cache, child, 2 * PAGE - 3, [999])
    assert cache.block_ids(child)[0] == cache.block_ids(parent)[0]
    assert cache.block_ids(child)[1] != cache.block_ids(parent)[1]
    assert torch.equal(contents(cache, parent, 1)[0], tokens_of(list(range(2 * PAGE)), 1, cache)[0])
    assert torch.equal(contents(cache, child, 1)[0], tokens_of([*range(2 * PAGE - 3), 999], 1, cache)[0])


def test_two_sharers_extended_at_once_make_one_copy():
    cache = make_cache()
    parent = cache.add()
    cache.extend(parent, PAGE)
    child = cache.fork(parent)
    cache.rollback(parent, 1)
    cache.rollback(child, 1)
    cache.extend_all([parent, child], [1, 1])
    assert cache.free_blocks == BLOCKS - 2 and cache.block_ids(parent) != cache.block_ids(child)


def test_a_fork_copies_only_a_partial_block():
    cache = make_cache()
    parent = cache.add()
    cache.extend(parent, PAGE + 1)
    child = cache.fork(parent)
    assert cache.block_ids(child)[0] == cache.block_ids(parent)[0]
    assert cache.block_ids(child)[1] != cache.block_ids(parent)[1]
    assert cache.free_blocks == BLOCKS - 3


def test_blocks_are_given_out_in_order_and_again_after_a_free():
    cache = make_cache()
    first = cache.add()
    cache.extend(first, 4 * PAGE)
    assert cache.block_ids(first) == [0, 1, 2, 3]
    cache.free(first)
    second = cache.add()
    cache.extend(second, 4 * PAGE)
    assert cache.block_ids(second) == [0, 1, 2, 3] and second != first


def test_slots_name_block_and_offset():
    cache = make_cache(pages_per_block=2)
    other, seq = cache.add(), cache.add()
    cache.extend(seq, 1)
    cache.extend(other, 1)
    cache.extend(seq, 20)
    assert cache.block_ids(seq) == [0, 2]
    slots = cache.slots(seq, 14, 18)
    assert slots.dtype == torch.int64 and slots.tolist() == [14, 15, 32, 33]
    assert cache.slots(seq, 21, 21).tolist() == []


def test_out_of_pages_loses_nothing():
    cache = make_cache()
    a, b = cache.add(), cache.add()
    cache.extend_all([a, b], [7 * PAGE, PAGE])
    before = state_of(cache)
    with pytest.raises(OutOfPagesError, match=r"2 blocks of 8 tokens are needed, 1 of 9"):
        cache.extend_all([a, b], [1, 1])
    assert state_of(cache) == before
    cache.extend(a, 1)
    with pytest.raises(OutOfPagesError):
        cache.fork(a)
    assert len(cache._sequences) == 2


def test_bad_operations_are_named_and_change_nothing():
    cache = make_cache(max_sequence_tokens=40)
    a, b, gone = cache.add(), cache.add(), cache.add()
    cache.extend_all([a, b], [12, 5])
    cache.free(gone)
    before = state_of(cache)
    for call, error, named in [
        (lambda: cache.extend_all([a, b], [1, 36]), ValueError, rf"sequence {b} would hold 41 tokens.*40"),
        (lambda: cache.extend_all([a, b], [1, -1]), ValueError, "n must be at least 0, got -1"),
        (lambda: cache.extend_all([a, b], [1, 1.5]), TypeError, "n must be an int, got 1.5"),
        (lambda: cache.extend_all([a, a], [1, 1]), ValueError, "different sequences"),
        (lambda: cache.extend_all([a, b], [1]), ValueError, "a count for each"),
        (lambda: cache.extend_all([a, gone], [1, 1]), ValueError, f"sequence {gone} is not in this cache"),
        (lambda: cache.extend(99, 1), ValueError, "sequence 99"),
        (lambda: cache.extend([a], 1), ValueError, "sequence .* is not in this cache"),
        (lambda: cache.rollback(a, 13), ValueError, "13 tokens: it has 12"),
        (lambda: cache.rollback(a, -1), ValueError, "n must be at least 0"),
        (lambda: cache.rollback(gone, 0), ValueError, f"sequence {gone}"),
        (lambda: cache.fork(gone), ValueError, f"sequence {gone}"),
        (lambda: cache.free(gone), ValueError, f"sequence {gone}"),
        (lambda: cache.block_ids(gone), ValueError, f"sequence {gone}"),
        (lambda: cache.slots(a, 0, 13), ValueError, "end 13 is past the length"),
        (lambda: cache.slots(a, -1, 3), ValueError, "start"),
        (lambda: cache.slots(a, 4, 3), ValueError, "end"),
    ]:
        with pytest.raises(error, match=named):
            call()
        assert state_of(cache) == before


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads"),
        ({"num_blocks": 0}, ValueError, "num_blocks"),
        ({"num_blocks": 2**31}, ValueError, "num_blocks"),
        ({"num_blocks": 4.0}, TypeError, "num_blocks"),
        ({"head_dim": 80}, ValueError, "head_dim.*80"),
        ({"page_size": 24}, ValueError, "page_size.*24"),
        ({"pages_per_block": 9}, ValueError, "pages_per_block.*9"),
        ({"pages_per_block": 0}, ValueError, "pages_per_block"),
        ({"dtype": torch.float64}, ValueError, "dtype.*float64"),
        ({"dtype": "float16"}, ValueError, "dtype.*'float16'"),
        ({"metadata_dtype": torch.float8_e5m2}, ValueError, "metadata_dtype.*bfloat16.*float8_e4m3fn.*uint8.*e5m2"),
        ({"metadata_dtype": torch.float16}, ValueError, "metadata_dtype.*bfloat16.*float8_e4m3fn.*float16"),
        ({"metadata_dtype": "float8_e4m3fn"}, ValueError, "metadata_dtype.*'float8_e4m3fn'"),
        ({"device": "meta"}, ValueError, "device.*meta"),
        ({"device": "cuda", "dtype": torch.float32}, ValueError, "float32.*CPU"),
        ({"max_sequence_tokens": 0}, ValueError, "max_sequence_tokens"),
    ],
)
def test_bad_sizes_are_named(changed, error, named):
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_blocks": 2} | changed
    with pytest.raises(error, match=named):
        PagedKVCache(**sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(RuntimeError, match="sees no CUDA GPU"):
        PagedKVCache(1, 1, 64, 2, device="cuda")

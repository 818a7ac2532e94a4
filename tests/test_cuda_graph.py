"""CUDA graphs and streams: one capture serves all later lengths; nothing leaves the current stream."""

import functools
import operator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import (
    FP8,
    INT4,
    Shape,
    assert_same_bits,
    build,
    fused_slices,
    make_block_table,
    make_metadata,
    make_pool,
    slots_of,
)

import quest_ops

pytestmark = pytest.mark.gpu


class Decode:
    """A decoder's step on static buffers: append T tokens a request, then attend with Quest and densely."""

    def __init__(self, shape, device="cuda"):
        self.shape = shape
        self.k_cache, self.v_cache = make_pool(shape, device)
        self.page_metadata = make_metadata(shape, device)
        self.host_table = make_block_table(shape)
        self.block_table = self.host_table.to(device)
        tokens = shape.num_rows
        self.query, self.key, self.value = (
            torch.zeros_like(x) for x in fused_slices(shape, tokens, shape.generator(), device)
        )
        self.seq_lens = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        self.workspace = torch.zeros(quest_ops.ops.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.step_number = 0

    def prepare(self, lengths):
        """Set the static buffers for a step after which request b holds `lengths[b]` tokens (0: an empty slot)."""
        shape, t = self.shape, self.shape.rows_per_request
        self.step_number += 1
        generator = shape.generator(100 + self.step_number)
        inputs = fused_slices(shape, shape.num_rows, generator, "cpu")
        for static, new in zip((self.query, self.key, self.value), inputs, strict=True):
            static.copy_(new)
        slots, rows = [], []
        for b, n in enumerate(lengths):
            rows += [max(0, n - t + 1 + i) for i in range(t)]
            slots.append(torch.full((t,), -1) if n == 0 else slots_of(self.host_table, b, n - t, n, shape.block_size))
        self.slots.copy_(torch.cat(slots))
        self.seq_lens.copy_(torch.tensor(rows, dtype=torch.int32))

    def run(self):
        quest_ops.append_paged_kv(self.key, self.value, self.k_cache, self.v_cache, self.page_metadata, self.slots)
        inputs = self.query, self.k_cache, self.v_cache
        tables = self.block_table, self.seq_lens
        options = {"workspace": self.workspace}  # the layers of a step share one
        quest = quest_ops.quest_decode_attention(*inputs, self.page_metadata, *tables, 8, 1, 2, "max", **options)
        dense = quest_ops.sparse_decode_attention(*inputs, *tables, page_size=self.shape.page_size, **options)
        return quest + dense

    def capture(self):
        self.prepare([0] * len(self.shape.lengths))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.run()
        return graph, results

    def fill(self, length):
        """The first `length` tokens of every request, by the same steps in eager and in captured decoders."""
        generator = self.shape.generator(50)
        for b in range(len(self.shape.lengths)):
            _, key, value = fused_slices(self.shape, length, generator, "cuda")
            slots = slots_of(self.host_table, b, 0, length, self.shape.block_size).cuda()
            quest_ops.append_paged_kv(key, value, self.k_cache, self.v_cache, self.page_metadata, slots)


SHAPES = [
    Shape((0, 0), 64, group=4, head_dim=128, dtype=torch.bfloat16),
    Shape((0, 0, 0), 40, 16, 2, 4, 2, 3, head_dim=64, layout="vllm"),
    Shape((0, 0), 64, group=4, head_dim=128, dtype=torch.bfloat16, metadata_dtype=FP8),
    Shape((0, 0), 64, 4, 4, group=4, head_dim=128, dtype=torch.bfloat16, metadata_dtype=INT4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["one row", "four rows", "8-bit metadata", "pages of 4, 4-bit metadata"])
def test_replay_with_growing_lengths_equals_eager(shape):
    """Captured on empty slots, replayed over page, block and budget boundaries; one slot pauses and comes back."""
    eager, captured = Decode(shape), Decode(shape)
    graph, results = captured.capture()
    eager.prepare([0] * len(shape.lengths))
    for decoder in (eager, captured):
        decoder.fill(100)
    held = [100] * len(shape.lengths)
    for step in range(60):
        paused = [b == 1 and 20 <= step < 30 for b in range(len(held))]
        held = [n if p else n + shape.rows_per_request for n, p in zip(held, paused, strict=True)]
        lengths = [0 if p else n for n, p in zip(held, paused, strict=True)]
        eager.prepare(lengths)
        captured.prepare(lengths)
        graph.replay()
        for a, e in zip(results, eager.run(), strict=True):
            assert not e.isnan().any()
            assert_same_bits(a, e)
    assert_same_bits(captured.page_metadata, eager.page_metadata)
    assert not captured.workspace.any() and not eager.workspace.any()


def test_replay_reaches_the_longest_length():
    shape = Shape((0,), 2048, kv_heads=1, group=4, head_dim=128)
    eager, captured = Decode(shape), Decode(shape)
    graph, results = captured.capture()
    eager.prepare([0])
    for decoder in (eager, captured):
        decoder.fill(2048 * 16 - 1)
    for length in (1, 17, 4000, 2048 * 16):
        eager.prepare([length])
        captured.prepare([length])
        graph.replay()
        for a, e in zip(results, eager.run(), strict=True):
            assert_same_bits(a, e)


def test_ops_run_on_the_current_stream_alone():
    """A side stream held back by a sleep: with any work on another stream, the results would miss the late inputs."""
    shape = Shape((0,), 64, group=4, head_dim=128)
    expected, decoder = Decode(shape), Decode(shape)
    for each in (expected, decoder):
        each.fill(500)
        each.prepare([501])
    results = expected.run()
    query = decoder.query.clone()
    decoder.query.zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        decoder.query.copy_(query)
        on_side = decoder.run()
        assert not side.query(), "an op waited for the device"
    torch.cuda.synchronize()
    for a, e in zip(on_side, results, strict=True):
        assert_same_bits(a, e)


def test_two_threads_on_two_streams():
    shape = Shape((600, 33), 40, group=4, head_dim=128)
    case = build(shape, "cuda")
    inputs = case.query, case.k_cache, case.v_cache, case.page_metadata, case.block_table, case.seq_lens
    expected = quest_ops.quest_decode_attention(*inputs, 8, 1, 2, "max")
    torch.cuda.synchronize()

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [quest_ops.quest_decode_attention(*inputs, 8, 1, 2, "max") for _ in range(100)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(2) as threads:
        for result in functools.reduce(operator.iadd, threads.map(work, range(2)), []):
            for a, e in zip(result, expected, strict=True):
                assert_same_bits(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_the_second_device_run_there():
    shape = Shape((600, 33), 40, group=4, head_dim=128)
    results = []
    for device in ("cuda:0", "cuda:1"):
        case = build(shape, device)
        inputs = case.query, case.k_cache, case.v_cache, case.page_metadata, case.block_table, case.seq_lens
        results.append(quest_ops.quest_decode_attention(*inputs, 8, 1, 2, "max"))
        assert results[-1][0].device == torch.device(device)
    assert torch.cuda.current_device() == 0
    for a, e in zip(*results, strict=True):
        assert_same_bits(a, e)

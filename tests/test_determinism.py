"""The same inputs give the same bits: run to run, and on the CPU for any number of threads."""

import pytest
import torch
from cases import Shape, assert_same_bits, build, dtypes, fused_slices, make_block_table, make_metadata, slots_of

import quest_ops


def every_op(shape, device):
    """The results of all ops on fresh copies of the same inputs."""
    case = build(shape, device)
    _, key, value = fused_slices(shape, shape.lengths[0], shape.generator(9), device)
    slots = slots_of(make_block_table(shape), 0, 0, shape.lengths[0], shape.block_size).to(device)
    appended, updated = make_metadata(shape, device), make_metadata(shape, device)
    tables = case.block_table, case.seq_lens
    quest_ops.append_paged_kv(key, value, case.k_cache, case.v_cache, appended, slots)
    starts = torch.zeros_like(case.request_lens)
    quest_ops.update_page_metadata(case.k_cache, updated, case.block_table, case.request_lens, starts)
    scores = quest_ops.estimate_page_scores(case.query, updated, *tables, shape.page_size, "max")
    page_ids, page_counts = quest_ops.select_topk_pages(scores, case.seq_lens, shape.page_size, 12, 1, 4)
    inputs = case.query, case.k_cache, case.v_cache
    dense = quest_ops.sparse_decode_attention(*inputs, *tables, page_size=shape.page_size)
    sparse = quest_ops.sparse_decode_attention(*inputs, *tables, page_ids, page_counts, page_size=shape.page_size)
    quest = quest_ops.quest_decode_attention(*inputs, updated, *tables, 12, 1, 4, "mean")
    return [case.k_cache, case.v_cache, appended, updated, scores, page_ids, page_counts, *dense, *sparse, *quest]


SHAPES = [
    Shape((5000,), 350, kv_heads=1, group=3),
    Shape((3000, 40, 0), 100, 16, 2, 4, 2, 4, head_dim=128, layout="vllm"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["one long", "ragged"])
def test_runs_agree_bit_for_bit(device, shape):
    first = every_op(shape, device)
    for _ in range(5):
        for a, e in zip(every_op(shape, device), first, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("shape", SHAPES, ids=["one long", "ragged"])
def test_thread_counts_agree_bit_for_bit(shape):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(every_op(shape, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, e in zip(result, results[0], strict=True):
            assert_same_bits(a, e)


def test_a_row_does_not_depend_on_its_batch(device):
    """Alone or beside others, a request gets the same selection, and the same answer up to how its work is split."""
    for dtype in dtypes(device):
        shape = Shape((700, 300, 0, 1), 50, group=3, dtype=dtype)
        case = build(shape, device)
        out, lse = quest_of_rows(case, slice(None))
        for r in range(4):
            alone = quest_of_rows(case, slice(r, r + 1))
            torch.testing.assert_close(alone[0], out[r : r + 1], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(alone[1], lse[r : r + 1], rtol=0, atol=1e-4)


def quest_of_rows(case, rows):
    caches = case.k_cache, case.v_cache, case.page_metadata
    return quest_ops.quest_decode_attention(
        case.query[rows], *caches, case.block_table[rows], case.seq_lens[rows], 8, 1, 2, "max"
    )

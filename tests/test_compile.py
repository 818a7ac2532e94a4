"""torch.compile(fullgraph=True): the ops trace without a break, and give what they give eagerly."""

import shutil

import pytest
import torch
from cases import Shape, assert_same_bits, build, fused_slices, make_block_table, slots_of

import quest_ops

INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
)


def decode_step(key, value, slots, query, k_cache, v_cache, page_metadata, block_table, seq_lens):
    """A layer's attention between two pieces of pointwise work, as in a model."""
    quest_ops.append_paged_kv(key * 2, value, k_cache, v_cache, page_metadata, slots)
    tables = block_table, seq_lens
    out, lse = quest_ops.quest_decode_attention(query * 2, k_cache, v_cache, page_metadata, *tables, 6, 1, 2, "max")
    scores = quest_ops.estimate_page_scores(query, page_metadata, *tables, 16, "none")
    page_ids, page_counts = quest_ops.select_topk_pages(scores, seq_lens, 16, 6, 1, 2)
    sparse, _ = quest_ops.sparse_decode_attention(query, k_cache, v_cache, *tables, page_ids, page_counts)
    caches = k_cache, v_cache, page_metadata
    step, _ = quest_ops.quest_decode_step(query, key - 1, value * 2, *caches, *tables, 6, 1, 2, "max")
    return out + sparse, lse, page_ids, step * 2


def step_inputs(shape, device):
    case = build(shape, device)
    lengths = enumerate(shape.lengths)
    slots = [slots_of(make_block_table(shape), b, n - 1, n, shape.block_size) for b, n in lengths]
    _, key, value = fused_slices(shape, len(slots), shape.generator(), device)
    tables = case.block_table, case.seq_lens
    return key, value, torch.cat(slots).to(device), case.query, case.k_cache, case.v_cache, case.page_metadata, *tables


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_a_compiled_step_equals_the_eager_one(device, backend):
    torch._dynamo.reset()
    shape = Shape((300, 33), 24, group=3)
    expected_inputs, inputs = step_inputs(shape, device), step_inputs(shape, device)
    expected = decode_step(*expected_inputs)
    actual = torch.compile(decode_step, backend=backend, fullgraph=True)(*inputs)
    for a, e in zip(actual + inputs, expected + expected_inputs, strict=True):
        assert_same_bits(a, e)


def test_a_compiled_step_takes_other_batch_sizes(device):
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((300, 33), (300, 33, 100), (17, 18, 19, 20, 21)):
        shape = Shape(lengths, 24, group=3)
        for a, e in zip(compiled(*step_inputs(shape, device)), decode_step(*step_inputs(shape, device)), strict=True):
            assert_same_bits(a, e)


def test_compiled_ops_write_to_given_outputs(device):
    torch._dynamo.reset()
    shape = Shape((300, 33), 24, group=3)
    *_, query, k_cache, v_cache, page_metadata, block_table, seq_lens = step_inputs(shape, device)
    inputs = query, k_cache, v_cache, page_metadata, block_table, seq_lens, 6, 1, 2, "max"

    def step(out, lse):
        quest_ops.quest_decode_attention(*inputs, out=out, lse=lse)
        return out * 1

    expected = quest_ops.quest_decode_attention(*inputs)
    out, lse = torch.zeros_like(expected[0]), torch.zeros_like(expected[1])
    returned = torch.compile(step, backend="aot_eager", fullgraph=True)(out, lse)
    assert_same_bits(returned, expected[0])
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])

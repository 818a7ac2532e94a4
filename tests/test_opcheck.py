"""torch.library.opcheck: schema, fake, and autograd registration of every op."""

import dataclasses

import pytest
import torch
from cases import FP8, INT4, Shape, build, fused_slices, make_block_table, make_metadata, slots_of

import quest_ops  # noqa: F401

# Under two layouts and dtypes; opcheck itself compares the fake's sizes, strides and dtypes with the kernel's.
SHAPES = [
    Shape((150, 33), 12, 16, 1, group=3, dtype=torch.float16),
    Shape((150, 0), 6, 16, 2, 3, kv_heads=1, group=4, head_dim=128, dtype=torch.bfloat16, layout="vllm"),
]
OPS = (
    "append_paged_kv",
    "update_page_metadata",
    "estimate_page_scores",
    "select_topk_pages",
    "sparse_decode_attention",
    "sparse_decode_attention_out",
    "quest_decode_attention",
    "quest_decode_attention_out",
    "quest_decode_step",
    "quest_decode_step_out",
)


def samples(op, shape, device):
    case = build(shape, device)
    caches = case.k_cache, case.v_cache
    tables = case.block_table, case.seq_lens
    out = torch.empty_like(case.query, memory_format=torch.contiguous_format)
    outputs = {"out": out, "lse": torch.empty(out.shape[:2], device=device)}
    page_ids = torch.zeros(shape.num_rows, 1, 3, dtype=torch.int32, device=device)
    counts = torch.ones(shape.num_rows, 1, dtype=torch.int32, device=device)
    budgets = torch.full((shape.num_rows,), 5, dtype=torch.int32, device=device)
    bounds = {}, {"bound": "mean_std", "bound_scale": 1.5}, {"bound": "principal", "bound_scale": 0.75}
    if op == "append_paged_kv":
        _, key, value = fused_slices(shape, 8, shape.generator(), device)
        slots = slots_of(make_block_table(shape), 0, 0, 6, shape.block_size).to(device)
        for options in bounds:
            yield (key, value, *caches, case.page_metadata, slots), options
    elif op == "update_page_metadata":
        starts = torch.zeros_like(case.request_lens)
        for options in bounds:
            yield (case.k_cache, make_metadata(shape, device), case.block_table, case.request_lens, starts), options
    elif op == "estimate_page_scores":
        for head_reduction in ("max", "mean", "none"):
            for bound in ("minmax", "principal"):
                yield (case.query, case.page_metadata, *tables, shape.page_size, head_reduction), {"bound": bound}
    elif op == "select_topk_pages":
        scores = torch.rand(shape.num_rows, 2, shape.num_pages, generator=shape.generator()).to(device)
        yield (scores, case.seq_lens, 16, 6, 1, 2), {}
        yield (scores, case.seq_lens, 16, 6, 1, 2), {"page_budgets": budgets}
    elif op.startswith("sparse"):
        options = outputs if op.endswith("_out") else {}
        yield (case.query, *caches, *tables), options
        yield (case.query, *caches, *tables, page_ids, counts), dict(page_size=16, sm_scale=0.1, **options)
    else:
        options = outputs if op.endswith("_out") else {}
        inputs = case.query, *caches, case.page_metadata, *tables, 6, 1, 2
        if op.startswith("quest_decode_step"):
            _, key, value = fused_slices(shape, shape.num_rows, shape.generator(), device)
            inputs = case.query, key, value, *inputs[1:]
            options = options | {"bound": "mean_std", "bound_scale": 1.5}
        yield (*inputs, "max"), options
        yield (*inputs, "none"), dict(sm_scale=0.1, page_budgets=budgets, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=["NHD", "vllm"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op, shape):
    for args, kwargs in samples(op, shape, device):
        torch.library.opcheck(getattr(torch.ops.quest_ops, op).default, args, kwargs)


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("select", "sparse"))])
@pytest.mark.parametrize("metadata_dtype", [FP8, INT4])
def test_opcheck_with_narrow_metadata(device, op, metadata_dtype):
    # Without test_schema, which compares inputs by arithmetic that torch lacks in 8 bits; the schema is the same one.
    checks = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    for args, kwargs in samples(op, dataclasses.replace(SHAPES[0], metadata_dtype=metadata_dtype), device):
        torch.library.opcheck(getattr(torch.ops.quest_ops, op).default, args, kwargs, test_utils=checks)


def test_every_op_is_checked():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("quest_ops::")]
    registered = {name.removeprefix("quest_ops::").split(".")[0] for name in names}
    assert registered == set(OPS)

"""Bad input: an exception that names the argument, and nothing written."""

import dataclasses

import pytest
import torch
from cases import BAD_INPUT, FP8, INT4, Shape, build, fused_slices, make_block_table, make_metadata, slots_of

import quest_ops

SHAPE = Shape((150, 33), 12, 16, 2, group=3)

OPS = {
    "append": quest_ops.append_paged_kv,
    "update": quest_ops.update_page_metadata,
    "scores": quest_ops.estimate_page_scores,
    "select": quest_ops.select_topk_pages,
    "attend": quest_ops.sparse_decode_attention,
    "quest": quest_ops.quest_decode_attention,
}


def good_arguments(op, device):
    case = build(SHAPE, device)
    caches = {"k_cache": case.k_cache, "v_cache": case.v_cache}
    rows = {"block_table": case.block_table, "seq_lens": case.seq_lens}
    metadata = {"page_metadata": case.page_metadata}
    heads, pages = SHAPE.kv_heads, SHAPE.num_pages
    if op == "append":
        _, key, value = fused_slices(SHAPE, 8, SHAPE.generator(), device)
        slots = slots_of(make_block_table(SHAPE), 0, 140, 148, SHAPE.block_size).to(device)
        return {"key": key, "value": value, "slot_mapping": slots} | caches | metadata
    if op == "update":
        starts = torch.zeros_like(case.request_lens)
        return (
            {"k_cache": case.k_cache, "seq_lens": case.request_lens, "start_lens": starts}
            | metadata
            | {"block_table": case.block_table}
        )
    if op == "scores":
        return {"query": case.query, "page_size": 16, "head_reduction": "max"} | metadata | rows
    budget = {"page_budget": 6, "sink_pages": 1, "recent_pages": 2}
    out = torch.full_like(case.query, 5, memory_format=torch.contiguous_format)
    outputs = {"out": out, "lse": torch.full(out.shape[:2], 5.0, device=device)}
    if op == "select":
        scores = torch.rand(2, heads, pages, generator=SHAPE.generator()).to(device)
        budgets = torch.full((2, heads), 5, dtype=torch.int32, device=device)
        return {"scores": scores, "seq_lens": case.seq_lens, "page_size": 16, "page_budgets": budgets} | budget
    if op == "attend":
        page_ids = torch.arange(3, dtype=torch.int32, device=device).expand(2, heads, 3).contiguous()
        page_counts = torch.ones(2, heads, dtype=torch.int32, device=device)
        selection = {"page_ids": page_ids, "page_counts": page_counts, "page_size": 16}
        return {"query": case.query} | caches | rows | selection | outputs
    budgets = torch.full((2,), 5, dtype=torch.int32, device=device)
    return (
        {"query": case.query, "head_reduction": "max", "page_budgets": budgets}
        | caches
        | metadata
        | rows
        | budget
        | outputs
    )


def last_dimension_strided(x):
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]


def rows_unaligned(x):
    """The same sizes, each row starting one element further off a 16-byte address."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 1)[..., :-1]


def start_unaligned(x):
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape)


def with_rank_less(x):
    return x[0]


def with_rank_more(x):
    return x[None]


def as_float64(x):
    return x.double()


def as_bfloat16(x):
    return x.bfloat16()


def as_int8(x):
    return x.to(torch.int8)


def as_e4m3(x):
    return x.to(FP8)


def as_e5m2(x):
    return x.to(torch.float8_e5m2)


def as_int64(x):
    return x.long()


def as_int32(x):
    return x.int()


def longer(x):
    return torch.cat([x, x[:1]])


def shorter_last(x):
    return x[..., :-16].contiguous()


def empty_last(x):
    return x[..., :0].contiguous()


def one_head_more(x):
    return torch.cat([x, x[:, :1]], 1)


def one_kv_head_less(x):
    return x[:, :, :1]


def strided_integers(x):
    return torch.stack([x, x], -1)[..., 0]


FLOAT_TENSORS = {
    "append": ["key", "value", "k_cache", "v_cache", "page_metadata"],
    "update": ["k_cache", "page_metadata"],
    "scores": ["query", "page_metadata"],
    "attend": ["query", "k_cache", "v_cache", "out"],
    "quest": ["query", "k_cache", "v_cache", "page_metadata", "out"],
}
INT32_TENSORS = {
    "update": ["block_table", "seq_lens", "start_lens"],
    "scores": ["block_table", "seq_lens"],
    "select": ["seq_lens", "page_budgets"],
    "attend": ["block_table", "seq_lens", "page_ids", "page_counts"],
    "quest": ["block_table", "seq_lens", "page_budgets"],
}


def each(tensors, *changes):
    return [(op, name, change) for op, names in tensors.items() for name in names for change in changes]


WRONG = [
    *each(FLOAT_TENSORS, with_rank_more, as_float64, last_dimension_strided, rows_unaligned, start_unaligned),
    *[w for w in each(FLOAT_TENSORS, as_bfloat16, as_e5m2, as_int8) if w[1] == "page_metadata"],
    *[w for w in each(FLOAT_TENSORS, as_e4m3) if w[1] != "page_metadata"],
    # Metadata of rank 4 is right too, and says then that a block is one page.
    *[w for w in each(FLOAT_TENSORS, with_rank_less) if w[1] != "page_metadata"],
    *each(INT32_TENSORS, as_int64, with_rank_more, longer, strided_integers),
    ("append", "slot_mapping", as_int32),
    ("append", "slot_mapping", with_rank_more),
    ("append", "slot_mapping", longer),
    ("append", "value", longer),
    ("append", "key", one_head_more),
    ("append", "value", shorter_last),
    ("append", "v_cache", longer),
    ("append", "v_cache", one_kv_head_less),
    ("append", "page_metadata", longer),
    ("append", "page_metadata", one_head_more),
    ("append", "page_metadata", shorter_last),
    ("update", "page_metadata", longer),
    ("scores", "query", longer),
    ("scores", "query", one_head_more),
    ("scores", "query", shorter_last),
    ("select", "scores", with_rank_less),
    ("select", "scores", as_float64),
    ("select", "scores", last_dimension_strided),
    ("attend", "query", longer),
    ("attend", "query", one_head_more),
    ("attend", "query", shorter_last),
    ("attend", "v_cache", longer),
    ("attend", "v_cache", shorter_last),
    ("attend", "page_ids", one_head_more),
    ("attend", "page_ids", empty_last),
    ("attend", "page_counts", one_head_more),
    ("attend", "out", longer),
    ("attend", "lse", longer),
    ("attend", "lse", as_float64),
    ("quest", "query", one_head_more),
    ("quest", "v_cache", longer),
    ("quest", "page_metadata", longer),
    ("quest", "out", one_head_more),
    ("quest", "lse", with_rank_more),
]


def assert_rejected(op, arguments, match):
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(BAD_INPUT, match=match):
        OPS[op](**arguments)
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True, msg=f"{name} was written")


@pytest.mark.parametrize("op, name, change", WRONG, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_wrong_tensor_is_named(device, op, name, change):
    arguments = good_arguments(op, device)
    arguments[name] = change(arguments[name])
    assert_rejected(op, arguments, f"{name}|head_dim" if change is shorter_last else name)


@pytest.mark.parametrize(
    "op, name, value",
    [
        *[(op, "bound", name) for op in ("append", "update") for name in ("", "min_max", "Cuboid")],
        *[(op, "bound", "median") for op in ("scores", "quest")],
        *[(op, "bound_scale", 1.5) for op in ("append", "update")],  # of minmax, which has no radius
        ("scores", "page_size", 0),
        ("scores", "page_size", 24),
        ("scores", "head_reduction", "median"),
        ("quest", "head_reduction", "MAX"),
        ("select", "page_size", -16),
        ("select", "sink_pages", -1),
        ("quest", "sink_pages", -1),
        ("select", "recent_pages", 0),
        ("quest", "recent_pages", 0),
        ("select", "page_budget", 0),
        ("select", "page_budget", 3),
        ("quest", "page_budget", 3),
        ("quest", "page_budget", -(2**40)),
        ("select", "page_budget", 2**40),
        ("attend", "page_size", 0),
        ("attend", "page_size", 24),
        ("attend", "page_size", 64),
    ],
)
def test_a_wrong_value_is_named(device, op, name, value):
    assert_rejected(op, good_arguments(op, device) | {name: value}, name)


@pytest.mark.parametrize("op", ["append", "update"])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e39, 1e-60])
def test_a_bound_scale_that_is_no_positive_float32_number_is_named(device, op, scale):
    for bound in ("minmax", "cuboid", "mean_std", "principal"):
        assert_rejected(op, good_arguments(op, device) | {"bound": bound, "bound_scale": scale}, "bound_scale")


@pytest.mark.parametrize("op", OPS)
def test_the_message_gives_what_was_received_and_what_is_supported(device, op):
    arguments = good_arguments(op, device)
    name = {"select": "scores", "append": "key", "update": "k_cache"}.get(op, "query")
    arguments[name] = arguments[name].double()
    assert_rejected(op, arguments, "float64")
    assert_rejected(op, arguments, "float32|float16")


@pytest.mark.parametrize("op", ["append", "update", "scores", "quest"])
def test_a_metadata_dtype_unlike_the_caches_is_named_beside_those_that_are_supported(device, op):
    arguments = good_arguments(op, device)
    for dtype in ("bfloat16", "float8_e5m2", "int8"):
        wrong = arguments["page_metadata"].to(getattr(torch, dtype))
        assert_rejected(op, arguments | {"page_metadata": wrong}, f"page_metadata.*float16.*float8_e4m3fn.*{dtype}")
    OPS[op](**arguments | {"page_metadata": as_e4m3(arguments["page_metadata"])})


@pytest.mark.parametrize("op", ["append", "update", "scores", "quest"])
def test_4_bit_metadata_of_another_shape_is_named(device, op):
    arguments = good_arguments(op, device)
    packed = make_metadata(dataclasses.replace(SHAPE, metadata_dtype=INT4), device)  # [num_blocks, 2, 2, 72]
    for wrong, message in (
        (packed[..., :64].contiguous(), "64.*9 / 8"),
        (torch.cat([packed, packed[..., :8]], -1), "80.*9 / 8"),
        (packed[:, :, None], r"uint8.*pages_per_block, 72\], got .*1, 2, 72"),
        (arguments["page_metadata"].view(torch.uint8), "uint8.*pages_per_block, 72"),
        (last_dimension_strided(packed), "contiguous"),
        (rows_unaligned(packed), "aligned"),
        (start_unaligned(packed), "aligned"),
        (torch.cat([packed, packed], -1)[..., :72], "contiguous within"),
    ):
        assert_rejected(op, arguments | {"page_metadata": wrong}, f"page_metadata.*{message}")
    OPS[op](**arguments | {"page_metadata": packed})


@pytest.mark.parametrize("op", ["append", "update", "attend", "quest", "scores"])
def test_an_unsupported_head_dim_is_named(device, op):
    shape = Shape((20,), 2, head_dim=96)
    case = build(shape, device)
    _, key, value = fused_slices(shape, 4, shape.generator(), device)
    arguments = good_arguments(op, device)
    small = {
        "key": key,
        "value": value,
        "slot_mapping": torch.arange(4, device=device),
        "query": case.query,
        "k_cache": case.k_cache,
        "v_cache": case.v_cache,
        "page_metadata": case.page_metadata,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "start_lens": torch.zeros_like(case.seq_lens),
    }
    arguments = {name: small.get(name, x) for name, x in arguments.items()}
    for name in ("page_ids", "page_counts", "page_budgets", "out", "lse"):
        arguments.pop(name, None)
    assert_rejected(op, arguments, "head_dim.*96|96.*head_dim")


@pytest.mark.parametrize("op", ["attend", "quest"])
@pytest.mark.parametrize("sm_scale", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_scale_that_is_no_float32_number_is_named(device, op, sm_scale):
    assert_rejected(op, good_arguments(op, device) | {"sm_scale": sm_scale}, "sm_scale")


@pytest.mark.parametrize("op", OPS)
def test_a_meta_tensor_among_others_is_named(device, op):
    """torch would call the fake, which writes nothing and returns what was never computed."""
    arguments = good_arguments(op, device)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            with pytest.raises(RuntimeError, match=f"{name} is on|but {name} is on"):
                OPS[op](**arguments | {name: x.to("meta")})


def test_page_counts_need_page_ids(device):
    assert_rejected("attend", good_arguments("attend", device) | {"page_ids": None}, "page_counts")


@pytest.mark.parametrize("listed", [[0, 3, -1], [0, 24, -1], [2**30, -1, -1], [1, 0, -1], [1, 1, 2]])
@pytest.mark.parametrize("counted", [True, False])
def test_wrong_page_ids_are_found_when_asked_for(device, monkeypatch, listed, counted):
    """Past the row's last page (2), or not ascending. QUEST_OPS_CHECK=1 is read at the call."""
    arguments = good_arguments("attend", device)
    if not counted:
        arguments["page_counts"] = None
    monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    OPS["attend"](**arguments)
    arguments["out"].fill_(5)
    arguments["page_ids"][1, 1] = torch.tensor(listed, device=device)
    if counted:
        arguments["page_counts"][1, 1] = 3 - listed.count(-1)
    assert_rejected("attend", arguments, "page_ids")


def test_wrong_blocks_and_slots_are_found_when_asked_for(device, monkeypatch):
    monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    for op in ("update", "scores", "attend", "quest"):
        OPS[op](**good_arguments(op, device))  # junk past the end is not looked at
        arguments = good_arguments(op, device)
        arguments["block_table"][0, 1] = SHAPE.num_blocks
        assert_rejected(op, arguments, "block_table")
    arguments = good_arguments("append", device)
    arguments["slot_mapping"][3] = SHAPE.num_blocks * SHAPE.block_size
    assert_rejected("append", arguments, "slot_mapping")


@pytest.mark.parametrize("op, name, change", WRONG, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_looking_at_values_leaves_wrong_tensors_to_the_op(device, monkeypatch, op, name, change):
    monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    test_a_wrong_tensor_is_named(device, op, name, change)


def test_lengths_past_the_table_are_clamped_when_values_are_looked_at(device, monkeypatch):
    monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    arguments = good_arguments("attend", device)
    arguments["seq_lens"][0] = 2**31 - 1
    arguments["block_table"][0] = 0
    OPS["attend"](**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["append", "update", "scores", "attend", "quest"])
def test_float32_is_for_the_cpu_alone(op):
    arguments = good_arguments(op, "cuda")
    halves = {name: x.float() for name, x in arguments.items() if getattr(x, "dtype", None) == torch.float16}
    assert_rejected(op, arguments | halves, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_tensor_on_another_device_is_named(op):
    arguments = good_arguments(op, "cuda")
    first = {"append": "key", "update": "k_cache", "select": "scores"}.get(op, "query")
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and name != first:
            assert_rejected(op, arguments | {name: x.cpu()}, "cpu")


def test_a_negative_slot_is_skipped_but_one_past_the_cache_is_named():
    arguments = good_arguments("append", "cpu")
    arguments["slot_mapping"][3] = SHAPE.num_blocks * SHAPE.block_size
    assert_rejected("append", arguments, "slot_mapping")
    arguments["slot_mapping"][3] = -(2**62)
    OPS["append"](**arguments)


@pytest.mark.parametrize("op", ["update", "scores", "attend", "quest"])
def test_a_block_outside_the_cache_is_named_on_the_cpu(op):
    for block in (SHAPE.num_blocks, -1):
        arguments = good_arguments(op, "cpu")
        arguments["block_table"][0, 1] = block
        assert_rejected(op, arguments, "block_table")

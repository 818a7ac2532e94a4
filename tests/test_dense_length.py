"""Up to which length a row is attended in full: as planned or as asked for, whatever the other rows of its step."""

import json
import pathlib

import pytest
import torch
from cases import OUT_TOLERANCE, assert_same_bits
from models import pages_of_16
from test_layer import DIM, HEADS, KV_HEADS, PAGE, make_attention, make_cache, make_config

from quest_ops import ops
from quest_ops.planner import plan_dense_length

MEASURED = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "break_even-h100.json"
H100 = {"head_dim": 128, "element_size": 2, "metadata_size": 2, "page_size": 16, "page_budget": 128, "num_sms": 132}
DENSE_BELOW = 10 * PAGE - 3  # of make_config's budget of 4 pages


@pytest.mark.parametrize(
    ("rows", "kv_heads", "changed", "tokens"),
    [
        (1, 32, {}, 2704),
        (1, 8, {}, 4432),
        (1, 4, {}, 6752),
        (8, 8, {}, 2400),
        (8, 4, {}, 2704),
        (33, 4, {}, 2256),  # 132 pairs of row and KV head: the last that are on the chip together
        (8, 32, {}, 2160),
        (32, 32, {}, 2128),
        (34, 4, {}, 2192),
        (1, 8, {"num_sms": 7}, 3424),  # of a small part of a GPU: in turns
        (16, 8, {"head_dim": 256}, 2160),  # one block of 256 channels an SM
        (1, 8, {"metadata_size": 1}, 4288),  # less metadata to read
        (1, 8, {"page_size": 8, "page_budget": 256}, 4744),  # more of it
        (1, 8, {"page_budget": 32}, 2832),
        (1, 8, {"page_budget": 512}, 10816),
        (128, 1, {"page_size": 128, "page_budget": 16}, 2048),  # never below the budget
        (10**6, 128, {}, 2112),
        (1, 8, {"budget_ratio": 0.1}, 4432),  # of 4432 tokens less than the budget
        (1, 8, {"budget_ratio": 0.5}, 4800),
        (1, 8, {"budget_ratio": 0.9}, 35280),
        (1, 8, {"budget_ratio": 0.99}, 2**31 - 16),  # with the metadata, more than dense attention reads
    ],
)
def test_planned_lengths(rows, kv_heads, changed, tokens):
    assert plan_dense_length(rows=rows, kv_heads=kv_heads, **H100 | changed) == tokens


def test_the_planned_length_is_where_both_read_for_equally_long():
    """The formula, put the other way round: the extra bytes of dense attention are worth Quest's longer start."""
    planned = plan_dense_length(rows=1, kv_heads=8, **H100)
    dense, quest = planned * 4096, 0.975 * (2048 + planned / 16) * 4096
    assert dense - quest == pytest.approx(8.9e6, rel=0.01)


def test_planned_lengths_are_whole_pages_and_fall_as_rows_are_added():
    for page_size, page_budget in ((8, 31), (16, 128), (64, 20)):
        sizes = H100 | {"page_size": page_size, "page_budget": page_budget}
        lengths = [plan_dense_length(rows=n, kv_heads=8, **sizes) for n in (1, 2, 3, 8, 16, 17, 64, 1000)]
        assert lengths == sorted(lengths, reverse=True)
        assert all(n >= page_budget * page_size and n % page_size == 0 for n in lengths)


def test_the_planned_choice_was_the_faster_one():
    """At every measured batch, group size and context: within 2% of the better of both."""
    for row in json.loads(MEASURED.read_text())["rows"]:
        planned = plan_dense_length(rows=row["batch"], kv_heads=32 // row["group"], **H100)
        chosen = row["dense_us"] if row["context"] <= planned else row["quest_us"]
        assert chosen <= 1.02 * min(row["dense_us"], row["quest_us"]), row["case"]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"token_budget": 512}, 512),
        ({"token_budget": 527}, 512),  # whole pages: 513 tokens are one more than it holds
        ({"token_budget": 527, "page_size": 8}, 520),
        ({"token_budget": 512, "dense_below": 0}, 0),
        ({"token_budget": 512, "dense_below": 1000}, 1000),
    ],
)
def test_on_a_cpu_the_length_follows_the_budget_unless_given(settings, tokens):
    config = pages_of_16(**settings)
    assert make_attention(make_cache(page_size=config.page_size), config).dense_length == tokens


@pytest.mark.gpu
def test_on_a_gpu_of_the_one_launch_path_the_length_is_planned():
    config = make_config(dense_below=None)
    attention = make_attention(make_cache("cuda"), config, max_sequence_tokens=2**20)
    planned = plan_dense_length(
        rows=3, kv_heads=KV_HEADS, head_dim=DIM, element_size=2, metadata_size=2, page_size=PAGE,
        page_budget=config.page_budget, num_sms=torch.cuda.get_device_properties("cuda").multi_processor_count,
    )  # fmt: skip
    assert planned > 4 * PAGE
    assert attention.dense_length == (planned if torch.cuda.get_device_capability() >= (9, 0) else 4 * PAGE)


def tokens_of(length, device):
    """Query, key and value of a sequence, which its length names."""
    rows = torch.randn(length, HEADS + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(length))
    return rows.half().to(device).split([HEADS, KV_HEADS, KV_HEADS], 1)


def last_outputs(attention, lengths, rows):
    """[N, rows, Hq, D]: of the last `rows` tokens of sequences of these lengths, decoded in one step."""
    cache, device = attention.cache, attention.cache.device
    seqs, texts = [cache.add() for _ in lengths], [tokens_of(length, device) for length in lengths]
    for seq, text in zip(seqs, texts):
        prompt = [x[:-rows] for x in text]
        attention.plan([seq], len(prompt[0]), prefill=True)
        attention.run(0, *prompt)
    attention.plan(seqs, rows)
    outs = attention.run(0, *(torch.cat([text[i][-rows:] for text in texts]) for i in range(3)))
    for seq in seqs:
        cache.free(seq)
    return outs.view(len(lengths), rows, HEADS, DIM)


@pytest.mark.parametrize("head_reduction", ["max", "none"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_sequence_gets_what_it_gets_alone(device, rows, head_reduction):
    """Within the budget, between budget and dense_below, up to and just over it, and far longer."""
    lengths = 20, 70, DENSE_BELOW, DENSE_BELOW + 1, DENSE_BELOW + 2, DENSE_BELOW + 3, 250
    cache = make_cache(device, num_blocks=128)
    config = make_config(dense_below=DENSE_BELOW, head_reduction=head_reduction)
    attention, dense = (make_attention(cache, config, backend=b, max_batch_size=7) for b in ("quest", "dense"))
    together, full = last_outputs(attention, lengths, rows), last_outputs(dense, lengths, rows)
    assert attention.step_kind == "quest"
    for i, length in enumerate(lengths):
        alone = last_outputs(attention, [length], rows)[0]
        assert attention.step_kind == ("dense" if length <= DENSE_BELOW else "quest")
        tolerance = {"rtol": OUT_TOLERANCE[torch.float16], "atol": OUT_TOLERANCE[torch.float16]}
        torch.testing.assert_close(together[i], alone, **tolerance)
        for t in range(rows):
            if length - rows + 1 + t <= DENSE_BELOW:
                torch.testing.assert_close(together[i, t], full[i, t], **tolerance)
            else:
                assert (together[i, t] - full[i, t]).abs().max() > 0.05, "a row of all tokens tells nothing"


def test_rows_over_the_length_keep_the_budget_of_the_config(device):
    """Beside rows that are attended in full, the bits of a step without any."""
    cache = make_cache(device, num_blocks=128)
    within, beyond = (make_attention(cache, make_config(dense_below=n)) for n in (0, DENSE_BELOW))
    expected, actual = (last_outputs(attention, [70, 200], 1)[1] for attention in (within, beyond))
    if device == "cpu":
        assert_same_bits(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=OUT_TOLERANCE[torch.float16], atol=OUT_TOLERANCE[torch.float16])


def test_plan_writes_the_budgets_of_the_rows_where_they_are(device):
    cache = make_cache(device, pages_per_block=2)
    attention = make_attention(cache, make_config(dense_below=DENSE_BELOW))
    full, kept = 10, 4
    a, b = cache.add(), cache.add()
    attention.plan([a, b], [DENSE_BELOW - 2, 150])
    addresses = set()
    for seqs, count, budgets in [
        ([a, b], 1, [full, kept]),
        ([b, None, a], 1, [kept, full, full]),  # a has DENSE_BELOW tokens
        ([a, b], 2, [kept] * 4),
        ([b], 1, [kept]),
    ]:
        attention.plan(seqs, count)
        assert attention.step_kind == "quest"
        assert attention.page_budgets.tolist() == budgets and attention.page_budgets.dtype == torch.int32
        addresses.add(attention.page_budgets.data_ptr())
    cache.rollback(a, 4)
    attention.plan([b, a], 3)
    assert attention.page_budgets.tolist() == [kept] * 3 + [full] * 2 + [kept]
    assert addresses == {attention.page_budgets.data_ptr()}


@pytest.mark.parametrize(
    ("dense_below", "page_budget", "given"),
    [
        (0, 4, False),
        (4 * PAGE, 4, False),
        (4 * PAGE + 1, 5, True),
        (DENSE_BELOW, 10, True),
        (39 * PAGE, 39, True),
    ],
)
def test_budgets_of_rows_are_given_where_they_differ(monkeypatch, dense_below, page_budget, given):
    calls, op = [], ops.quest_decode_step

    def noted(*inputs, **options):
        calls.append((inputs[8], options["page_budgets"] is not None))
        return op(*inputs, **options)

    monkeypatch.setattr(ops, "quest_decode_step", noted)
    last_outputs(make_attention(make_cache(), make_config(dense_below=dense_below)), [40 * PAGE], 1)
    assert calls == [(page_budget, given)]


def test_a_length_past_the_longest_sequence_makes_every_step_dense():
    attention = make_attention(make_cache(), make_config(dense_below=10**12))
    last_outputs(attention, [40 * PAGE, 3], 2)
    assert attention.step_kind == "dense"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_a_captured_step_replays_while_a_row_outgrows_the_length(rows):
    cache = make_cache("cuda", num_blocks=128)
    attention = make_attention(cache, make_config(dense_below=DENSE_BELOW))
    a, b = cache.add(), cache.add()
    for seq, length in ((a, DENSE_BELOW - 10), (b, 200)):
        attention.plan([seq], length, prefill=True)
        attention.run(0, *tokens_of(length, "cuda"))
    static = [x.clone() for x in tokens_of(2 * rows, "cuda")]
    graph, kinds = torch.cuda.CUDAGraph(), set()
    for step in range(20):
        attention.plan([a, b], rows)
        kinds.add(tuple(attention.page_budgets.tolist()))
        if step == 0:
            attention.run(0, *static)  # a warm-up; appending a second time changes nothing
            with torch.cuda.graph(graph):
                out = attention.run(0, *static)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, attention.run(0, *static))
    assert len(kinds) >= 2

"""The benchmarks' own arithmetic, and what of them runs without a GPU."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import pages_of_16, random_llama, small_config

import quest_ops
from quest_ops import PagedKVCache, QuestAttention, QuestConfig
from quest_ops.head_budgets import HeadBudgets
from quest_ops.llama.weights import expected_shapes

ROOT = Path(__file__).parent.parent
MODULES = (
    "timing", "cases", "peers", "phases", "record", "figures", "kernels", "break_even", "decoders", "end_to_end",
    "policies", "attend", "top_p", "fidelity", "forced", "tasks", "longer", "tables", "accuracy", "recordings",
    "exactness", "recorded", "stitched", "long_fidelity", "make_results",
)  # fmt: skip
ROW_KEYS = {"case", "path", "metadata", "page_size", "us", "flashinfer_us", "sdpa_us", "floor_us", "gbps", "ratio"}


@pytest.fixture(scope="module")
def bench():
    """The scripts' modules; they are no package, and one has the name of a module of the tests."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def test_floors_are_those_of_hand_computed_bytes(bench):
    cases = {case.name: case for case in bench.cases.CASES}
    mha, wide, narrow = cases["mha-32k-b1"], bench.cases.Pages(16), bench.cases.Pages(16, 8)
    vectors = 32 * 128 * 2  # bytes of a token's keys
    query_and_out = 2 * vectors
    metadata, kept, all_kv = 2 * 2048 * vectors, 2 * 2048 * vectors, 2 * 32768 * vectors
    assert bench.cases.counted_bytes(mha, "quest", wide) == metadata + kept + query_and_out
    assert bench.cases.counted_bytes(mha, "quest", narrow) == metadata // 2 + kept + query_and_out
    assert bench.cases.counted_bytes(mha, "quest", bench.cases.Pages(8, 8)) == metadata + kept + query_and_out
    for size in (16, 8, 4):  # a scale of 16 bits for 32 numbers of 4
        pages = bench.cases.PAGES[f"pages of {size}, 4-bit"]
        packed = metadata * 16 // size * 9 // 32
        assert bench.cases.counted_bytes(mha, "quest", pages) == packed + kept + query_and_out
    assert bench.cases.counted_bytes(mha, "dense", wide) == all_kv + query_and_out
    for name, pages, floor in (
        ("mha-32k-b1", wide, 25.1), ("mha-32k-b1", narrow, 19.4), ("mha-128k-b1", wide, 59.2),
        ("gqa8-32k-b1", wide, 8.0), ("gqa8-128k-b1", narrow, 10.8), ("gqa8-32k-b8", wide, 47.8),
    ):  # fmt: skip
        assert bench.kernels.floor_us(cases[name], "quest", pages) == pytest.approx(floor, abs=0.05)


def test_a_partial_last_page_and_a_request_within_the_budget_are_counted_as_they_are(bench):
    pages = bench.cases.Pages(16)
    case = bench.cases.Case("ragged", (100, 1000), kv_heads=1, query_heads=1, budget=128)
    kept = 100 + 7 * 16 + 8  # the long one's 63rd page holds 8 tokens
    assert bench.cases.counted_bytes(case, "quest", pages) == 256 * (2 * 63 + 2 * kept + 2 * 2)
    assert bench.cases.counted_bytes(case, "dense", pages) == 256 * (2 * 1100 + 2 * 2)
    ragged = next(case for case in bench.cases.CASES if case.name == "gqa8-b32-ragged")
    assert ragged.batch == 32 and sum(ragged.lengths) == pytest.approx(460_000, rel=1e-3)
    assert 1024 <= min(ragged.lengths) and ragged.context <= 65536


def test_break_even_is_where_quest_starts_to_win_for_good(bench):
    find = bench.break_even.break_even_context
    gain = bench.break_even.GAIN
    assert find([1024, 2048, 4096], [gain * 0.5, gain / 2**0.5, gain * 2**0.5]) == pytest.approx(2048 * 2**0.5)
    assert find([1024, 2048, 4096, 8192], [2.0, gain * 0.5, gain * 2, 3.0]) == pytest.approx(2048 * 2**0.5)
    assert find([1024, 2048], [1.1, 1.2]) == 1024
    assert find([1024, 2048], [1.1, 1.0]) is None


def test_phases_are_the_median_over_the_blocks_that_ran(bench):
    before = torch.zeros(264, 10, dtype=torch.int64)
    after = before.clone()
    after[:3] = (torch.arange(10) * 100 + 2**32 - 500) % 2**32  # the clock wraps around
    cycles = bench.phases.median_cycles(before, after)
    assert list(cycles) == list(bench.phases.PHASES) and cycles["before"] == 100 and sum(cycles.values()) == 900
    assert bench.phases.median_cycles(before, before) is None


class PagedDecode:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper by its documentation, for pools in HND."""

    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert kv_layout == "HND"

    def plan(self, starts, indices, last, query_heads, kv_heads, head_dim, page_size, q_data_type, kv_data_type):
        self.starts, self.indices, self.last = starts.tolist(), indices, last.tolist()
        self.shape = kv_heads, page_size, head_dim

    def run(self, query, cache):
        outputs = []
        for r, last in enumerate(self.last):
            pages = self.indices[self.starts[r] : self.starts[r + 1]].long()
            length = (len(pages) - 1) * self.shape[1] + last
            k, v = (pool[pages].transpose(0, 1).flatten(1, 2)[:, :length] for pool in cache)
            assert cache[0].shape[1:] == self.shape
            outputs.append(F.scaled_dot_product_attention(query[r].view(k.size(0), -1, k.size(2)), k, v))
        return torch.stack(outputs).view_as(query)


@pytest.mark.parametrize("query_heads", [2, 8])
def test_quest_of_public_parts_attends_to_the_pages_that_it_selects(bench, monkeypatch, query_heads):
    flashinfer = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode)
    monkeypatch.setattr(bench.peers, "flashinfer_module", lambda: flashinfer)
    case = bench.cases.Case("small", (1024, 1024), 2, query_heads, budget=256, dtype=torch.float32)
    bench.peers.PublicQuest(bench.cases.Layers(case, "cpu"), tensor_cores=False).check()


@pytest.fixture
def run_script(bench, monkeypatch, capfd):
    """run_script(name, *arguments) -> subprocess.CompletedProcess of `python benchmarks/name arguments`, which runs in
    this process: torch is there already."""

    def run(name, *arguments):
        command = [str(ROOT / "benchmarks" / name), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
        out, error = capfd.readouterr()
        if isinstance(code, str):  # Python writes it to stderr
            code, error = 1, f"{error}{code}\n"
        return subprocess.CompletedProcess(command, code, out, error)

    return run


def test_quick_run_on_the_cpu_writes_rows_and_a_figure(tmp_path):
    """In a process of its own, as the scripts are run."""
    pytest.importorskip("matplotlib")
    files = "--json", tmp_path / "k.json", "--figure", tmp_path / "k.png"
    kinds = "--pages", "pages of 16", "--pages", "pages of 8, 8-bit", "--pages", "pages of 4, 4-bit"
    command = [sys.executable, ROOT / "benchmarks/kernels.py", "--quick", "--case", "cpu-4k-b1-fp32", *kinds, *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "k.json").read_text())
    assert {"gpu", "torch", "command", "csrc_tree", "rows"} <= set(record)
    assert len({(row["path"], row["page_size"], row["metadata"]) for row in record["rows"]}) == len(record["rows"])
    assert {(row["page_size"], row["metadata"]) for row in record["rows"]} == {(16, "32"), (8, "8"), (4, "4")}
    for row in record["rows"]:
        assert set(row) >= ROW_KEYS and row["us"] > 0 and math.isfinite(row["gbps"])
        assert row["ratio"] == pytest.approx(row["sdpa_us"] / row["us"])
    assert {"append", "estimate", "select", "attend", "separate", "quest", "dense", "sdpa"} <= {
        row["path"] for row in record["rows"]
    }
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


def test_both_figures_are_drawn_from_a_json(bench, tmp_path):
    pytest.importorskip("matplotlib")
    pages = bench.cases.Pages(16)
    rows = []
    for case in bench.cases.CASES:
        rows += bench.kernels.rows_of(case, [(pages, "quest", 9.0), (pages, "flashinfer", 50.0)], True, 50.0, None)
    machine = {"gpu": "a GPU", "torch": "2.11"}
    bench.figures.draw(machine | {"rows": rows}, tmp_path / "kernels.png")
    curve = [{"group": 1, "batch": 8, "context": 1024 * k, "speedup": float(k)} for k in (1, 4, 16)]
    bench.figures.draw(machine | {"rows": curve}, tmp_path / "break_even.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("kernels", "break_even"))
    with pytest.raises(ValueError, match="nothing to draw"):
        bench.figures.draw(machine | {"rows": []}, tmp_path / "none.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [(), ("--extra",), ("--phases",)])
def test_without_a_gpu_the_error_is_one_line(run_script, arguments):
    done = run_script("kernels.py", *arguments)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("--quick times small cases on the CPU")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512)],
)
def test_the_shapes_have_the_published_numbers_of_parameters(bench, name, parameters):
    assert sum(map(math.prod, expected_shapes(bench.decoders.SHAPES[name]).values())) == parameters


def small_decoder(bench, name):
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100, "head_dim": 64}
    return bench.decoders.random_decoder(
        dataclasses.replace(bench.decoders.SHAPES[name], **shape), torch.float32, "cpu"
    )


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b", "qwen2.5-7b"])
@torch.inference_mode()
def test_all_attentions_are_compared_in_every_layer_before_they_are_timed(bench, name, monkeypatch):
    model = small_decoder(bench, name)
    quests = [pages_of_16(), pages_of_16(dense_layers=(0,)), QuestConfig()]
    eight_bit = QuestConfig(metadata_dtype=torch.float8_e4m3fn)
    quests += [eight_bit, QuestConfig(**bench.end_to_end.POLICIES["pages-of-4"])]
    entries = bench.end_to_end.entries_of(["quest", "dense", "sdpa"], quests)
    assert len(entries) == 7
    bench.end_to_end.check(model, entries)

    class Wrong(bench.decoders.PagedAttention):
        def __init__(self, pool, backend, quest):
            super().__init__(pool, backend, quest)
            pool.cache.k_cache(1)[7, 3, 0].add_(1)  # a single vector

    monkeypatch.setattr(bench.end_to_end, "PagedAttention", Wrong)
    with pytest.raises(RuntimeError, match="quest attention, layer 1 is wrong"):
        bench.end_to_end.check(model, entries)


@torch.inference_mode()
def test_attentions_share_a_pool_where_pages_and_metadata_agree(bench):
    quests = [
        pages_of_16(), pages_of_16(dense_layers=(0,)), pages_of_16(metadata_dtype=torch.float8_e4m3fn),
        QuestConfig(), QuestConfig(select_every=2), QuestConfig(page_size=16),
    ]  # fmt: skip
    entries = bench.end_to_end.entries_of(["quest", "dense"], quests)
    made = bench.end_to_end.paged_attentions(small_decoder(bench, "qwen2.5-7b"), 1, 32, entries)
    pools = [made[entry].pool for entry in entries]
    assert [pools.index(pool) for pool in pools] == [0, 0, 2, 3, 3, 5, 0]


@torch.inference_mode()
def test_both_caches_hold_the_same_tokens_after_a_step(bench):
    model, size = small_decoder(bench, "qwen2.5-7b"), (2, 100)
    pool, contiguous = (
        bench.decoders.FilledPool(model, *size, QuestConfig()),
        bench.decoders.ContiguousAttention(model, *size),
    )
    paged = bench.decoders.PagedAttention(pool, "dense", QuestConfig())
    for attention in (paged, contiguous):
        for _ in range(2):  # a step can be repeated
            attention.plan()
            bench.end_to_end.greedy_step(model, attention, *size)
    for layer in range(2):
        keys, values = contiguous.caches[layer].transpose(2, 3)  # [B, tokens, Hkv, D]
        for b, seq in enumerate(pool.seqs):
            assert pool.cache.length(seq) == 100
            blocks = pool.cache.block_ids(seq)
            for expected, held in ((keys, pool.cache.k_cache(layer)), (values, pool.cache.v_cache(layer))):
                torch.testing.assert_close(held[blocks].flatten(0, 1)[:100], expected[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [4, 8])  # 8: a page
@torch.inference_mode()
def test_a_timed_cycle_chooses_pages_once_and_the_pool_serves_others_at_any_point(bench, n):
    model, (batch, context) = small_decoder(bench, "qwen2.5-7b"), (2, 192)
    quest = QuestConfig(token_budget=96, dense_below=0)
    pool = bench.decoders.FilledPool(model, batch, context, quest)
    every_step, every_nth = (
        bench.decoders.PagedAttention(pool, "quest", dataclasses.replace(quest, select_every=every)) for every in (1, n)
    )
    assert (every_step.cycle, every_nth.cycle) == (1, n)
    whole = list(range(n - 1, -1, -1))
    for lefts in (whole, whole, whole[:2]):  # on a GPU a cycle is left in its second step
        kinds = []
        for left in lefts:
            every_nth.plan(left)
            bench.end_to_end.greedy_step(model, every_nth, batch, context)
            kinds.append(every_nth.attention.step_kind)
            assert pool.cache.length(pool.seqs[1]) == context - left
        assert kinds == ["quest"] + ["reuse"] * (len(lefts) - 1)
    for attention in (every_step, every_nth):
        for _ in range(2):
            attention.plan()
            assert attention.attention.step_kind == "quest" and pool.cache.length(pool.seqs[1]) == context


def test_the_ratio_is_to_flashinfer_where_there_and_the_shares_add_up(bench):
    wide = pages_of_16()
    narrow = pages_of_16(metadata_dtype=torch.float8_e4m3fn, dense_layers=(0, 1), select_every=4)
    times = {("quest", wide): 10.0, ("quest", narrow): 8.0, ("quest", QuestConfig()): 9.0}
    times |= {("flashinfer", wide): 30.0, ("sdpa", wide): 40.0}
    for absent, ratio in (((), 3.0), (("flashinfer",), 4.0), (("flashinfer", "sdpa"), None)):
        present = {entry: ms for entry, ms in times.items() if entry[0] not in absent}
        rows = bench.end_to_end.rows_of("m", "int4", 4, 8192, {**present, "without": 5.0, "products": 4.0})
        assert rows[0]["case"] == "m-8k-b4" and rows[0]["ratio"] == ratio and rows[0]["tokens_per_s"] == 400
        assert [rows[0][f"{part}_share"] for part in bench.end_to_end.SHARES] == pytest.approx([0.5, 0.4, 0.1])
        names = [bench.figures.label_of(row) for row in rows]
        assert names[:2] == ["quest", "quest, 8-bit metadata, 2 dense layers, select every 4"]
        assert names[2] == "quest, 4-bit metadata, pages of 8" and len(names) == len(present)
        assert [(row["page_size"], row["bound"]) for row in rows[1:3]] == [(16, "minmax"), (8, "principal")]
        older = {key: rows[0][key] for key in ("attention", "metadata", "dense_layers")}
        assert bench.figures.label_of(older) == names[0]


def test_one_context_is_drawn_as_bars_and_several_as_lines(bench, tmp_path):
    pytest.importorskip("matplotlib")
    times = {("quest", QuestConfig()): 9.0, ("sdpa", QuestConfig()): 40.0, "without": 5.0, "products": 4.0}
    one, other = (bench.end_to_end.rows_of("m", "int4", 1, context, times) for context in (8192, 32768))
    drawn = []
    for name, rows in (("one", one), ("two", one + other)):
        bench.figures.draw({"gpu": "a GPU", "torch": "2.11", "rows": rows}, tmp_path / name)
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert drawn[0] != drawn[1] and all(picture.startswith(b"\x89PNG") for picture in drawn)


def test_quests_of_several_budgets_are_drawn_beside_their_peers(bench):
    """What for-context gives may differ from a policy in the budget alone."""
    quests = QuestConfig(page_size=16), QuestConfig.for_context(131072)
    times = {("quest", quests[0]): 9.0, ("quest", quests[1]): 9.5, ("sdpa", quests[0]): 40.0}
    rows = bench.end_to_end.rows_of("m", "int4", 1, 131072, {**times, "without": 5.0, "products": 4.0})
    ((title, _, lines),) = bench.figures._end_to_end(rows)
    assert title == "m, batch 1, int4"
    called = "quest, 4-bit metadata, budget"
    assert [(name, points) for name, points, _ in lines] == [
        (f"{called} 2048", [(131072, 9.0)]), (f"{called} 4352", [(131072, 9.5)]), ("sdpa", [(131072, 40.0)]),
    ]  # fmt: skip
    assert bench.figures._end_to_end(rows[:1])[0][0] == "m, batch 1, int4, budget 2048"


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@torch.inference_mode()
def test_the_products_are_those_of_a_step(bench, weights):
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100, "head_dim": 64}
    shape = dataclasses.replace(bench.decoders.SHAPES["llama-3.1-8b"], **shape)
    model, calls = bench.decoders.random_decoder(shape, torch.bfloat16, "cpu", weights), []
    for module in model.modules():
        if hasattr(module, "in_features"):
            module.register_forward_pre_hook(lambda module, x: calls.append((id(module), x[0].shape)))
    bench.end_to_end.greedy_step(model, bench.decoders.NoAttention(), 3, 1000)
    step = calls.copy()
    calls.clear()
    bench.end_to_end.products(model, 3, compiled=False)()
    assert sorted(calls) == sorted(step) and len(step) == 2 * 4 + 1  # two layers and the logits


def test_quick_end_to_end_run_writes_rows_and_a_figure(bench, monkeypatch, tmp_path):
    """Of a small model, each step once: what it measures is not looked at here."""
    pytest.importorskip("matplotlib")

    def load(source, *, dtype, weights, device):
        return random_llama(small_config(max_position_embeddings=2048), dtype, device, weights), None

    monkeypatch.setattr(bench.end_to_end.Llama, "load", load)
    monkeypatch.setattr(bench.end_to_end, "CPU_TURNS", 1)
    monkeypatch.setattr(bench.end_to_end, "CPU_PASSES", 1)
    files = "--json", tmp_path / "e.json", "--figure", tmp_path / "e.png"
    settings = "--weights", "int8", "--dense-layers", "2", "--select-every", "1", "2"
    settings = *settings, "--policy", "default", "for-context"
    settings = *settings, "--attention", "sdpa", "quest", *map(str, files)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--quick", "--context", "1024", "2048", *settings])
    bench.end_to_end.main()
    record = json.loads((tmp_path / "e.json").read_text())
    assert {"gpu", "torch", "command", "csrc_tree", "threads", "rows"} <= set(record)
    keys = "context", "attention", "page_size", "budget", "bound", "metadata", "dense_layers", "select_every"
    assert sorted(tuple(row[key] for key in keys) for row in record["rows"]) == [
        row
        for context in (1024, 2048)
        for row in (
            (context, "quest", 4, 512 - context // 128, "principal", "4", 2, 1),
            (context, "quest", 4, 512 - context // 128, "principal", "4", 2, 2),
            (context, "quest", 8, 512, "principal", "4", 2, 1),
            (context, "quest", 8, 512, "principal", "4", 2, 2),
            (context, "sdpa", 8, 512, "principal", "4", 2, 1),
        )
    ]
    for row in record["rows"]:
        ms, without, products = (row[name] for name in ("ms", "without_attention_ms", "products_ms"))
        assert row["weights"] == "int8" and min(ms, without, products) > 0
        shares = [row[f"{part}_share"] for part in ("attention", "weights", "other")]
        assert shares == pytest.approx([1 - without / ms, products / ms, (without - products) / ms])
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a CUDA device; --quick times SmolLM2 on the CPU"),
        (("--quick", "--attention", "flashinfer"), "--attention flashinfer needs a CUDA device"),
        (("--quick", "--budget", "32"), "at least 88"),
        (("--quick", "--dense-layers", "-1"), "must be 0 or more, got -1"),
        (
            ("--quick", "--policy", "minmax", "default", "--select-every", "16"),
            "select_every must be 1 to page_size = 8, got 16: a page's first token always chooses pages",
        ),
        (("--quick", "--select-every", "1", "3"), "--select-every must divide a page of 8 tokens, got 3"),
        (
            ("--quick", "--select-every", "8", "--context", "2044"),
            "--context must be a multiple of --select-every, got 2044",
        ),
    ],
)
def test_end_to_end_says_in_one_line_what_it_cannot_do(run_script, arguments, message):
    done = run_script("end_to_end.py", *arguments)
    assert done.returncode != 0 and done.stderr.splitlines()[-1].endswith(message)


def test_end_to_end_refuses_contexts_past_the_positions_of_a_checkpoint(smollm2, run_script):
    done = run_script("end_to_end.py", "--quick", "--context", "9000")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "--context 9000 is more than the 8192 positions of smollm2"


class Bytes:
    """A tokenizer whose tokens are bytes, and 0 before a text."""

    def encode(self, text, add_special=True):
        return [0] * add_special + list(text.encode())


LETTERS = {"letters": list(b"abcdefghij" * 300), "capitals": list(b"KLMNOPQRST" * 200)}


def test_pieces_of_a_text_do_not_overlap(bench):
    numbered = {"numbers": list(range(1000)), "more": list(range(1000, 3000))}
    found = bench.tasks.pieces(numbered, 300, 3)
    assert [kind for kind, _ in found] == ["numbers"] * 3 + ["more"] * 3
    assert all(tokens == list(range(tokens[0], tokens[0] + 300)) for _, tokens in found)
    assert len({token for _, tokens in found for token in tokens}) == 6 * 300
    with pytest.raises(ValueError, match="numbers has 1000 tokens, too few for 4 pieces of 300"):
        bench.tasks.pieces(numbered, 300, 4)


def test_a_document_holds_each_fact_at_its_depth_and_a_question_asks_for_it(bench):
    asker = bench.tasks.Asker(Bytes(), 1000, seed=0)
    bodies = bench.tasks.pieces(LETTERS, 1000, 1)
    asker.passkeys(bodies, 4)
    asker.needles(bodies, 5)
    asker.lookups(2, 6)
    assert len(asker.documents) == 2 * 4 + 2 + 2 and len(asker.questions) == 2 * 4 + 2 * 5 + 2 * 6
    asked_before = {}
    for question in asker.questions:
        document = bytes(asker.documents[question.continuation.document])
        assert document[0] == 0 and 970 < len(document) <= 1000
        text = bytes(question.continuation.tokens).decode()
        asked, answer = text[: -question.answer], text[-question.answer :]
        assert answer.strip().isdigit() and len(answer.strip()) == 5
        stated = asked.strip().splitlines()[-1].split("? ")[-1]  # of the question and the start of its answer
        place = document.decode().lower().index(f"{stated}{answer}".lower())
        key = question.continuation.document, question.kind
        assert place > asked_before.get(key, 0), "questions follow the order of the text"
        asked_before[key] = place
    places = [bytes(document).index(b"The pass key") for document in asker.documents[:4]]
    assert places == pytest.approx([(i + 0.5) / 4 * 940 for i in range(4)], abs=15)
    depths = [question.depth for question in asker.questions]
    assert depths[:4] == [0.125, 0.375, 0.625, 0.875] and depths[8:13] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for question in asker.questions:
        document = bytes(asker.documents[question.continuation.document])
        number = bytes(question.continuation.tokens).rsplit(maxsplit=1)[1]
        assert document.index(number) / len(document) == pytest.approx(question.depth, abs=0.12)
    kinds = [question.kind for question in asker.questions]
    assert kinds == ["letters"] * 4 + ["capitals"] * 4 + ["letters"] * 5 + ["capitals"] * 5 + ["list"] * 12


def small_model(bench, vocab_size=100, device="cpu"):
    config = dataclasses.replace(
        bench.decoders.SHAPES["llama-3.1-8b"], num_hidden_layers=3, hidden_size=64, intermediate_size=64,
        vocab_size=vocab_size, head_dim=64, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return random_llama(config, torch.float32, device)


def small_documents(bench):
    model = small_model(bench)
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randint(100, (n,), generator=generator).tolist() for n in (210, 144, 155)]
    tails = [
        (document, torch.randint(100, (n,), generator=generator).tolist()) for document, n in ((0, 20), (2, 9), (0, 2))
    ]
    continuations = [bench.forced.Continuation(*tail) for tail in tails]
    return bench.forced.Documents(model, prefixes, 20, lambda done, total: None), continuations


def one_token_a_step(documents, config, blank, continuation, runs_of=lambda attention: attention):
    """Losses and hits of a continuation, in a cache of its own. runs_of(attention): what attends in the steps."""
    model, prefix = documents.model, documents.prefixes[continuation.document]
    shape = model.config
    cache = PagedKVCache(
        shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, 80, page_size=config.page_size,
        pages_per_block=1, dtype=model.dtype, metadata_dtype=config.metadata_dtype,
    )  # fmt: skip
    attention = QuestAttention(config, cache, shape.num_attention_heads, max_batch_size=1, max_sequence_tokens=300)
    seq = cache.add()
    attention.plan([seq], len(prefix), prefill=True)
    model(torch.tensor(prefix), attention.positions, attention)
    if blank:
        for layer in range(cache.num_layers):
            cache.page_metadata(layer).zero_()
    logits = []
    for token in continuation.tokens[:-1]:
        attention.plan([seq], 1)
        logits.append(model(torch.tensor([token]), attention.positions, runs_of(attention))[0])
    logits, asked = torch.stack(logits), torch.tensor(continuation.tokens[1:])
    return F.cross_entropy(logits, asked, reduction="none"), logits.argmax(-1) == asked


@torch.inference_mode()
def test_teacher_forcing_is_decoding_one_token_a_step(bench):
    """For every policy, documents and continuations of any length, and again after others have used the caches."""
    documents, continuations = small_documents(bench)
    dense = documents.predict(None, 0, continuations)
    differing = set()
    for policy in [*bench.policies.POLICIES, bench.policies.POLICIES[0]]:
        config = policy.config(96)
        predictions = documents.predict(policy, 96, continuations)
        for prediction, continuation, exact in zip(predictions, continuations, dense):
            runs_of = [lambda attention: bench.attend.OracleAttention(attention, rows=1)] * policy.oracle
            loss, hit = one_token_a_step(documents, config, policy.recent_only, continuation, *runs_of)
            torch.testing.assert_close(prediction.loss, loss, rtol=1e-4, atol=1e-4)
            assert torch.equal(prediction.hit, hit)
            if (prediction.loss - exact.loss).abs().max() > 1e-3:
                differing.add(policy.name)
    assert differing == {policy.name for policy in bench.policies.POLICIES}
    every_token = QuestConfig(token_budget=512, dense_below=0)
    for prediction, continuation in zip(dense, continuations):
        loss, _ = one_token_a_step(documents, every_token, False, continuation)
        torch.testing.assert_close(prediction.loss, loss, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_no_choice_of_as_many_pages_keeps_more_mass_than_the_oracle(bench):
    documents, _ = small_documents(bench)
    attention = documents.attention_of(next(p for p in bench.policies.POLICIES if p.oracle), 96)
    attention.plan([attention.cache.fork(0)], 8)  # 14 pages: the first, the last two and three of the others
    step = bench.attend.Step(attention)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 8, 4, 64, generator=generator).unbind()
    step.append(1, key[:, :2], value[:, :2])

    def mass(lse):  # that the two query heads of a KV head keep
        return (lse - step.exact(1, 3 * query)[1]).exp().unflatten(1, (2, 2)).sum(2)

    masses = torch.stack([
        mass(step.listed(1, 3 * query, torch.tensor([0, *middle, 12, 13]).int().repeat(8, 2, 1))[1])
        for middle in itertools.combinations(range(1, 12), 3)
    ])  # fmt: skip
    best = mass(step.oracle(1, 3 * query)[1])
    torch.testing.assert_close(best, masses.amax(0), rtol=1e-5, atol=1e-5)
    assert (best > masses.median(0).values * 1.2).all() and (best < 2).all()


def attend_in_words(query, keys, values, length, page_ids):
    """Output of the tokens of some pages, and their share of the attention to all `length`, for one query head."""
    logits = keys[:length] @ query / 8
    chosen = torch.isin(torch.arange(length) // 16, page_ids)
    return logits[chosen].softmax(0) @ values[:length][chosen], logits.softmax(0)[chosen].sum()


@torch.inference_mode()
def test_fidelity_is_the_error_and_the_mass_of_the_chosen_pages(bench):
    documents, _ = small_documents(bench)
    policies = {policy.name: policy for policy in bench.policies.POLICIES}
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 16, 4, 64, generator=generator).unbind()  # of two sequences, 8 rows each
    for name in ("minmax", "paper"):
        attention = documents.attention_of(policies[name], 96)
        cache, config = attention.cache, attention.config
        seqs = [cache.fork(0), cache.fork(2)]
        attention.plan(seqs, 8)
        probe = bench.fidelity.Probe(attention, oracle=False, windows=2)
        outs = [probe.run(layer, query, key[:, :2], value[:, :2]) for layer in range(3)]
        scores = quest_ops.estimate_page_scores(
            query, cache.page_metadata(2), attention.block_table[:2], attention.seq_lens, 16, "max"
        )
        page_ids, _ = quest_ops.select_topk_pages(
            scores, attention.seq_lens, 16, 6, config.sink_pages, config.recent_pages
        )
        expected = torch.zeros(3, 2, 4, dtype=torch.float64)
        for row, head in itertools.product(range(16), range(4)):
            length, blocks = int(attention.seq_lens[row]), cache.block_ids(seqs[row // 8])
            keys, values = (pool[blocks, :, head // 2].flatten(0, 1) for pool in (cache.k_cache(2), cache.v_cache(2)))
            exact, all_of_it = attend_in_words(query[row, head], keys, values, length, torch.arange(20))
            out, mass = attend_in_words(query[row, head], keys, values, length, page_ids[row, head // 2])
            assert all_of_it == pytest.approx(1) and torch.allclose(outs[2][row, head], exact, atol=1e-5)
            terms = (out - exact).square().sum(), exact.square().sum(), mass
            expected[:, row // 8, head] += torch.stack(terms)
        torch.testing.assert_close(probe.sums[:, :, 2], expected, rtol=1e-4, atol=1e-5)
        dense_layers = probe.sums[:, :, :2]
        assert (dense_layers[0].max() == 0) == (name == "paper") and (dense_layers[2].min() == 8) == (name == "paper")
        found = bench.fidelity.summary(probe.sums, 8, ["a", "b"])
        error = (expected[0].sum(0) / expected[1].sum(0)).sqrt()
        assert found["error_by_head"][2] == pytest.approx(error.tolist(), abs=2e-4)
        assert found["mass_by_layer"][2] == pytest.approx(expected[2].mean().item() / 8, abs=2e-4)
        assert found["error"] == pytest.approx(sum(found["error_by_kind"].values()) / 2)


@torch.inference_mode()
def test_all_policies_of_fidelity_meet_the_queries_of_exact_attention(bench):
    documents, continuations = small_documents(bench)
    attention = documents.attention_of(bench.policies.POLICIES[0], 96)
    probe = bench.fidelity.Probe(attention, oracle=False, windows=len(continuations))
    dense = documents.predict(None, 0, continuations)
    for prediction, exact in zip(documents.decode(attention, probe, continuations), dense):
        torch.testing.assert_close(prediction.loss, exact.loss, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_budget_that_covers_the_documents_is_no_measurement(bench):
    documents, continuations = small_documents(bench)
    with pytest.raises(RuntimeError, match="covers"):
        documents.predict(bench.policies.POLICIES[2], 512, continuations)


def test_policies_fill_equal_budgets(bench):
    for policy in bench.policies.POLICIES:
        for budget in (128, 256, 512, 1024):
            config = policy.config(budget)
            assert config.page_budget * config.page_size == budget
            if policy.recent_only:
                assert config.sink_pages + config.recent_pages == config.page_budget - 1
    assert {policy.metadata_bytes for policy in bench.policies.POLICIES} == {0, 0.5625, 1, 1.125, None}
    assert bench.policies.POLICIES[0].config(256) == QuestConfig.paper(token_budget=256, dense_below=256)


@pytest.fixture
def budgets_file(tmp_path):
    path = tmp_path / "budgets.json"
    HeadBudgets("any", 8, 16, 32, "mean_std", 1.0, 128, ((56, 200), (64, 192), (128, 128))).save(path)
    return path


@torch.inference_mode()
def test_budgets_by_head_are_compared_beside_the_policy_they_were_measured_with(bench, budgets_file):
    """Through the same decode steps, and fidelity counts the same choice of pages."""
    pairs = bench.accuracy.compared(bench.policies.POLICIES, [128, 512], [budgets_file])
    assert len(pairs) == 2 * len(bench.policies.POLICIES) + 1
    layouts = [(policy.page_size, policy.metadata_bits) for policy, _ in pairs]
    assert layouts == sorted(layouts, reverse=True)  # those of a cache stand together
    ((policy, budget),) = [(p, b) for p, b in pairs if p.head_budgets]
    assert (policy.name, budget, policy.metadata_bytes) == ("mean_std 1, pages of 8, 8-bit, by head", 128, 1)
    documents, continuations = small_documents(bench)
    for prediction, continuation in zip(documents.predict(policy, 128, continuations), continuations):
        loss, _ = one_token_a_step(documents, policy.config(128), False, continuation)
        torch.testing.assert_close(prediction.loss, loss, rtol=1e-4, atol=1e-4)
    attention = documents.attention_of(policy, 128)
    attention.plan([attention.cache.fork(0)], 8)
    step = bench.attend.Step(attention)
    query, key, value = torch.randn(3, 8, 4, 64, generator=torch.Generator().manual_seed(0)).unbind()
    for layer in range(3):
        out = attention.run(layer, query, key[:, :2], value[:, :2])
        assert torch.equal(step.quest(layer, query)[0], out)


def test_budgets_by_head_that_cannot_be_compared_are_named(bench, budgets_file):
    with pytest.raises(ValueError, match=r"budgets.json is for a budget of 128, not of --budget \[256\]"):
        bench.accuracy.compared(bench.policies.POLICIES, [256], [budgets_file])
    HeadBudgets("any", 32, 32, 32, "cuboid", 1.0, 128, ((128,),)).save(budgets_file)
    with pytest.raises(ValueError, match="no policy here has pages of 32 with bound cuboid 1"):
        bench.accuracy.compared(bench.policies.POLICIES, [128], [budgets_file])


def test_budgets_by_head_stand_beside_the_named_policies_alone(bench, budgets_file, monkeypatch):
    names = "principal 1, pages of 8, 4-bit, select every 2", "minmax"
    arguments = "--quick", "--budget", "128", "--policy", *names, "--head-budgets", budgets_file
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "needles", *map(str, arguments)])
    pairs = bench.accuracy.parse().compared
    assert [(policy.name, policy.select_every, budget) for policy, budget in pairs] == [
        ("minmax", 1, 128),
        ("mean_std 1, pages of 8, 8-bit, by head", 1, 128),
        ("principal 1, pages of 8, 4-bit, select every 2", 2, 128),
    ]


def test_quick_accuracy_run_writes_rows_and_a_figure(smollm2, run_script, tmp_path):
    pytest.importorskip("matplotlib")
    files = "--json", tmp_path / "a.json", "--figure", tmp_path / "a.png"
    policies = "sink + recent", "mean_std 1, pages of 8, 8-bit", "principal 1, pages of 4, 4-bit"
    settings = "--context", "240", "--budget", "128", "--policy", *policies
    done = run_script("accuracy.py", "passkey", "--quick", *settings, *files)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert {"gpu", "torch", "command", "csrc_tree", "model", "texts", "rows"} <= set(record)
    assert [row["policy"] for row in record["rows"]] == list(policies)
    for row in record["rows"]:
        right, trials = map(sum, zip(*row["found_by_kind"].values()))
        assert trials == row["trials"] > 10 and right == round(row["found"] * trials)
        assert list(row["found_by_depth"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
        assert tuple(map(sum, zip(*row["found_by_depth"].values()))) == (right, trials)
    found = {row["policy"]: row["found"] for row in record["rows"]}
    assert found["mean_std 1, pages of 8, 8-bit"] > found["sink + recent"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_quick_fidelity_run_names_the_texts_and_draws_the_layers(bench, run_script, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    model = small_model(bench, vocab_size=256)
    monkeypatch.setattr(bench.accuracy.Llama, "load", lambda *arguments, **options: (model, Bytes()))
    novel, json_file, figure = tmp_path / "novel.txt", tmp_path / "f.json", tmp_path / "f.png"
    novel.write_text("".join(f"Chapter {i}. It was the best of times.\n" for i in range(100)), encoding="utf-8")
    others = "sink + recent", "minmax", "mean_std 1"
    sizes = "--context", "300", "--budget", "128", "--pieces", "1", "--policy", *others, "oracle"
    done = run_script(
        "accuracy.py", "fidelity", "--quick", *sizes, "--text", novel, "--json", json_file, "--figure", figure
    )
    assert done.returncode == 0, done.stderr
    kinds = ["documentation", "code", "novel"]
    lines = done.stdout.splitlines()
    assert "novel (" in lines[0] and lines[2].split()[-3:] == kinds and len(lines) == 3 + 4
    record = json.loads(json_file.read_text())
    rows = {row["policy"]: row for row in record["rows"]}
    assert list(record["texts"]) == kinds and len(rows) == 4
    for row in rows.values():
        assert list(row["error_by_kind"]) == kinds and row["windows"] == 3 and 0 < row["mass"] < 1
        assert [len(heads) for heads in row["error_by_head"]] == [4] * 3 and len(row["mass_by_layer"]) == 3
    for name in others:
        assert rows["oracle"]["mass"] > rows[name]["mass"] and rows["oracle"]["error"] < rows[name]["error"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_texts_are_utf_8_and_have_names_of_their_own(run_script, bench, tmp_path):
    novel, code = tmp_path / "novel.txt", tmp_path / "code.txt"
    novel.write_bytes("Caf\u00e9".encode("latin-1"))
    code.write_text("x")
    with pytest.raises(ValueError, match="--text: .*novel.txt is not UTF-8"):
        bench.tasks.texts_of(Bytes(), [novel])
    done = run_script("accuracy.py", "perplexity", "--quick", "--text", novel, code)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("there would be two of code")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quick", "--context", "512", "--budget", "512"), "--budget 512 covers a --context of 512"),
        (("--quick", "--budget", "48"), "at least 64"),
        (("--quick", "--text", "nowhere.txt"), "--text: no such file: nowhere.txt"),
        (("--quick", "--head-budgets", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
    ],
)
def test_accuracy_says_in_one_line_what_it_cannot_do(run_script, arguments, message):
    done = run_script("accuracy.py", "perplexity", *arguments)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(message)


def test_fidelity_is_not_of_policies_that_keep_pages(run_script):
    done = run_script(
        "accuracy.py", "fidelity", "--quick", "--policy", "minmax", "principal 1, pages of 8, 4-bit, select every 2"
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(
        "not of 'principal 1, pages of 8, 4-bit, select every 2'"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_accuracy_without_a_gpu_names_the_quick_run(run_script):
    done = run_script("accuracy.py", "passkey")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("--quick makes a small table on the CPU")


@torch.inference_mode()
def test_recordings_are_what_the_cache_holds_and_what_each_token_asks(bench):
    documents, _ = small_documents(bench)
    model, cache = documents.model, documents.dense
    asked = {}

    class LastQuery:
        def run(self, layer, query, key, value):
            asked[layer] = query[-1]
            return bench.recordings.causal_attention(query, key.transpose(0, 1), value.transpose(0, 1), 1 / 8)

    found = bench.recordings.recordings_of(model, documents.prefixes, [0, 2], 3, torch.float32)
    for layer, recordings in zip((0, 2), found):
        for seq, (recording, prefix) in enumerate(zip(recordings, documents.prefixes)):
            for held, pool in ((recording.keys, cache.k_cache(layer)), (recording.values, cache.v_cache(layer))):
                expected = pool[cache.block_ids(seq)].flatten(0, 1)[: len(prefix)]
                torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-4)
            for b, query in enumerate(recording.queries):
                read = torch.tensor(prefix[: len(prefix) - 13 * b])
                model(read, torch.arange(len(read)), LastQuery())
                torch.testing.assert_close(query, asked[layer], rtol=1e-4, atol=1e-4)
            assert len(recording.queries) == 3


def test_a_recorded_context_is_whole_documents_and_ends_with_its_query(bench):
    """A key is 100 times its document plus its place in it, a value the same below zero; layer 1 adds 1,000."""
    tokens = torch.arange(32.0)[:, None, None].expand(32, 2, 64)

    def recording(layer, document):
        keys = tokens + 100 * document + 1000 * layer
        return bench.recordings.Recording(keys, -keys, keys[[31, 18, 5]].repeat(1, 2, 1))

    recordings = [[recording(layer, document) for document in range(3)] for layer in range(2)]
    lengths = bench.recordings.lengths_of(70, 3)
    assert lengths == (70, 57, 44)
    case = bench.cases.Case("small", lengths, 2, 4, dtype=torch.float32, head_dim=64)
    layers = bench.recordings.RecordedLayers(case, "cpu", recordings)

    def held(i, b):
        keys, values = (pool[i][layers.table[b, : case.blocks[b]]].flatten(0, 1) for pool in (layers.k, layers.v))
        assert torch.equal(keys[: lengths[b]], -values[: lengths[b]]) and len(keys[0].unique()) == 1
        return keys[: lengths[b], 0, 0].tolist()

    whole = [list(range(100 * document, 100 * document + 32)) for document in range(3)]
    assert held(0, 0) == [*whole[1][:6], *whole[2], *whole[0]]
    assert held(2, 1) == [*whole[0][:6], *whole[1], *whole[2][:19]]
    assert held(1, 2) == [1000 + key for key in [*whole[0][:6], *whole[1], *whole[2][:6]]]
    for i, b in itertools.product(range(layers.count), range(3)):
        assert layers.queries[i][b].unique().tolist() == [held(i, b)[-1]]


def small_recorded_layers(bench, pages, dtype=torch.bfloat16, device="cpu"):
    documents = [[(7 * i + j * j) % 100 for j in range(208)] for i in range(3)]
    recordings = bench.recordings.recordings_of(small_model(bench, device=device), documents, [0, 2], 2, dtype)
    lengths = bench.recordings.lengths_of(600, 2)
    case = bench.cases.Case("small", lengths, 2, 4, (pages,), budget=160, dtype=dtype, head_dim=64)
    return bench.recordings.RecordedLayers(case, device, recordings)


def one_recent_page_less(op, *arguments):
    return op(*arguments[:8], arguments[8] - 1, *arguments[9:])


def one_page_less(op, *arguments):
    return op(*arguments[:6], arguments[6] - 1, *arguments[7:])


def larger_output(op, *arguments):
    out, lse = op(*arguments)
    return out * (1 + 2**-5), lse


def larger_lse(op, *arguments):
    out, lse = op(*arguments)
    return out, lse + 0.01


def a_single_nan(op, *arguments):
    out, lse = op(*arguments)
    out[1, 3, 5] = torch.nan
    return out, lse


KINDS = pytest.mark.parametrize("kind", ["pages of 16", "pages of 8, 8-bit", "pages of 4, 4-bit"])


@KINDS
@torch.inference_mode()
def test_a_wrong_choice_and_a_wrong_output_are_reported(bench, monkeypatch, device, kind):
    pages = bench.cases.PAGES[kind]
    monkeypatch.setattr(bench.cases.Layers, "OVERFLOW_BYTES", 1)  # on a GPU: few layers
    layers = small_recorded_layers(bench, pages, device=device)
    for keys, metadata in zip(layers.k, layers.metadata(pages)):
        expected, starts = torch.zeros_like(metadata), torch.zeros_like(layers.lens)
        quest_ops.reference.update_page_metadata(keys, expected, layers.table, layers.lens, starts, bound=pages.bound)
        assert torch.equal(metadata.view(torch.uint8), expected.view(torch.uint8))
    right, op = bench.exactness.summary(layers, pages), quest_ops.quest_decode_attention
    assert bench.exactness.is_exact(right) and right["other_choices"] == right["differing"] == 0
    assert (right["outputs"], right["choices"]) == (layers.count * 2 * 4, layers.count * 2 * 2)
    assert 0.1 < right["error"] < 1.1 and 0.1 < right["separate_error"] < 1.1
    for wrong in (one_recent_page_less, one_page_less, larger_output, larger_lse, a_single_nan):
        monkeypatch.setattr(
            quest_ops, "quest_decode_attention",
            lambda *arguments, bound, workspace, f=wrong: f(partial(op, bound=bound), *arguments),
        )  # fmt: skip
        found = bench.exactness.summary(layers, pages)
        assert not bench.exactness.is_exact(found), wrong.__name__
        if wrong in (one_recent_page_less, one_page_less):  # exact for the pages that were chosen
            assert found["other_choices"] > found["choices"] / 2 and found["ties"] == found["differing"] == 0
        else:
            assert found["other_choices"] == 0
            assert found["differing"] == (layers.count if wrong is a_single_nan else found["outputs"])
            assert math.isnan(found["error"]) == (wrong is a_single_nan)


@KINDS
@torch.inference_mode()
def test_only_rounding_excuses_another_choice(bench, kind):
    pages = bench.cases.PAGES[kind]
    layers = small_recorded_layers(bench, pages, torch.float32)
    parts = 16 // pages.size

    def bounds(page):  # of row 1, KV head 1
        return layers.metadata(pages)[2][layers.table[1, page // parts], 1, page % parts]

    def tie(lost, gained):
        return bench.exactness.is_tie(layers, 2, pages, 1, 1, torch.tensor(lost), torch.tensor(gained))

    scores = layers.estimate(2, pages)[1, 1, 12:17]
    a, b = 12 + int(scores.argmin()), 12 + int(scores.argmax())
    assert not tie([a], [b]) and not tie([b], [a]), "their scores differ"
    bounds(9).copy_(bounds(a))
    assert tie([a], [9]) and not tie([9], [a]), "of equal pages the earlier one is chosen"
    assert not tie([a], [9, 10]) and not tie([a, 10], [9]), "so many pages are chosen, whatever their scores"
    for always in (0, -(-587 // pages.size) - 1):
        bounds(always).copy_(bounds(a))
        assert not tie([always], [9])
    if not pages.bits:
        bounds(9).mul_(1 + 1e-6)
        assert tie([a], [9]) and tie([9], [a])
        bounds(9).mul_(1 + 1e-3)
        assert not tie([a], [9]) and not tie([9], [a])


@pytest.mark.parametrize("equal", [True, False])
@torch.inference_mode()
def test_the_later_of_two_pages_at_the_cut_is_a_tie_unless_they_are_equal(bench, monkeypatch, equal):
    pages = bench.recorded.PAGES[0]
    layers = small_recorded_layers(bench, pages, torch.float32)
    page_ids, _ = layers.select(layers.estimate(2, pages), pages)
    chosen = page_ids[1, 1].tolist()
    lowest = min(chosen[1:-4], key=lambda page: layers.estimate(2, pages)[1, 1, page])
    later = max(set(range(33)) - set(chosen))
    assert later > lowest

    def raise_score(metadata, factor):
        metadata[layers.table[1, later], 1, 0, 1] += factor * metadata[layers.table[1, later], 1, 0, 1].abs()
        return metadata

    metadata = layers.metadata(pages)[2]
    metadata[layers.table[1, later], 1] = metadata[layers.table[1, lowest], 1]
    if not equal:
        raise_score(metadata, -1e-6)
    op = quest_ops.quest_decode_attention
    monkeypatch.setattr(
        quest_ops, "quest_decode_attention",
        lambda *arguments, bound, workspace: op(
            *arguments[:3], raise_score(arguments[3].clone(), 2e-6), *arguments[4:], bound=bound
        ),
    )  # fmt: skip
    found = bench.exactness.check_layer(layers, 2, pages)
    assert (found["other_choices"], found["ties"], found["equal_at_the_cut"]) == (1, int(not equal), int(equal))
    assert bench.exactness.is_exact(found | {"differing": 0}) != equal  # float32 outputs are not what it is for


@pytest.mark.parametrize("exact", [True, False])
def test_recorded_fails_where_a_choice_is_wrong(bench, monkeypatch, tmp_path, capsys, exact):
    model, op = small_model(bench, vocab_size=256), quest_ops.quest_decode_attention
    monkeypatch.setattr(bench.recorded.Llama, "load", lambda *arguments, **options: (model, Bytes()))
    monkeypatch.setattr(bench.cases, "wall_us", lambda calls: len([call() for call in calls]))
    if not exact:
        monkeypatch.setattr(
            quest_ops, "quest_decode_attention",
            lambda *arguments, bound, workspace: one_recent_page_less(partial(op, bound=bound), *arguments),
        )  # fmt: skip
    sizes = "--layers 0 2 --documents 3 --context 256 600 --batch 1 2 --budget 160 256".split()
    monkeypatch.setattr(sys, "argv", ["recorded.py", "--quick", *sizes, "--json", str(tmp_path / "r.json")])
    if exact:
        bench.recorded.main()
    else:
        with pytest.raises(SystemExit, match="not exact: 12 of 12 rows"):
            bench.recorded.main()
    printed = capsys.readouterr()
    assert "a budget of 256 covers a context of 243: nothing to choose" in printed.err
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["case"] for row in rows[::2]] == ["256-b1", "256-b2", *["600-b1"] * 2, *["600-b2"] * 2]
    assert len(printed.out.splitlines()) == 1 + len(rows)


def test_quick_recorded_run_writes_rows(smollm2, run_script, tmp_path):
    sizes = "--context", "512", "--budget", "256", "--batch", "2"
    done = run_script("recorded.py", "--quick", *sizes, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert {"gpu", "torch", "command", "csrc_tree", "texts", "recorded_layers", "rows"} <= set(record)
    settings = [(row["case"], row["page_size"], row["metadata"], row["bound"]) for row in record["rows"]]
    assert settings == [
        ("512-b2", 16, "16", "minmax"),
        ("512-b2", 8, "4", "principal"),
    ]
    for row in record["rows"]:
        assert row["ratio"] == pytest.approx(row["recorded_us"] / row["random_us"]) and 0 < row["error"] <= 1
        assert row["differing"] == row["other_choices"] == 0 and row["outputs"] == 3 * row["choices"] == 4 * 2 * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quick", "--budget", "64"), "--budget must be at least 96, got 64"),
        (("--quick", "--batch", "100", "--context", "512"), "a document of 512 tokens has fewer recorded queries"),
        (("--quick", "--figure", "r.png"), "--figure: there is none of these rows"),
        (("--quick", "--text", "nowhere.txt"), "--text: no such file: nowhere.txt"),
    ],
)
def test_recorded_says_in_one_line_what_it_cannot_do(run_script, arguments, message):
    done = run_script("recorded.py", *arguments)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_recorded_without_a_gpu_names_the_quick_run(run_script):
    done = run_script("recorded.py")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("--quick runs one short document on the CPU")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_the_floor_of_the_chain_compiles(tmp_path):
    source = ROOT / "benchmarks" / "chain_floor.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-c", "-o", tmp_path / "out.o", source]
    subprocess.run(command, check=True)


@pytest.fixture
def made(bench, monkeypatch, tmp_path):
    """make_results.main with these arguments, its commands faked: the record of each, or None where it fails."""

    def main(*arguments, records):
        left = list(records)

        def run(command, stdout, stderr):
            assert Path(command[1]).is_file()
            print("what it printed", file=stdout)
            record = left.pop(0)
            if record is not None:
                Path(command[command.index("--json") + 1]).write_text(json.dumps(record))
            return types.SimpleNamespace(returncode=0 if record else 1)

        monkeypatch.setattr(bench.make_results.subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["make_results.py", "h100", "--out", str(tmp_path), *arguments])
        code = bench.make_results.main()
        assert not left
        return code

    return main


def test_a_file_of_results_has_the_rows_of_all_its_commands(made, bench, tmp_path):
    machine = {"gpu": "H100", "torch": "2.11", "csrc_tree": "abc"}
    records = [machine | {"command": "c", "linear": [str(i)], "rows": [{"us": i}]} for i in range(4)]
    assert made("--only", "end_to_end", "--csrc-tree", "abc", records=records) == 0
    result = json.loads((tmp_path / "end_to_end-h100.json").read_text())
    assert result["rows"] == [{"us": i} for i in range(4)] and result["linear"] == list("0123")
    assert result["command"] == [f"python benchmarks/{c}" for c in bench.make_results.PARTS["end_to_end"]]
    assert [path.name for path in tmp_path.iterdir()] == ["end_to_end-h100.json"]
    records[2]["gpu"] = "H200"
    with pytest.raises(ValueError, match="has another gpu than"):
        made("--only", "end_to_end", records=records)


def test_a_command_that_fails_leaves_its_file_and_a_log(made, tmp_path, capsys):
    (tmp_path / "kernels-h100.json").write_text("as it was")
    assert made("--only", "kernels", "break_even", records=[None, {"command": "c", "rows": []}]) == 1
    assert (tmp_path / "kernels-h100.json").read_text() == "as it was"
    assert (tmp_path / "kernels-h100.log").read_text() == "what it printed\n"
    assert json.loads((tmp_path / "break_even-h100.json").read_text())["command"] == "python benchmarks/break_even.py"
    assert "kernels: 'kernels.py' failed, see" in capsys.readouterr().out


def test_end_to_end_takes_the_arguments_of_its_files(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands = [c for part in bench.make_results.PARTS.values() for c in part if c.startswith("end_to_end.py")]
    assert len(commands) == 7
    for command in commands:
        monkeypatch.setattr(sys, "argv", command.split())
        assert bench.end_to_end.parse().models[0] in bench.decoders.SHAPES

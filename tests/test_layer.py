"""QuestAttention: what a decoder gets from plan and run, over whole histories of a cache."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from cases import BOUNDS, FP8, METADATA_DTYPES, OUT_TOLERANCE, assert_same_bits, dtypes, fill_nan

from quest_ops import dense, ops
from quest_ops.attention import QuestAttention
from quest_ops.cache import OutOfPagesError, PagedKVCache
from quest_ops.config import QuestConfig

LAYERS, HEADS, KV_HEADS, DIM, PAGE = 2, 6, 2, 64, 8
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "decode_loop.py"


def make_cache(device="cpu", **settings):
    layout = {"num_blocks": 64, "page_size": PAGE, "pages_per_block": 1, "metadata_dtype": None}
    settings = layout | {"dtype": torch.float16, "device": device} | settings
    cache = PagedKVCache(LAYERS, KV_HEADS, DIM, **settings)
    cache.pool.fill_(torch.nan)
    for layer in range(LAYERS):
        fill_nan(cache.page_metadata(layer))
    return cache


def make_config(**settings):
    """Dense within the budget alone, on any device; minimum and maximum, in whatever the cache has."""
    lengths = {"token_budget": 4 * PAGE, "sink_tokens": PAGE, "recent_tokens": PAGE}
    settings = {"page_size": PAGE, "bound": "minmax", "metadata_dtype": None} | lengths | settings
    return QuestConfig(**{"dense_below": settings["token_budget"]} | settings)


def make_attention(cache, config=None, heads=HEADS, **settings):
    settings = {"max_batch_size": 3, "max_sequence_tokens": 40 * PAGE} | settings
    return QuestAttention(config or make_config(), cache, heads, **settings)


class Loop:
    """Runs steps on random q, k, v, remembers every token's K and V, and checks outputs against exact attention."""

    def __init__(self, attention, seed=0):
        self.attention = attention
        self.cache = attention.cache
        self.generator = torch.Generator().manual_seed(seed)
        self.history = {}  # (sequence, layer) -> K and V [2, length, Hkv, D] float64

    def rows(self, n):
        heads = [self.attention.num_query_heads, KV_HEADS, KV_HEADS]
        fused = torch.randn(n, sum(heads), DIM, generator=self.generator).to(self.cache.device, self.cache.dtype)
        return fused.split(heads, 1)

    def step(self, seqs, new_tokens, *, exact=True, **kind):
        attention = self.attention
        attention.plan(seqs, new_tokens, **kind)
        n = attention.positions.numel()
        for layer in range(LAYERS):
            query, key, value = self.rows(n)
            out = attention.run(layer, query, key, value)
            assert out.shape == query.shape and out.dtype == query.dtype
            first = 0
            for b, seq in enumerate(seqs):
                count = new_tokens[b] if isinstance(new_tokens, list) else new_tokens
                if seq is None:
                    if attention.step_kind != "prefill":
                        assert (out[first : first + count] == 0).all()
                        first += count
                    continue
                rows = slice(first, first + count)
                first += count
                self.remember(seq, layer, key[rows], value[rows])
                if exact:
                    self.check(seq, layer, query[rows], out[rows])
            assert first == n

    def remember(self, seq, layer, key, value):
        new = torch.stack([key, value]).double().cpu()
        old = self.history.get((seq, layer), new[:, :0])
        self.history[seq, layer] = torch.cat([old[:, : self.cache.length(seq) - new.size(1)], new], 1)

    def check(self, seq, layer, query, out):
        keys, values = self.history[seq, layer].repeat_interleave(query.size(1) // KV_HEADS, 2)  # [L, Hq, D]
        assert len(keys) == self.cache.length(seq)
        query = query.double().cpu()
        logits = torch.einsum("nhd,lhd->hnl", query, keys) * self.attention.sm_scale
        hidden = torch.ones(len(query), len(keys), dtype=torch.bool).triu(len(keys) - len(query) + 1)
        expected = torch.einsum("hnl,lhd->nhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)
        tolerance = OUT_TOLERANCE[out.dtype]
        torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)

    def fork(self, seq):
        child = self.cache.fork(seq)
        for layer in range(LAYERS):
            self.history[child, layer] = self.history[seq, layer]
        return child


def run_history(loop):
    """Ragged and chunked prefill, decode with and without an empty slot, drafts rejected, forks, frees, reuse."""
    cache = loop.cache
    a, b, c = cache.add(), cache.add(), cache.add()
    loop.step([a, b, c], [20, 5, 30])
    loop.step([a, b, c], 1)
    loop.step([a, None, c], 1)
    loop.step([b], 40, prefill=True)
    loop.step([c, None, a], [9, 0, 1])
    loop.step([c, b, a], 4)
    cache.rollback(c, 3)
    cache.rollback(b, 2 * PAGE + 1)
    loop.step([c, b, a], 4)
    child = loop.fork(b)
    cache.rollback(child, PAGE + 2)
    loop.step([b, child], 1)
    cache.free(b)
    d = cache.add()
    loop.step([None, d, child], [0, 70, 2])
    loop.step([a, d, child], 8)
    loop.step([None, d, None], 1)


@pytest.mark.parametrize("pages_per_block", [1, 3])
@pytest.mark.parametrize("backend", ["quest", "dense", "sdpa"])
def test_any_history_attends_exactly_to_what_was_written(device, backend, pages_per_block):
    for dtype in dtypes(device):
        cache = make_cache(device, dtype=dtype, pages_per_block=pages_per_block)
        covering = make_config(token_budget=40 * PAGE, dense_below=0)
        run_history(Loop(make_attention(cache, covering, backend=backend)))


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_a_small_budget_is_the_op_with_the_settings_of_the_config(device, metadata_dtype):
    config = make_config(token_budget=6 * PAGE, sink_tokens=2 * PAGE, recent_tokens=3 * PAGE, head_reduction="mean")
    cache = make_cache(device, metadata_dtype=metadata_dtype)
    attention = make_attention(cache, config, sm_scale=0.2)
    loop = Loop(attention)
    seqs = [cache.add(), cache.add()]
    loop.step(seqs, [90, 200])
    attention.plan(seqs, 2)
    assert attention.step_kind == "quest"
    query, key, value = loop.rows(4)
    out = attention.run(1, query, key, value)
    inputs = query, cache.k_cache(1), cache.v_cache(1)
    table, lengths = attention.block_table[:2], attention.seq_lens
    expected, _ = ops.quest_decode_attention(
        *inputs, cache.page_metadata(1), table, lengths, 6, 2, 3, "mean", sm_scale=0.2
    )
    assert lengths.tolist() == [91, 92, 201, 202]
    assert torch.equal(out, expected)
    every_token, _ = ops.sparse_decode_attention(*inputs, table, lengths, sm_scale=0.2)
    assert (out - every_token).abs().max() > 0.01


@pytest.mark.parametrize("backend", ["quest", "dense", "sdpa"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_cache_has_the_metadata_that_the_config_asks_for(device, backend, bound):
    """After prefill, decode steps, rejected drafts and a fork, the bits of a rebuild."""
    options = {"bound": bound[0], "bound_scale": bound[1]}
    cache = make_cache(device, pages_per_block=2)
    loop = Loop(make_attention(cache, make_config(**options), backend=backend))
    a, b = cache.add(), cache.add()
    loop.step([a, b], [70, 33], exact=False)
    loop.step([a, b], 3, exact=False)
    cache.rollback(b, 2)
    child = loop.fork(b)
    loop.step([a, b, child], 1, exact=False)
    attention = loop.attention
    for layer in range(LAYERS):
        rebuilt = fill_nan(torch.empty_like(cache.page_metadata(layer)))
        lengths = attention.seq_lens
        tables = attention.block_table, lengths, torch.zeros_like(lengths)
        ops.update_page_metadata(cache.k_cache(layer), rebuilt, *tables, **options)
        for seq in (a, b, child):
            pages = -(-cache.length(seq) // PAGE)
            kept, fresh = (
                m[cache.block_ids(seq)].transpose(1, 2).flatten(0, 1)[:pages]
                for m in (cache.page_metadata(layer), rebuilt)
            )
            assert not fresh.isnan().any()
            assert_same_bits(kept, fresh)


def test_dense_layers_attend_to_everything():
    cache = make_cache()
    loop = Loop(make_attention(cache, make_config(dense_layers=(1,))))
    seq = cache.add()
    loop.step([seq], 200)
    attention = loop.attention
    attention.plan([seq], 1)
    query, key, value = loop.rows(1)
    outs = [attention.run(layer, query, key, value) for layer in range(LAYERS)]
    loop.remember(seq, 1, key, value)
    loop.remember(seq, 0, key, value)
    loop.check(seq, 1, query, outs[1])
    with pytest.raises(AssertionError):
        loop.check(seq, 0, query, outs[0])


def test_the_longest_sequence_decides_the_kind_of_a_step():
    cache = make_cache()
    loop = Loop(make_attention(cache, make_config(dense_below=50)))
    a, b = cache.add(), cache.add()
    loop.step([a, b], [49, 10])
    assert loop.attention.step_kind == "prefill"
    loop.step([a, b], 1)
    assert loop.attention.step_kind == "dense"
    loop.step([a, b], 1, exact=False)
    assert loop.attention.step_kind == "quest"
    loop.step([None, b], 1)
    assert loop.attention.step_kind == "dense"
    loop.step([b], 1, prefill=True)
    assert loop.attention.step_kind == "prefill"
    for backend in ("dense", "sdpa"):
        attention = make_attention(cache, make_config(dense_below=0), backend=backend)
        attention.plan([a], 1)
        assert attention.step_kind == "dense"


def test_a_decode_step_is_described_in_buffers_that_stay(device):
    cache = make_cache(device, pages_per_block=2)
    attention = make_attention(cache)
    a, b, c = cache.add(), cache.add(), cache.add()
    addresses = set()
    for step, (seqs, count) in enumerate([((a, b), 1), ((b, None, a), 2), ((c,), 8), ((a, b, c), 3)] * 6):
        if step % 5 == 4:
            cache.rollback(a, 1)
        if step == 14:  # share a block with another sequence, so that its next token copies it
            spare = cache.fork(a)
            cache.rollback(a, cache.length(a) % cache.block_size + 1)
        attention.plan(list(seqs), count)
        lengths = [0 if s is None else cache.length(s) for s in seqs]
        assert attention.seq_lens.tolist() == [
            max(0, n - count + 1 + t) if n else 0 for n in lengths for t in range(count)
        ]
        slots, positions = [], []
        for row, seq, length in zip(attention.block_table[: len(seqs)].tolist(), seqs, lengths, strict=True):
            if seq is not None:
                assert row[: len(cache.block_ids(seq))] == cache.block_ids(seq)
                slots += cache.slots(seq, length - count, length).tolist()
                positions += range(length - count, length)
            else:
                slots += [-1] * count
                positions += [0] * count
        assert attention.slot_mapping.tolist() == slots and attention.positions.tolist() == positions
        buffers = attention.block_table, attention.slot_mapping, attention.positions, attention.seq_lens
        buffers = *buffers, attention.page_budgets
        addresses.add(tuple(buffer.data_ptr() for buffer in buffers))
    assert len(addresses) == 1
    assert [buffer.dtype for buffer in buffers] == [torch.int32, torch.int64, torch.int64, torch.int32, torch.int32]
    assert cache.length(spare) > 0


def test_the_block_table_follows_copies_and_new_blocks(device):
    cache = make_cache(device)
    attention = make_attention(cache, max_batch_size=1)
    seq = cache.add()
    attention.plan([seq], 3 * PAGE)
    cache.fork(seq)
    cache.rollback(seq, 1)
    shared = cache.block_ids(seq)
    attention.plan([seq], 1)  # copies the block that is shared
    assert attention.block_table[0, :3].tolist() == cache.block_ids(seq) != shared
    cache.rollback(seq, 2 * PAGE)
    cache.extend(cache.add(), 1)  # takes a block that was given back
    attention.plan([seq], 2 * PAGE)
    assert attention.block_table[0, :3].tolist() == cache.block_ids(seq)


def test_long_prefills_in_pieces_are_exact(device, monkeypatch):
    monkeypatch.setattr(dense, "MAX_MASK_ELEMENTS", 700)
    cache = make_cache(device)
    loop = Loop(make_attention(cache))
    seq = cache.add()
    for chunk in (60, 41, 1, 100):
        loop.step([seq], chunk, prefill=True)


@pytest.mark.parametrize("backend", ["quest", "sdpa"])
def test_scattered_blocks_give_the_same_output(backend):
    outs = []
    for scattered in (False, True):
        cache = make_cache()
        filler, seq = cache.add(), cache.add()
        for _ in range(5 if scattered else 0):
            cache.extend(seq, PAGE)
            cache.extend(filler, PAGE)
        cache.rollback(seq, cache.length(seq))
        loop = Loop(make_attention(cache, backend=backend))
        if scattered:
            for _ in range(5):
                cache.extend(seq, PAGE)
                cache.extend(filler, PAGE)
            cache.rollback(seq, cache.length(seq))
            cache.free(filler)
        loop.step([seq], 100)
        blocks = cache.block_ids(seq)
        assert (blocks != list(range(blocks[0], blocks[0] + len(blocks)))) == scattered
        loop.attention.plan([seq], 1)
        outs.append(loop.attention.run(0, *loop.rows(1)))
    assert torch.equal(*outs)


def test_a_plan_that_raises_extends_no_sequence():
    cache = make_cache(num_blocks=6, max_sequence_tokens=5 * PAGE)
    attention = make_attention(cache, max_sequence_tokens=4 * PAGE)
    a, b, gone = cache.add(), cache.add(), cache.add()
    attention.plan([a, b], [2 * PAGE, PAGE])
    cache.free(gone)
    table = attention.block_table.clone()
    for seqs, counts, error, named in [
        ([a, b], [PAGE, 3 * PAGE], OutOfPagesError, "4 blocks"),
        ([a, b], [1, 4 * PAGE], ValueError, f"sequence {b} would hold 40 tokens, max_sequence_tokens is 32"),
        ([a, gone], 1, ValueError, f"sequence {gone} is not in this cache"),
        ([a, 77], 1, ValueError, "sequence 77"),
        ([a, a], 1, ValueError, "different sequences"),
        ([a, b, None, None], 1, ValueError, "max_batch_size = 3.*got 4"),
        ([], 1, ValueError, "seqs must have 1 to"),
        (a, 1, TypeError, "seqs must be a list"),
        ([a, b], [1], ValueError, "new_tokens has 1 entries for 2"),
        ([a, b], [1, 0], ValueError, "new_tokens must be at least 1, got 0"),
        ([a, b], 1.0, TypeError, "new_tokens must be an int, got 1.0"),
        ([a, b], -1, ValueError, "new_tokens"),
        ([None, None], 9, ValueError, "a prefill step needs one"),
    ]:
        with pytest.raises(error, match=named):
            attention.plan(seqs, counts)
        assert (cache.length(a), cache.length(b), cache.free_blocks) == (2 * PAGE, PAGE, 3)
        assert torch.equal(attention.block_table, table)


def test_run_names_what_is_wrong_and_writes_nothing():
    cache = make_cache()
    attention = make_attention(cache)
    rows = torch.zeros(2, HEADS, DIM, dtype=torch.float16), *torch.zeros(2, 2, KV_HEADS, DIM, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="before plan"):
        attention.run(0, *rows)
    seqs = [cache.add(), cache.add()]
    attention.plan(seqs, 1)
    query, key, value = rows
    for layer, inputs, named in [
        (LAYERS, rows, "layer must be 0 to 1, got 2"),
        (-1, rows, "layer"),
        (0, (query[:1], key, value), r"query must be \[2, 6, 64\] as planned, got \[1, 6, 64\]"),
        (0, (query[:, :2], key, value), "query must be"),
        (0, (query, key[:1], value), r"key must be \[2, 2, 64\]"),
        (0, (query, key, value[:, :1]), "value must be"),
        (0, (query.float(), key, value), "query must be torch.float16 on cpu.*torch.float32"),
        (0, (query, key, value.bfloat16()), "value must be torch.float16 on cpu.*torch.bfloat16"),
        (0, (query, key.to("meta"), value), "key must be torch.float16 on cpu.*meta"),
        (0, (query.mT.contiguous().mT, key, value), r"query must be contiguous.*strides \[384, 1, 6\]"),
        (0, (torch.zeros(2, 6, 68).half()[..., :64], key, value), "query must .* aligned to 16 bytes"),
        (0, (torch.zeros(769).half()[1:].view(2, 6, 64), key, value), "query must .* offset 1"),
        (0, (query, None, value), "key must be a tensor, got NoneType"),
        (0, (query.float().numpy(), key, value), "query must be a tensor, got ndarray"),
        ("0", rows, "layer must be an int, got '0'"),
    ]:
        with pytest.raises((ValueError, TypeError), match=named):
            attention.run(layer, *inputs)
        assert cache.pool.isnan().all()


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"backend": "flash"}, ValueError, "backend must be one of .*'flash'"),
        ({"heads": 5}, ValueError, "num_query_heads 5 is no multiple of 2"),
        ({"heads": 0}, ValueError, "num_query_heads"),
        ({"heads": 34}, ValueError, "num_query_heads 34 is more than 16 for each of 2"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size"),
        ({"max_sequence_tokens": 0}, ValueError, "max_sequence_tokens"),
        ({"max_sequence_tokens": 1e6}, TypeError, "max_sequence_tokens"),
        ({"sm_scale": -1.0}, ValueError, "sm_scale.*-1.0"),
        ({"sm_scale": float("nan")}, ValueError, "sm_scale.*nan"),
        ({"sm_scale": 1e39}, ValueError, "sm_scale.*1e.39"),
        ({"max_sequence_tokens": 2**31 - 7}, ValueError, "max_sequence_tokens.*int32"),
        (
            {"config": make_config(page_size=16, token_budget=512)},
            ValueError,
            "config.page_size is 16, the cache's is 8",
        ),
        ({"config": make_config(dense_layers=(2,))}, ValueError, "dense_layers.*2 layers"),
        ({"config": make_config(metadata_dtype=torch.bfloat16)}, ValueError, "metadata_dtype.*bfloat16"),
        ({"config": make_config(metadata_dtype=FP8)}, ValueError, "metadata_dtype.*float8_e4m3fn.*float16"),
        ({"config": {"page_size": 8}}, TypeError, "config must be a QuestConfig, got dict"),
        ({"backend": "flashinfer"}, ValueError, "'flashinfer' needs a cache on a CUDA GPU.*cpu"),
    ],
)
def test_bad_settings_are_named(changed, error, named):
    with pytest.raises(error, match=named):
        make_attention(make_cache(), **changed)


def test_the_example_prints_what_quest_saves():
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(ops.__file__).parents[1])}
    command = [sys.executable, str(EXAMPLE)]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = re.findall(r"(dense|quest): ([\d.]+) ms a token on (?:cpu|cuda), reads (\d+)% of the KV cache", run.stdout)
    assert [(backend, share) for backend, _, share in lines] == [("dense", "100"), ("quest", "10")]
    assert all(float(ms) > 0 for _, ms, _ in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["quest", "dense", "flashinfer"])
@pytest.mark.parametrize("rows_per_request", [1, 3])
def test_a_captured_step_replays_while_lengths_grow(backend, rows_per_request):
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    cache = make_cache("cuda", num_blocks=128, dtype=torch.bfloat16, page_size=16)
    config = make_config(page_size=16, token_budget=160, dense_below=0)
    attention = make_attention(cache, config, backend=backend, max_sequence_tokens=600)
    loop = Loop(attention)
    seqs = [cache.add(), None, cache.add()]
    loop.step(seqs, [300, 0, 17])
    n = 3 * rows_per_request
    static = [tensor.clone() for tensor in loop.rows(n)]
    graph = torch.cuda.CUDAGraph()
    for step in range(40):
        attention.plan(seqs, rows_per_request)
        for tensor, new in zip(static, loop.rows(n), strict=True):
            tensor.copy_(new)
        if step == 0:
            for layer in range(LAYERS):  # a warm-up; appending a second time changes nothing
                attention.run(layer, *static)
            with torch.cuda.graph(graph):
                outs = [attention.run(layer, *static) for layer in range(LAYERS)]
        graph.replay()
        replayed = [out.clone() for out in outs]
        eager = [attention.run(layer, *static) for layer in range(LAYERS)]
        for layer in range(LAYERS):
            assert torch.equal(replayed[layer], eager[layer])
            for b in (0, 2):
                rows = slice(b * rows_per_request, (b + 1) * rows_per_request)
                loop.remember(seqs[b], layer, static[1][rows], static[2][rows])
                if backend != "quest":
                    loop.check(seqs[b], layer, static[0][rows], eager[layer][rows])


@pytest.mark.gpu
def test_flashinfer_attends_exactly_to_what_was_written():
    pytest.importorskip("flashinfer")
    for heads in (KV_HEADS, 8 * KV_HEADS):  # its two kernels
        cache = make_cache("cuda", dtype=torch.bfloat16, page_size=16)
        attention = make_attention(cache, make_config(page_size=16, token_budget=64), heads, backend="flashinfer")
        run_history(Loop(attention))

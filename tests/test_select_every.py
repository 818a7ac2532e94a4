"""Pages chosen in every n-th step: which steps choose, what the others attend to; neighbours change neither."""

from dataclasses import replace

import pytest
import torch
from cases import OUT_TOLERANCE, assert_same_bits, fill_nan
from test_batching import LENGTHS, SAMPLED, alone, note_steps
from test_budgets import BY_HEAD
from test_generate import (
    COVERING,
    DENSE_TO_100,
    QUEST,
    QUEST_FROM_THE_START,
    greedy_by_hand,
    make,
    random_model,
    random_prompts,
)
from test_layer import DIM, HEADS, KV_HEADS, LAYERS, PAGE, Loop, make_attention, make_cache, make_config

from quest_ops import ops

EVERY = 4
BUDGETS = ({}, {"budget_ratio": 0.5}, BY_HEAD, BY_HEAD | {"budget_ratio": 0.5})  # with a ratio, more from token 208 on


@pytest.fixture(scope="module")
def model():
    return random_model()


def prefilled(attention, *lengths):
    """A loop, and its sequences of these lengths."""
    loop = Loop(attention)
    seqs = [loop.cache.add() for _ in lengths]
    loop.step(seqs, list(lengths), exact=False, prefill=True)
    return loop, seqs


class KeepingLoop(Loop):
    """Checks each row of a step against plain attention to the tokens of pages that it keeps itself."""

    def __init__(self, attention):
        super().__init__(attention)
        self.pages = {}  # (sequence, layer) -> page numbers of each query head

    def decode(self, seqs, chooses):
        """A step of one row a slot, in which the rows of some slots are to choose pages."""
        attention, config = self.attention, self.attention.config
        attention.plan(seqs, 1)
        live = [b for b, seq in enumerate(seqs) if seq is not None]
        assert [b for b in live if not attention.keeps[b]] == chooses
        for layer in range(LAYERS):
            query, key, value = self.rows(len(seqs))
            out = attention.run(layer, query, key, value)
            for b in live:
                row = slice(b, b + 1)
                self.remember(seqs[b], layer, key[row], value[row])
                if self.cache.length(seqs[b]) <= attention.dense_length or layer in config.dense_layers:
                    self.check(seqs[b], layer, query[row], out[row])
                    continue
                if b in chooses:
                    self.pages[seqs[b], layer] = self.choose(layer, query[row], b)
                self.check_pages(seqs[b], layer, query[b], out[b])

    def choose(self, layer, query, b):
        attention, config = self.attention, self.attention.config
        table, lengths = attention.block_table[b : b + 1], attention.seq_lens[b : b + 1]
        scores = ops.estimate_page_scores(
            query, self.cache.page_metadata(layer), table, lengths, PAGE, config.head_reduction
        )
        budgets = self.budgets(layer, int(lengths[0])).repeat_interleave(scores.size(1) // KV_HEADS)
        pages, _ = ops.select_topk_pages(
            scores, lengths, PAGE, int(budgets.max()), config.sink_pages, config.recent_pages,
            page_budgets=budgets[None].to(scores.device),
        )  # fmt: skip
        return pages[0].cpu().repeat_interleave(HEADS // pages.size(1), 0)

    def budgets(self, layer, length):
        """Of each KV head, in pages."""
        config = self.attention.config
        by_head = [config.page_budget] * KV_HEADS if config.head_budgets is None else config.head_page_budgets[layer]
        of_row = config.row_page_budget(length)
        return torch.tensor([n * of_row // config.page_budget for n in by_head], dtype=torch.int32)

    def check_pages(self, seq, layer, query, out):
        keys, values = self.history[seq, layer].repeat_interleave(HEADS // KV_HEADS, 2)  # [L, Hq, D]
        query = query.double().cpu()
        logits = torch.einsum("hd,lhd->hl", query, keys) * self.attention.sm_scale
        page_of_token = torch.arange(len(keys)) // PAGE
        listed = (page_of_token[None, :, None] == self.pages[seq, layer][:, None]).any(-1)  # [Hq, L]
        most = self.budgets(layer, len(keys)).repeat_interleave(HEADS // KV_HEADS) * PAGE
        assert listed[:, -1].all() and (listed.sum(1) <= most).all()
        expected = torch.einsum("hl,lhd->hd", logits.masked_fill(~listed, -torch.inf).softmax(-1), values)
        tolerance = OUT_TOLERANCE[out.dtype]
        torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pages_per_block", [1, 2])
@pytest.mark.parametrize("head_reduction", ["max", "none"])
@pytest.mark.parametrize("budgets", BUDGETS, ids=["one", "ratio", "by head", "both"])
def test_rows_attend_to_the_pages_that_they_chose_last(device, budgets, head_reduction, pages_per_block, monkeypatch):
    """Pages begin, a row outgrows dense_below, slots empty and fill, one sequence is cut and forked: each row on its
    own, whatever the others do. The ops check every list that they get."""
    monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    settings = {"dense_below": 6 * PAGE + 2, "head_reduction": head_reduction, "dense_layers": (1,)}
    config = make_config(select_every=EVERY, **settings, **budgets)
    loop = KeepingLoop(make_attention(make_cache(device, pages_per_block=pages_per_block), config))
    a, b, c = (loop.cache.add() for _ in range(3))
    loop.step([a, b, c], [201, 6 * PAGE, 130], exact=False, prefill=True)
    kinds = []

    def decode(seqs, chooses):
        loop.decode(seqs, chooses)
        kinds.append(loop.attention.step_kind)

    decode([a, b, None], [0, 1])  # tokens 201 and 48
    decode([a, b, None], [])
    decode([a, b, c], [1, 2])  # b has one token more than dense_below; c is new
    decode([a, b, c], [0])  # token 204 is number 4 of its page
    decode([a, b, c], [1, 2])  # b and c are at 52 and 132
    decode([a, b, c], [])
    loop.cache.rollback(c, 1)
    decode([a, b, c], [2])
    child = loop.fork(a)
    decode([a, b, child], [0, 2])  # a begins a page
    decode([a, b, child], [1])
    decode([a, None, child], [])  # but for the list of slot 1, which is emptied
    decode([a, None, child], [])
    decode([a, b, child], [0, 1, 2])  # 212 twice; b has been away
    assert kinds == ["quest", "reuse"] + ["quest"] * 3 + ["reuse"] + ["quest"] * 4 + ["reuse", "quest"]
    loop.step([a, b], 3, exact=False)
    assert loop.attention.step_kind == "quest" and loop.attention.keeps == [False, False]
    decode([a, b, child], [0, 1])  # after a step of several rows


@pytest.mark.parametrize("every", [2, 3, PAGE])
def test_the_steps_that_choose_follow_from_the_place_in_the_page(every):
    attention = make_attention(make_cache(), make_config(select_every=every))
    seqs = [attention.cache.add(), attention.cache.add()]
    attention.plan(seqs, [5 * PAGE + 3, 7 * PAGE])
    for step in range(3 * PAGE):
        attention.plan(seqs, 1)
        offsets = (3 + step) % PAGE, step % PAGE
        assert attention.keeps == [bool(offset % every) and step > 0 for offset in offsets]
        assert attention.step_kind == ("reuse" if all(attention.keeps) else "quest")


def test_another_slot_chooses_and_the_old_one_goes_on_after_a_pause():
    attention = make_attention(make_cache(), make_config(select_every=PAGE))
    a, b = attention.cache.add(), attention.cache.add()
    attention.plan([a, b], [5 * PAGE + 1, 6 * PAGE + 1])
    for seqs, keeps in [
        ([a, b], [False, False]),
        ([b, a], [False, False]),
        ([b, a], [True, True]),
        ([b], [True]),
        ([b, a], [True, True]),
    ]:
        attention.plan(seqs, 1)
        assert attention.keeps == keeps


def test_tokens_that_were_cut_and_written_again_are_not_those_of_the_choice():
    cache = make_cache()
    attention = make_attention(cache, make_config(select_every=PAGE))
    a = cache.add()
    attention.plan([a], 5 * PAGE + 1)
    attention.plan([a], 1)
    cache.rollback(a, 1)
    cache.extend(a, 1)
    attention.plan([a], 1)
    assert attention.keeps == [False]
    cache.rollback(a, 0)
    attention.plan([a], 1)
    assert attention.keeps == [True]


def test_a_choice_in_every_step_is_one_op(monkeypatch):
    for op in ("estimate_page_scores", "select_topk_pages"):
        monkeypatch.setattr(ops, op, None)
    attention = make_attention(make_cache(), make_config())
    assert attention.kept is None
    loop, seqs = prefilled(attention, 60, 130)
    for _ in range(3):
        loop.step(seqs, 1, exact=False)
        assert attention.step_kind == "quest" and attention.keeps == [False, False]


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_dense_backends_choose_nothing(backend):
    attention = make_attention(make_cache(), make_config(select_every=2), backend=backend)
    loop, seqs = prefilled(attention, 60)
    loop.step(seqs, 1)
    loop.step(seqs, 1)
    assert attention.step_kind == "dense" and attention.kept is None


def test_steps_that_keep_pages_read_no_metadata(device):
    cache = make_cache(device)
    attention = make_attention(cache, make_config(select_every=2))
    loop, seqs = prefilled(attention, 20 * PAGE, 15 * PAGE)
    loop.step(seqs, 1, exact=False)
    attention.plan(seqs, 1)
    assert attention.step_kind == "reuse"
    rows, outs = loop.rows(2), []
    for _ in range(2):  # a step may be repeated
        outs.append(attention.run(0, *rows))
        fill_nan(cache.page_metadata(0))
    assert_same_bits(*outs)


@pytest.mark.parametrize("every", [2, 5, 8])
def test_a_covering_budget_gives_the_tokens_of_dense_attention(model, every):
    prompt = random_prompts(150)[0]
    result = make(model, quest=replace(COVERING, select_every=every)).generate([prompt], 40, stop_tokens=())[0]
    assert result.tokens == greedy_by_hand(model, prompt, 40)


@pytest.mark.parametrize(("every", "sampling"), [(3, {}), (16, {}), (4, SAMPLED)])
@pytest.mark.parametrize("quest", [QUEST, DENSE_TO_100, QUEST_FROM_THE_START], ids=["budget", "dense-to-100", "quest"])
def test_prompts_get_the_tokens_they_get_alone(model, quest, every, sampling, monkeypatch):
    prompts, quest = random_prompts(*LENGTHS), replace(quest, select_every=every)
    expected = alone(model, prompts, 30, quest=quest, **sampling)
    assert expected != alone(model, prompts, 30, quest=replace(quest, select_every=1), **sampling)
    stop = expected[0][12]  # so that sequences leave at different times
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in expected]
    generator = make(model, quest=quest, max_batch_size=3, prefill_chunk=50)
    steps = note_steps(monkeypatch, generator)
    results = generator.generate(prompts, 30, stop_tokens=(stop,), **sampling)
    assert [result.tokens for result in results] == expected
    assert any(None in seqs for seqs in steps) and len({tuple(seqs) for seqs in steps}) > 3


def test_what_a_sequence_reads_counts_metadata_where_it_chooses(model):
    quest = replace(QUEST, select_every=4, dense_layers=(0,))
    prompts = random_prompts(160, 90)
    result, beside = make(model, quest=quest).generate(prompts, 17, stop_tokens=())
    # Lengths 161 to 176: 11 pages; the new tokens are 160 to 175, of which 160, 164, 168 and 172 choose.
    assert result.kv_read_share == pytest.approx((16 * 176 + 2 * (4 * (11 + 64) + 12 * 64)) / (16 * 3 * 176))
    assert beside.kv_read_share == make(model, quest=quest).generate(prompts[1:], 17, stop_tokens=())[0].kv_read_share


def test_recorded_pages_are_those_that_a_step_keeps(model):
    quest = replace(QUEST, select_every=16, dense_layers=(1,))
    prompts = random_prompts(201, 50)  # the first new token is number 9 of its page
    result = make(model, quest=quest).generate(prompts, 10, record_pages=(0, 6, 7), stop_tokens=())[0]
    assert set(result.pages) == {(step, layer) for step in (0, 6, 7) for layer in (0, 2)}
    for layer in (0, 2):
        first, kept, fresh = (result.pages[step, layer] for step in (0, 6, 7))
        assert first.shape == (2, 4) and torch.equal(first, kept)
        assert (kept[:, -1] == 12).all() and (fresh[:, -1] == 13).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_reduction", ["max", "none"])
@pytest.mark.parametrize("budgets", [{}, BUDGETS[-1]], ids=["one", "both"])
def test_a_graph_for_each_kind_of_step_replays_what_eager_steps_give(head_reduction, budgets):
    config = make_config(select_every=EVERY, dense_below=6 * PAGE + 2, head_reduction=head_reduction, **budgets)
    loops = [prefilled(make_attention(make_cache("cuda", num_blocks=128), config), 200, 45, 131) for _ in range(2)]
    (captured, seqs), (eager, same_seqs) = loops
    assert seqs == same_seqs
    static, graphs = [x.clone() for x in captured.rows(3)], {}
    for step in range(40):
        slots = [None if step % 10 == 9 else seqs[0], *seqs[1:]]
        inputs = eager.rows(3)
        for tensor, new in zip(static, inputs):
            tensor.copy_(new)
        for loop in (captured, eager):
            loop.attention.plan(slots, 1)
        kind = captured.attention.step_kind
        assert kind == eager.attention.step_kind and captured.attention.keeps == eager.attention.keeps
        if kind not in graphs:
            for layer in range(LAYERS):  # a warm-up; a step may be repeated
                captured.attention.run(layer, *static)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs = [captured.attention.run(layer, *static) for layer in range(LAYERS)]
            graphs[kind] = graph, outs
        graph, outs = graphs[kind]
        graph.replay()
        for layer in range(LAYERS):
            assert_same_bits(outs[layer], eager.attention.run(layer, *inputs))
    assert set(graphs) == {"quest", "reuse"}
    assert [out.shape for out in outs] == [(3, HEADS, DIM)] * LAYERS


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("quest", [QUEST_FROM_THE_START, DENSE_TO_100], ids=["quest", "dense-to-100"])
def test_replayed_graphs_give_the_tokens_of_eager_steps(quest, sampling):
    gpu_model, prompts = random_model(torch.bfloat16, "cuda"), random_prompts(*LENGTHS)
    quest = replace(quest, select_every=EVERY)
    generator, eager = (make(gpu_model, quest=quest, max_batch_size=3) for _ in range(2))
    eager._use_graphs = False
    results, expected = (g.generate(prompts, 40, stop_tokens=(), **sampling) for g in (generator, eager))
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    kinds = [kind for _, kind, _ in generator._graphs]
    assert len(kinds) == len(set(kinds)) and {"quest", "reuse"} <= set(kinds)

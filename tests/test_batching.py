"""More prompts than slots or pages: each gets the tokens it gets alone, in order, and none waits for ever."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from models import pages_of_16
from test_generate import (
    COVERING,
    DENSE_TO_100,
    QUEST,
    QUEST_FROM_THE_START,
    assert_same_choices,
    generate_with_logits,
    make,
    random_model,
    random_prompts,
)

from quest_ops.cache import PagedKVCache
from quest_ops.config import QuestConfig
from quest_ops.llama.batch import Batch
from quest_ops.llama.generate import Generator
from quest_ops.llama.model import Llama

SAMPLED = {"temperature": 1.5, "top_p": 0.9, "seed": 2**64 - 3}  # seed + i passes 2**64
LENGTHS = (90, 1, 200, 33, 64, 140, 17)


@pytest.fixture(scope="module")
def model():
    return random_model()


def alone(model, prompts, count, *, stop_tokens=(), seed=None, **settings):
    """The tokens of each prompt in a call of its own; its seed is that of the batch plus its place."""
    generator = make(model, max_batch_size=1, **{k: settings.pop(k) for k in ("attention", "quest") if k in settings})
    seeds = [None if seed is None else (seed + i) % 2**64 for i in range(len(prompts))]
    return [
        generator.generate([prompt], count, stop_tokens=stop_tokens, seed=seed, **settings)[0].tokens
        for prompt, seed in zip(prompts, seeds)
    ]


def note_steps(monkeypatch, generator) -> list[list[int | None]]:
    """Notes the sequences in the slots at every decode step of a generator."""
    steps, plan = [], generator.attention.plan

    def noted(seqs, new_tokens, *, prefill=False):
        if not prefill:
            steps.append(list(seqs))
        plan(seqs, new_tokens, prefill=prefill)

    monkeypatch.setattr(generator.attention, "plan", noted)
    return steps


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("attention", "quest"),
    [
        ("quest", QUEST),
        ("quest", DENSE_TO_100),
        ("quest", QUEST_FROM_THE_START),
        ("dense", QUEST),
        ("sdpa", QUEST),
    ],
    ids=["budget", "dense-to-100", "quest", "dense", "sdpa"],
)
def test_prompts_get_the_tokens_they_get_alone(model, attention, quest, sampling, monkeypatch):
    prompts = random_prompts(*LENGTHS)
    expected = alone(model, prompts, 40, attention=attention, quest=quest, **sampling)
    stop = expected[0][12]  # so that sequences leave at different times
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in expected]
    generator = make(model, attention=attention, quest=quest, max_batch_size=3, prefill_chunk=50)
    steps = note_steps(monkeypatch, generator)
    results = generator.generate(prompts, 40, stop_tokens=(stop,), **sampling)
    assert [result.tokens for result in results] == expected
    assert {len(seqs) for seqs in steps} == {3}, "the number of slots must not change: graphs depend on it"
    assert any(None in seqs for seqs in steps) and generator.cache.free_blocks == generator.cache.num_blocks


def test_a_budget_of_no_whole_pages_does_not_make_tokens_depend_on_neighbours(model):
    """A sequence of 65 to 79 tokens, more than the 4 pages of its budget, is sparse alone as beside a longer one."""
    quest = pages_of_16(token_budget=79, sink_tokens=16, recent_tokens=16)
    prompts = random_prompts(65, 66, 67, 200)
    results = make(model, quest=quest).generate(prompts, 12, stop_tokens=())
    assert [result.tokens for result in results] == alone(model, prompts, 12, quest=quest)
    dense = alone(model, prompts, 12, attention="dense")
    assert all(result.tokens != tokens for result, tokens in zip(results, dense)), "no prompt that tells them apart"


def test_a_slot_is_filled_in_the_step_after_it_is_free(model, monkeypatch):
    prompts = random_prompts(20, 30, 40, 50)
    generator = make(model, max_batch_size=2)
    tokens = alone(model, prompts, 10)
    stop = next(t for t in tokens[1][1:9] if t not in tokens[0] + tokens[2] + tokens[3])
    at = tokens[1].index(stop)
    steps = note_steps(monkeypatch, generator)
    generator.generate(prompts, 10, stop_tokens=(stop,))
    first, second, third, fourth = sorted({seq for seqs in steps for seq in seqs if seq is not None})
    # A prefill gives the first token of each; 9 steps give the others.
    assert steps[:at] == [[first, second]] * at
    assert steps[at:9] == [[first, third]] * (9 - at)
    assert steps[9 : at + 9] == [[fourth, third]] * at
    assert steps[at + 9 :] == [[fourth, None]] * (9 - at)


def test_out_of_pages_waits_for_others_to_finish(model, monkeypatch):
    prompts = random_prompts(100, 30, 60, 100, 5)
    generator = make(model, max_batch_size=4, cache_tokens=176)
    assert generator.cache.num_blocks == 11
    steps = note_steps(monkeypatch, generator)
    results = generator.generate(prompts, 13, stop_tokens=())  # 7, 3, 5, 7 and 2 blocks
    assert [result.tokens for result in results] == alone(model, prompts, 13)
    ran = [sum(seq is not None for seq in seqs) for seqs in steps]
    # 7 + 3 fit. The third waits for them; beside its 5 the fourth's 7 do not fit, and the fifth does not overtake.
    assert ran == [2] * 12 + [1] * 12 + [2] * 12
    assert generator.cache.free_blocks == 11


def test_what_can_never_fit_is_refused_before_anything_runs(model, monkeypatch):
    generator = make(model, max_batch_size=2, cache_tokens=100)
    monkeypatch.setattr(generator, "_prefill", lambda *_: pytest.fail("something ran"))
    prompts = random_prompts(10, 100)
    message = r"prompts\[1\] of 100 tokens and 14 new ones need 8 blocks .* never fit: the cache has 7 free of 7"
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, 14)
    generator.cache.extend(generator.cache.add(), 20)  # someone else's sequence
    with pytest.raises(ValueError, match="the cache has 5 free of 7"):
        generator.generate(prompts, 1)
    with pytest.raises(ValueError, match="cache_tokens must be at least 1, got 0"):
        make(model, cache_tokens=0)


def test_a_prompt_that_just_fits_runs(model):
    generator = make(model, max_batch_size=2, cache_tokens=112)
    prompts = random_prompts(100, 100)
    results = generator.generate(prompts, 13, stop_tokens=())
    assert [result.tokens for result in results] == alone(model, prompts, 13)


def test_samples_do_not_depend_on_the_slot(model):
    prompt = random_prompts(50)[0]
    sampling = {"temperature": 1.5, "stop_tokens": ()}
    in_turn = make(model, max_batch_size=1).generate([prompt] * 4, 12, seed=5, **sampling)
    at_once = make(model).generate([prompt] * 4, 12, seed=5, **sampling)
    assert [r.tokens for r in in_turn] == [r.tokens for r in at_once]
    assert len({tuple(r.tokens) for r in at_once}) == 4  # yet the same prompt is sampled anew
    assert make(model).generate([prompt], 12, seed=7, **sampling)[0].tokens == at_once[2].tokens


def test_results_tell_waiting_from_working(model, monkeypatch):
    """By a clock that moves on by 1 whenever it is looked at, so that equal work takes equally long."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("quest_ops.llama.batch.time", clock)
    prompts = random_prompts(100, 100, 100)
    first, second, third = make(model, max_batch_size=1).generate(prompts, 10, stop_tokens=())
    assert 0 < first.first_token_seconds < first.seconds
    for waits, result in ((1, second), (2, third)):
        assert result.first_token_seconds == waits * first.seconds + first.first_token_seconds
        assert result.seconds == (waits + 1) * first.seconds
    for result in (first, second, third):
        assert 0 < result.prefill_seconds == first.prefill_seconds and 0 < result.decode_seconds == first.decode_seconds
        assert result.prefill_seconds + result.decode_seconds < first.seconds
        assert result.decode_steps == 9


def test_streams_and_progress_cover_waiting_prompts(model):
    prompts, seen, progress = random_prompts(40, 60, 20), [], []
    results = make(model, max_batch_size=2).generate(
        prompts,
        5,
        stop_tokens=(),
        on_token=lambda *token: seen.append(token),
        progress=lambda *done: progress.append(done),
    )
    for i, result in enumerate(results):
        assert [token for index, token in seen if index == i] == result.tokens
    assert [p for p in progress if p[0] == "prefill"] == [("prefill", 100, 120), ("prefill", 120, 120)]
    assert progress[-1] == ("decode", 12, 12)


@pytest.mark.parametrize(("quest", "recorded"), [(QUEST, {0, 3}), (DENSE_TO_100, {3})])
def test_steps_of_recorded_pages_are_the_sequences_own(model, quest, recorded):
    """The first prompt's steps have 98 tokens to 105: where it attends to all, there is nothing to record."""
    prompts = random_prompts(97, 252, 130)  # the second has room for 5 tokens; the third joins the first's fifth step
    settings = {"record_pages": (0, 3), "profile_attention": True, "stop_tokens": ()}
    results = make(model, quest=quest, max_batch_size=2).generate(prompts, 9, **settings)
    assert [result.decode_steps for result in results] == [8, 4, 8]
    for prompt, steps, result in zip(prompts, (recorded, {0, 3}, {0, 3}), results):
        expected = make(model, quest=quest).generate([prompt], 9, **settings)[0]
        assert set(result.pages) == set(expected.pages) == {(s, layer) for s in steps for layer in range(3)}
        assert all(torch.equal(result.pages[key], pages) for key, pages in expected.pages.items())
        assert result.kv_read_share == expected.kv_read_share < 1
        assert 0 < result.decode_attention_seconds < result.decode_seconds
        assert 0 < result.prefill_attention_seconds < result.prefill_seconds


def test_an_interrupted_call_gives_back_what_waiting_and_running_prompts_held(model):
    generator, seen = make(model, max_batch_size=2), []

    def interrupt(index, token):
        seen.append(index)
        if index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(random_prompts(50, 60, 20, 30, 40), 4, on_token=interrupt, stop_tokens=())
    assert 4 not in seen and generator.cache.free_blocks == generator.cache.num_blocks


def test_a_batch_sets_blocks_aside_for_growth():
    cache = PagedKVCache(1, 1, 64, 10, dtype=torch.float32)
    batch = Batch(cache, blocks=[6, 5, 1, 4], slots=3)
    assert batch.admit() == [0] and batch.prompts == [0, None, None]
    assert batch.admit() == [] and cache.free_blocks == 10, "6 blocks are promised, though not taken yet"
    cache.extend(batch.seqs[0], 96)
    batch.release(0)
    assert cache.free_blocks == 10 and batch.running == []
    assert batch.admit() == [0, 1, 2] and batch.prompts == [1, 2, 3]
    batch.release(1)
    assert batch.running == [0, 2] and batch.admit() == []


def test_smollm2_gives_the_tokens_of_sdpa_under_a_covering_budget(smollm2):
    model, tokenizer = Llama.load("smollm2", dtype=torch.float32)
    prompt = tokenizer.encode("The three laws of motion were published by Isaac Newton in 1687. " * 4)
    covering = QuestConfig(token_budget=512, dense_below=0)
    tokens = {}
    for attention in ("sdpa", "quest", "dense"):
        generator = Generator(model, attention=attention, quest=covering, max_sequence_tokens=512)
        tokens[attention] = generator.generate([prompt], 64, stop_tokens=())[0].tokens
    assert len(tokens["sdpa"]) == 64
    assert tokens["quest"] == tokens["sdpa"] and tokens["dense"] == tokens["sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("attention", "quest"), [("quest", QUEST_FROM_THE_START), ("quest", DENSE_TO_100), ("dense", DENSE_TO_100)]
)
def test_replayed_graphs_serve_sequences_that_come_and_go(attention, quest, sampling):
    model = random_model(torch.bfloat16, "cuda")
    prompts = random_prompts(*LENGTHS)
    generator = make(model, attention=attention, quest=quest, max_batch_size=3)
    results = generator.generate(prompts, 40, stop_tokens=(), **sampling)
    assert len(generator._graphs) == len({kind for _, kind, _ in generator._graphs})
    eager = make(model, attention=attention, quest=quest, max_batch_size=3)
    eager._use_graphs = False
    expected = eager.generate(prompts, 40, stop_tokens=(), **sampling)
    assert [r.tokens for r in results] == [r.tokens for r in expected]


@pytest.mark.parametrize("attention", ["quest", "dense"])
def test_a_batch_in_one_graph_gives_each_sequence_what_it_gets_alone(device, attention):
    """In bfloat16 on a GPU: up to the rounding of products with other numbers of rows, for which a margin is asked."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, prompts = random_model(dtype, device), random_prompts(90, 1, 200, 33)

    def with_slots(slots: int) -> Generator:
        return make(model, attention=attention, quest=COVERING, max_batch_size=slots)

    batch = with_slots(4)
    assert batch._use_graphs == (device == "cuda")
    for prompt, steps in zip(prompts, generate_with_logits(batch, prompts, 40)):
        expected = generate_with_logits(with_slots(1), [prompt], 40)[0]
        assert_same_choices(steps, expected, 1e-4 if device == "cpu" else 0.06)

"""A look inside: the pages, the missed mass and the output's error are those of a plain computation of each step."""

import dataclasses

import pytest
import torch
from models import pages_of_16, random_llama, small_config

from quest_ops import QuestConfig, inspection
from quest_ops.inspection import inspect_prompt
from quest_ops.inspection_report import budget_of
from quest_ops.llama.generate import Generator

CONFIG = small_config()
STEPS = 6


def prompt_of(tokens: int) -> list[int]:
    return torch.randint(128, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


class Noting(inspection.Probe):
    """Keeps what each run of a layer was given, and a copy of the keys and values [L, Hkv, D] of its cache after it."""

    def __init__(self, attention):
        super().__init__(attention)
        self.steps = []
        Noting.last = self

    def run(self, layer, query, key, value):
        out = super().run(layer, query, key, value)
        blocks, length = self.cache.block_ids(0), self.cache.length(0)
        keys, values = (pool[blocks].flatten(0, 1)[:length] for pool in self._pool(layer))
        self.steps.append((layer, query[0], keys.clone(), values.clone(), out[0]))
        return out


def in_words(query, keys, values, page_ids, page_size):
    """Output with the pages, the exact output, and the share of the exact softmax outside of the pages, of one head."""
    logits = keys @ query / query.numel() ** 0.5
    seen = torch.isin(torch.arange(len(keys)) // page_size, page_ids)
    weights = logits.softmax(0)
    return logits[seen].softmax(0) @ values[seen], weights @ values, weights[~seen].sum()


@pytest.mark.parametrize("reduction", ["max", "none"])
def test_pages_mass_and_error_are_those_of_the_plain_computation(monkeypatch, reduction):
    monkeypatch.setattr(inspection, "Probe", Noting)
    model = random_llama(CONFIG, torch.float32, "cpu")
    quest = pages_of_16(
        page_size=8, token_budget=56, sink_tokens=8, recent_tokens=16, head_reduction=reduction, dense_layers=(1,)
    )
    found = inspect_prompt(model, prompt_of(301), quest, STEPS)
    selecting = {"max": 2, "none": 4}[reduction]
    assert found.layers == [0, 2] and found.num_pages == 39
    assert found.pages.shape == (STEPS, 2, selecting, 7) and found.missed.shape == (STEPS, 2, 4)
    runs = [run for run in Noting.last.steps if run[0] != 1]
    assert len(runs) == STEPS * 2
    error, norm = torch.zeros(2, STEPS, 2, 4, dtype=torch.float64)
    for place, (_, query, keys, values, output) in enumerate(runs):
        step, i = divmod(place, 2)
        assert len(keys) == 301 + step + 1
        for head in range(4):
            page_ids, kv_head = found.pages[step, i, head * selecting // 4], head // 2
            k, v = keys[:, kv_head], values[:, kv_head]
            out, exact, missed = in_words(query[head], k, v, page_ids, 8)
            torch.testing.assert_close(output[head], out, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.missed[step, i, head], missed.double(), rtol=1e-3, atol=1e-5)
            error[step, i, head], norm[step, i, head] = (out - exact).square().sum(), exact.square().sum()
            # The best 4 of the pages between the sink and the recent ones, by the bound in the paper's words.
            pages = k.split(8)
            heads = [head] if reduction == "none" else [2 * kv_head, 2 * kv_head + 1]
            scores = torch.stack([
                max(torch.maximum(query[h] * p.amin(0), query[h] * p.amax(0)).sum() for h in heads) for p in pages
            ])  # fmt: skip
            best = scores[1:-2].topk(4).indices + 1
            assert page_ids.tolist() == sorted([0, *best.tolist(), len(pages) - 2, len(pages) - 1])
    torch.testing.assert_close(found.norm, norm, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.error, error, rtol=1e-2, atol=1e-6)

    rows = found.by_layer()
    assert rows[1]["layer"] == 2
    assert rows[1]["missed_mass"] == pytest.approx(found.missed[:, 1].mean().item(), abs=1e-4)
    expected = (error[:, 1].sum() / norm[:, 1].sum()).sqrt().item()
    assert rows[1]["output_error"] == pytest.approx(expected, abs=1e-3) and expected > 0.01
    by_head = (error[:, 1].sum(0) / norm[:, 1].sum(0)).sqrt()
    assert rows[1]["output_error_by_head"] == pytest.approx(by_head.tolist(), abs=1e-3)
    by_step = sorted((error[:, 1].sum(-1) / norm[:, 1].sum(-1)).sqrt().tolist())
    low, high = rows[1]["output_error_of_steps"]
    assert by_step[0] <= low <= by_step[1] and by_step[-2] <= high <= by_step[-1]
    assert rows[1]["distinct_pages_by_head"] == [
        len(set(found.pages[:, 1, h].flatten().tolist())) for h in range(selecting)
    ]


@pytest.mark.parametrize("bound", ["minmax", "mean_std", "principal"])
def test_it_looks_at_what_a_generation_does(bound, device):
    """The tokens and the pages of Generator, for a budget that is no whole number of pages and 8-bit metadata too."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = random_llama(CONFIG, dtype, device)
    quest = pages_of_16(token_budget=124, dense_below=124, bound=bound, metadata_dtype=torch.float8_e4m3fn)
    prompt = prompt_of(124)  # the first step has one token too many for the budget
    told = []
    found = inspect_prompt(model, prompt, quest, STEPS, lambda *counts: told.append(counts))
    assert told == [("prefill", 124, 124), *(("decode", step + 1, STEPS) for step in range(STEPS))]
    generator = Generator(model, quest=quest, max_sequence_tokens=200, compile=False)
    generation = generator.generate([prompt], STEPS + 1, stop_tokens=(), record_pages=range(STEPS))[0]
    assert found.pages.shape[-1] == 7 and found.chosen().sum(-1).eq(7).all()
    assert torch.equal(found.pages[0, 0], generation.pages[0, 0])
    if device == "cpu":  # on a GPU the one-launch step rounds otherwise, and a later token or page may be another one
        assert found.tokens == generation.tokens
        for step, layer in generation.pages:
            assert torch.equal(found.pages[step, layer], generation.pages[step, layer])


@pytest.mark.parametrize("ratio", [None, 0.7])
def test_it_looks_at_what_a_generation_does_with_budgets_by_head(ratio):
    model = random_llama(CONFIG, torch.float32, "cpu")
    tokens = ((7, 9), (8, 8), (10, 6))
    by_head = tuple(tuple(16 * pages for pages in heads) for heads in tokens)
    quest = pages_of_16(token_budget=128, head_budgets=by_head, dense_layers=(1,), budget_ratio=ratio)
    prompt = prompt_of(204)
    found = inspect_prompt(model, prompt, quest, STEPS)
    if ratio is None:
        assert found.chosen().sum(-1).tolist() == [[[7, 9], [10, 6]]] * STEPS
        assert budget_of(found) == "6 to 10"
    else:  # of 205 to 210 tokens 8 or, from 206 on, 9 pages on average
        assert found.chosen().sum(-1).tolist() == [[[7, 9], [10, 6]]] + [[[7, 10], [11, 6]]] * (STEPS - 1)
    generator = Generator(model, quest=quest, max_sequence_tokens=256, compile=False)
    generation = generator.generate([prompt], STEPS + 1, stop_tokens=(), record_pages=range(STEPS))[0]
    assert found.tokens == generation.tokens and len(generation.pages) == 2 * STEPS
    for (step, layer), pages in generation.pages.items():
        most = pages.size(-1)
        assert torch.equal(found.pages[step, layer // 2, :, :most], pages)
        assert found.pages[step, layer // 2, :, most:].eq(-1).all() and pages[:, -1].ge(0).any()


def test_it_looks_at_the_pages_that_a_generation_keeps():
    model, prompt = random_llama(CONFIG, torch.float32, "cpu"), prompt_of(201)  # the first new token is number 9
    by_head = ((112, 144), (128, 128), (160, 96))
    quest = pages_of_16(token_budget=128, head_budgets=by_head, select_every=4)
    found = inspect_prompt(model, prompt, quest, STEPS)
    generator = Generator(model, quest=quest, max_sequence_tokens=256, compile=False)
    generation = generator.generate([prompt], STEPS + 1, stop_tokens=(), record_pages=range(STEPS))[0]
    assert found.tokens == generation.tokens
    for (step, layer), pages in generation.pages.items():
        assert torch.equal(found.pages[step, layer, :, : pages.size(-1)], pages)
    # Tokens 201, 204 choose; 202 and 203 keep, as 205 and 206 do.
    for step, kept in enumerate((False, True, True, False, True, True)):
        assert step == 0 or torch.equal(found.pages[step], found.pages[step - 1]) == kept


def test_what_cannot_be_looked_at_is_named():
    model = random_llama(CONFIG, torch.float32, "cpu")
    quest = QuestConfig(token_budget=128)
    with pytest.raises(ValueError, match="127 tokens, which the token budget of 128 holds"):
        inspect_prompt(model, prompt_of(127), quest, 4)
    with pytest.raises(ValueError, match="510 tokens, and with 3 new ones 513; this model has 512 positions"):
        inspect_prompt(model, prompt_of(510), quest, 3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        inspect_prompt(model, prompt_of(200), quest, 0)
    with pytest.raises(ValueError, match="none uses Quest"):
        inspect_prompt(model, prompt_of(200), dataclasses.replace(quest, dense_layers=(0, 1, 2)), 4)

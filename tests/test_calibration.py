"""Calibration: errors are those of the heads, pages go where they help most, and their total is kept."""

import itertools

import pytest
import torch
from models import random_llama, small_config

from quest_ops import QuestConfig
from quest_ops.calibration import calibrate, head_errors, share_out

CONFIG = small_config(vocab_size=100)
QUEST = QuestConfig(
    page_size=8, token_budget=64, sink_tokens=8, recent_tokens=8, bound="mean_std", metadata_dtype=torch.float8_e4m3fn
)
SIZES = {"context": 180, "windows": 2, "steps": 20}


@pytest.fixture(scope="module")
def model():
    return random_llama(CONFIG, torch.float32, "cpu")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(100, (500,), generator=torch.Generator().manual_seed(0)).tolist()


def test_no_other_shares_of_whole_pages_lose_less():
    """By trial of all of them, for convex curves."""
    generator = torch.Generator().manual_seed(0)
    budgets = [1, 2, 3, 4, 5, 6]
    for _ in range(20):
        gains = torch.rand(3, 5, generator=generator, dtype=torch.float64).sort(descending=True).values
        curves = (3 - torch.cat([torch.zeros(3, 1, dtype=torch.float64), gains.cumsum(1)], 1)).tolist()
        for total in range(3, 19):
            pages, left = share_out(budgets, curves, total)
            assert sum(pages) == total and all(1 <= n <= 6 for n in pages)
            assert left == pytest.approx(sum(curve[n - 1] for curve, n in zip(curves, pages)))
            others = (
                sum(curve[n - 1] for curve, n in zip(curves, pages))
                for pages in itertools.product(budgets, repeat=3)
                if sum(pages) == total
            )
            assert left == pytest.approx(min(others))


def test_curves_are_convex_hulls_between_whole_pages():
    # The first falls late: by 0.1 a page from 2 to 10. The second by 0.3, to 4 pages, and then no more, though measured
    # to rise again.
    curves = [[1.0, 0.99, 0.2], [1.0, 0.4, 0.6]]
    assert share_out([2, 4, 10], curves, 4) == ([2, 2], 2.0)
    assert share_out([2, 4, 10], curves, 5) == ([2, 3], pytest.approx(1.7))
    assert share_out([2, 4, 10], curves, 9) == ([5, 4], pytest.approx(1.1))
    assert share_out([2, 4, 10], curves, 15) == ([10, 5], pytest.approx(0.6))  # all are given out
    assert share_out([2, 4, 10], curves, 20) == ([10, 10], pytest.approx(0.6))
    for total in (3, 21):
        with pytest.raises(ValueError, match=f"total {total} pages for 2 curves of 2 to 10"):
            share_out([2, 4, 10], curves, total)


def test_errors_add_up_to_the_relative_error_of_a_layer(model, tokens):
    """Measured another way: layer by layer with all heads at one budget, against exact attention."""
    pieces = [tokens[:200], tokens[250:450]]
    errors = head_errors(model, pieces, 180, QUEST, [3, 8, 25])
    assert errors.shape == (3, 2, 3) and errors.dtype == torch.float64
    assert (errors[..., 2] < 1e-9).all()  # 25 pages are the whole piece
    assert (errors[..., 0] > errors[..., 1]).all() and (errors[..., 1] > 1e-4).all()

    class Together:
        """Exact attention through a plain softmax, and the error of Quest's choice by the public ops."""

        def __init__(self):
            self.keys, self.values, self.terms = {}, {}, torch.zeros(3, 2, dtype=torch.float64)

        def run(self, layer, query, key, value):
            for held, new in ((self.keys, key), (self.values, value)):
                held[layer] = torch.cat([held[layer], new]) if layer in held else new
            keys, values = (held[layer].repeat_interleave(2, 1) for held in (self.keys, self.values))
            logits = torch.einsum("nhd,lhd->hnl", query, keys) / 8
            seen = torch.ones(len(query), len(keys), dtype=torch.bool).tril(len(keys) - len(query))
            exact = torch.einsum("hnl,lhd->nhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)
            if len(keys) <= 180:
                return exact
            for row in range(len(query)):
                n = len(keys) - len(query) + row + 1
                for head in range(4):
                    chosen = self.chosen(layer, query[row], n, head)
                    out = logits[head, row, chosen].softmax(-1) @ values[chosen, head]
                    self.terms[layer, 0] += (out - exact[row, head]).square().sum()
                self.terms[layer, 1] += exact[row].square().sum()
            return exact

        def chosen(self, layer, query, n, head):
            """Tokens of the first, the last and the 6 best pages of the KV head."""
            first = head // 2 * 2
            pages = []
            for start in range(0, n, 8):
                keys = self.keys[layer][start : min(start + 8, n), head // 2]
                mean = keys.mean(0)
                radius = (keys - mean).square().mean(0).sqrt()
                pages.append(torch.stack([q @ mean + q.abs() @ radius for q in query[first : first + 2]]).max())
            best = torch.stack(pages[1:-1]).topk(6).indices + 1
            page = torch.arange(n) // 8
            return torch.isin(page, torch.cat([best, torch.tensor([0, len(pages) - 1])])).nonzero()[:, 0]

    total = torch.zeros(3, 2, dtype=torch.float64)
    for piece in pieces:
        together = Together()
        with torch.inference_mode():
            for start, stop in ((0, 180), *((i, i + 1) for i in range(180, 200))):
                model(torch.tensor(piece[start:stop]), torch.arange(start, stop), together)
        total += together.terms
    torch.testing.assert_close(errors[..., 1].sum(1), total[:, 0] / total[:, 1], rtol=0.02, atol=1e-6)


def test_calibrated_budgets_have_the_total_and_lose_less_as_predicted(model, tokens):
    seen = []
    found = calibrate(model, tokens, QUEST, **SIZES, progress=lambda *counts: seen.append(counts))
    assert sum(map(sum, found.tokens)) == 64 * 3 * 2
    assert all(24 <= n <= 256 and n % 8 == 0 for heads in found.tokens for n in heads)
    assert len(set(itertools.chain(*found.tokens))) > 1
    assert 0 < found.error < found.uniform_error < 1
    assert seen[-1] == ("measure", 400, 400)
    assert found.config(QUEST).head_budgets == found.tokens
    assert calibrate(model, tokens, QUEST, **SIZES) == found


def test_dense_layers_and_the_rest_of_a_page_take_no_pages_from_the_others(model, tokens):
    config = QuestConfig(page_size=8, token_budget=71, sink_tokens=8, recent_tokens=8, dense_layers=(1,))
    found = calibrate(model, tokens, config, **SIZES)
    assert found.tokens[1] == (64, 64) and sum(map(sum, found.tokens)) == 64 * 6
    assert found.config(config).token_budget == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"context": 64}, "context must be more than the token budget, 64, got 64"),
        ({"context": 500}, "context 500 and steps 20 are more than the model's 512 positions"),
        ({"windows": 3}, r"the text has 500 tokens, too few for 3 windows of 180 \+ 20"),
        ({"config": QuestConfig(token_budget=96, head_budgets=((96, 96),) * 3)}, "head_budgets must be None"),
        ({"config": QuestConfig(token_budget=96, dense_layers=(0, 1, 2))}, "no layer is left"),
    ],
)
def test_what_cannot_be_measured_is_named_at_once(model, tokens, settings, message, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        calibrate(model, tokens, **{"config": QUEST, **SIZES, **settings})

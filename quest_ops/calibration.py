"""Budgets by layer and KV head, from a text: measure what each head loses at some budgets, then share out the pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quest_ops.attention import MAX_ROWS_PER_REQUEST, QuestAttention
from quest_ops.config import QuestConfig, check_int
from quest_ops.fidelity import Step, compare
from quest_ops.llama.model import Llama

MULTIPLES = tuple(2 ** (i / 2) for i in range(-6, 5))  # of the page budget, 1/8 to 4: where errors are measured
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Calibration:
    """tokens: [layers][KV heads], whole pages, page_budget * page_size tokens on average.

    uniform_error, error: relative error of a layer's attention output, the root of the mean square over the sparse
    layers: measured with page_budget pages for each head, and predicted for `tokens`.
    """

    tokens: tuple[tuple[int, ...], ...]
    uniform_error: float
    error: float

    def config(self, config: QuestConfig) -> QuestConfig:
        """`config` with these budgets."""
        return replace(config, token_budget=config.page_budget * config.page_size, head_budgets=self.tokens)


def calibrate(
    model: Llama,
    tokens: list[int],
    config: QuestConfig,
    *,
    context: int,
    windows: int = 4,
    steps: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Shares out config.token_budget * layers * KV heads tokens among the heads, where they lower the error most.

    tokens: of a text. `windows` pieces of it, evenly spread, are prefilled with `context` tokens each; the next `steps`
    are decoded, teacher-forced and with exact attention. Beside it each layer attends as `config` says to some budgets
    of pages, with the ops that a decoder runs; head_errors says what is measured, share_out how pages are given.
    context should be several times the budget, and of the length that the budgets are for: what a head needs grows
    with it; config.budget_ratio and select_every are not looked at. progress("measure", done, total) counts tokens.

    Raises TypeError or ValueError for counts below 1, a context that the budget covers, more tokens than the model has
    positions or the text has, and a config that has head_budgets already.
    """
    for name, value in (("context", context), ("windows", windows), ("steps", steps)):
        check_int(name, value, 1)
    if config.head_budgets is not None:
        raise ValueError("config.head_budgets must be None: they are what calibrate finds")
    if context <= config.token_budget:
        raise ValueError(f"context must be more than the token budget, {config.token_budget}, got {context}")
    size, positions = context + steps, model.config.max_position_embeddings
    if size > positions:
        raise ValueError(f"context {context} and steps {steps} are more than the model's {positions} positions")
    if len(tokens) < size * windows:
        raise ValueError(f"the text has {len(tokens)} tokens, too few for {windows} windows of {context} + {steps}")
    sparse = [layer for layer in range(model.config.num_hidden_layers) if layer not in config.dense_layers]
    if not sparse:
        raise ValueError(f"config.dense_layers is {config.dense_layers}: no layer is left to calibrate")
    starts = [i * (len(tokens) // windows) for i in range(windows)]
    pieces = [tokens[start : start + size] for start in starts]

    least, uniform = config.sink_pages + config.recent_pages + 1, config.page_budget
    all_pages = -(-size // config.page_size)
    budgets = sorted({least} | {min(max(least, int(uniform * share)), all_pages) for share in MULTIPLES})
    errors = head_errors(model, pieces, context, config, budgets, progress)
    curves = errors[sparse].flatten(0, 1).tolist()
    pages, left = share_out(budgets, curves, uniform * len(curves))
    found = torch.full(errors.shape[:2], uniform)
    found[sparse] = torch.tensor(pages).view(len(sparse), -1)
    measured = errors[sparse, :, budgets.index(uniform)].sum()
    return Calibration(
        tokens=tuple(map(tuple, (found * config.page_size).tolist())),
        uniform_error=(measured.item() / len(sparse)) ** 0.5,
        error=(left / len(sparse)) ** 0.5,
    )


def head_errors(
    model: Llama,
    pieces: list[list[int]],
    context: int,
    config: QuestConfig,
    budgets: list[int],
    progress: Callable[[str, int, int], None] | None = None,
) -> Tensor:
    """[layers, KV heads, budgets in pages] float64: the squared error of the outputs of a KV head's query heads, over
    the squared norm of the layer's exact outputs, both summed over the decoded rows of all pieces.

    So a layer's errors add up over its heads to the square of its relative error.
    """
    heads, longest = model.config.num_attention_heads, max(map(len, pieces))
    cache = model.new_cache(config, -(-longest // config.block_size))
    exact = QuestAttention(config, cache, heads, backend="dense", max_batch_size=1, max_sequence_tokens=longest)
    probe = _Probe(exact, budgets)
    done, total = 0, sum(map(len, pieces))
    with torch.inference_mode():
        for piece in pieces:
            seq = cache.add()
            while (start := cache.length(seq)) < len(piece):
                prefill = start < context
                stop = min(start + PREFILL_CHUNK, context) if prefill else start + MAX_ROWS_PER_REQUEST
                part = torch.tensor(piece[start:stop], device=model.device)
                exact.plan([seq], len(part), prefill=prefill)
                model(part, exact.positions, probe, part.new_zeros(1))
                done += len(part)
                if progress is not None:
                    progress("measure", done, total)
            cache.free(seq)
    return (probe.errors / probe.norms[:, None, None]).cpu()


class _Probe(Step):
    """For a decoder: attends exactly, and beside it with each budget, so that all budgets meet the same queries."""

    def __init__(self, attention: QuestAttention, budgets: list[int]):
        super().__init__(attention)
        self.budgets = budgets
        layers, heads, device = self.cache.num_layers, self.cache.num_kv_heads, self.cache.device
        self.errors = torch.zeros(layers, heads, len(budgets), dtype=torch.float64, device=device)
        self.norms = torch.zeros(layers, dtype=torch.float64, device=device)

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.attention.step_kind == "prefill":
            return self.attention.run(layer, query, key, value)
        self.append(layer, key, value)
        exact, exact_lse = self.exact(layer, query)
        for i, pages in enumerate(self.budgets):
            error, norm, _ = compare(*self.quest(layer, query, pages), exact, exact_lse)  # [R, Hq]
            self.errors[layer, :, i] += error.unflatten(1, (self.cache.num_kv_heads, -1)).sum((0, 2))
        self.norms[layer] += norm.sum()
        return exact


def share_out(budgets: list[int], curves: list[list[float]], total: int) -> tuple[list[int], float]:
    """Pages for each curve, `total` in all, so that the sum of the curves is least; and that sum.

    budgets: pages, ascending. curves: an error at each of them. Each curve is replaced by its lower convex hull, linear
    between budgets; then pages go, one by one, where they lower the sum most (Shoham and Gersho, "Efficient bit
    allocation for an arbitrary set of quantizers", 1988). Equal gains go to the first curve. No curve gets less than
    the first budget or more than the last: total must lie between those, times the number of curves.
    """
    pages = [budgets[0]] * len(curves)
    spare = total - sum(pages)
    if not 0 <= spare <= (budgets[-1] - budgets[0]) * len(curves):
        raise ValueError(f"total {total} pages for {len(curves)} curves of {budgets[0]} to {budgets[-1]} each")
    pieces, left = [], 0.0
    for i, curve in enumerate(curves):
        hull = _lower_hull(budgets, curve)
        left += hull[0][1]
        pieces += [((e0 - e1) / (b1 - b0), i, b1 - b0) for (b0, e0), (b1, e1) in zip(hull, hull[1:])]
    # A hull's gains fall, so that its pieces come in their order.
    for gain, i, size in sorted(pieces, key=lambda piece: -piece[0]):
        taken = min(size, spare)
        pages[i] += taken
        left -= gain * taken
        spare -= taken
    return pages, left


def _lower_hull(budgets: list[int], curve: list[float]) -> list[tuple[int, float]]:
    """The convex hull from below of a curve that more pages never raise (Andrew's monotone chain, 1979)."""
    hull: list[tuple[int, float]] = []
    lowest = curve[0]
    for b, error in zip(budgets, curve, strict=True):
        lowest = min(lowest, error)
        while len(hull) > 1:
            (b0, e0), (b1, e1) = hull[-2:]
            if (e0 - e1) * (b - b1) > (e1 - lowest) * (b1 - b0):
                break
            hull.pop()
        hull.append((b, lowest))
    return hull

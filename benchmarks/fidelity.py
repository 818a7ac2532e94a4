"""How near a policy's attention output is to the exact one, and how much of the true attention mass it keeps."""

import math

import torch
from attend import Step
from torch import Tensor

from quest_ops.fidelity import compare, relative_error, rounded


class Probe(Step):
    """For a decoder: attends exactly, and beside it with a policy, so that all policies meet the same queries and keys.

    sums [3, windows, layers, Hq] float64, over the rows of each window: |out - exact|^2, |exact|^2 and the share of the
    exact attention's mass that lies in the chosen pages, exp(lse - exact lse).
    """

    def __init__(self, attention, oracle: bool, windows: int):
        super().__init__(attention)
        self.chosen = self.oracle if oracle else self.policy
        shape = 3, windows, self.cache.num_layers, attention.num_query_heads
        self.sums = torch.zeros(shape, dtype=torch.float64, device=self.cache.device)

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.append(layer, key, value)
        exact, exact_lse = self.exact(layer, query)
        out, lse = self.chosen(layer, query)
        terms = compare(out, lse, exact, exact_lse)
        self.sums[:, :, layer] += terms.unflatten(1, (-1, self.rows)).sum(2)
        return exact


def summary(sums: Tensor, tokens: int, kinds: list[str]) -> dict:
    """What the sums of windows of `tokens` rows, each of a kind of text, say about a policy.

    A relative error is the root of the sum of |out - exact|^2 over that of |exact|^2: over rows; for a layer, also over
    its query heads. A policy's error is the mean over layers and windows, its mass that over heads, too.
    """
    error, norm, mass = sums.cpu()
    by_window = relative_error(error, norm, -1).mean(-1)
    mass = mass / tokens
    return {
        "error": by_window.mean().item(),
        "standard_error": by_window.std().item() / math.sqrt(len(by_window)),
        "mass": mass.mean().item(),
        "windows": len(by_window),
        "tokens": tokens,
        "error_by_kind": {k: by_window[[x == k for x in kinds]].mean().item() for k in dict.fromkeys(kinds)},
        "error_by_layer": rounded(relative_error(error, norm, (0, 2))),
        "mass_by_layer": rounded(mass.mean((0, 2))),
        "error_by_head": rounded(relative_error(error, norm, 0)),
        "mass_by_head": rounded(mass.mean(0)),
    }

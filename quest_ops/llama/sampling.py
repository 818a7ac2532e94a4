"""Choosing the next token: greedy, or at a temperature from the most likely tokens (nucleus sampling)."""

import torch
from torch import Tensor

from quest_ops.config import check_int


class Sampler:
    """Samples rows of logits on their device; the host never waits for a value.

    All that changes from step to step lies in buffers with fixed addresses, so that a CUDA graph can hold `sample`:
    call `draw` for its rows before each run of it, and key graphs by `kind`. A row's random numbers come from the
    generator that is given for it: the same seed and the same calls give the same tokens on the same device, whatever
    the other rows hold.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device):
        self.noise = torch.empty(max_rows, vocab_size, device=device)
        self.temperature = torch.ones((), device=device)
        self.top_p = torch.ones((), device=device)
        self.kind = "greedy"

    def start(self, temperature: float, top_p: float, seed: int | None) -> int:
        """Settings for the steps to come. temperature 0: greedy. Returns the seed, below 2**64; None: a fresh one.

        Raises ValueError and TypeError as `check_sampling`.
        """
        check_sampling(temperature, top_p, seed)
        self.kind = "greedy" if temperature == 0 else "temperature" if top_p == 1 else "top_p"
        self.temperature.fill_(temperature)
        self.top_p.fill_(top_p)
        return torch.Generator().seed() if seed is None else seed % 2**64

    def draw(self, row: int, generator: torch.Generator) -> None:
        """Fresh random numbers for a row of the next `sample`."""
        if self.kind != "greedy":
            self.noise[row].exponential_(generator=generator)

    def sample(self, logits: Tensor, rows: list[int] | None = None) -> Tensor:
        """logits [R, V] float32 of these rows (None: the first R) -> tokens [R] int64."""
        if self.kind == "greedy":
            return logits.argmax(-1)
        probabilities = torch.softmax(logits / self.temperature, -1)
        if self.kind == "top_p":
            probabilities = keep_nucleus(probabilities, self.top_p)
        # An exponential race: argmax of p / Exp(1) is distributed as p; torch.multinomial would wait for the device.
        noise = self.noise[: len(logits)] if rows is None else self.noise[rows]
        return (probabilities / noise).argmax(-1)


def check_sampling(temperature: float, top_p: float, seed: int | None) -> None:
    """Raises ValueError for temperature < 0, top_p outside (0, 1] or a seed of more than 64 bits; TypeError for a seed
    that is no int."""
    if not (isinstance(temperature, (int, float)) and 0 <= temperature < float("inf")):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature!r}")
    if not (isinstance(top_p, (int, float)) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    if seed is not None and check_int("seed", seed, -(2**63)) >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")


def keep_nucleus(probabilities: Tensor, top_p: Tensor | float) -> Tensor:
    """Zeroes all but the fewest most likely tokens that hold `top_p` of the mass (Holtzman et al., ICLR 2020).

    probabilities, result: [R, V]; what is kept is not rescaled. At least one token is.
    """
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered * (mass_before < top_p))

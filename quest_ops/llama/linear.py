"""Products by weights of 16 or 32 bits, in bfloat16 also on x86 CPUs that have no instructions for it."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

few_rows = None
if torch.version.cuda and importlib.util.find_spec("triton"):
    from . import few_rows


def has_x86_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


# Without instructions torch multiplies row by row. Milliseconds in the linear layers of SmolLM2-135M for 1, 4, 8 and
# 512 tokens (torch 2.13, 2 cores of an AMD EPYC with AVX2): 16, 47, 90 and 5600; with weights expanded to float32 for
# the call 26, 46, 54 and 680; a model in float32 takes 34, 58, 55 and 700.
MULTIPLIES_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or not has_x86_vectors()  # others: as torch does it
ROWS = 3  # up to so many, row by row is faster


class Linear(nn.Linear):
    """torch's, by `multiply`; where calls are compiled, of few rows on a GPU, by `few_rows`.

    Compiled calls are for a CUDA graph, in which Triton's launches take no time on the host.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and few_rows and few_rows.serves(x, self.weight):
            out = few_rows.multiply_few_rows(x, self.weight)
            return out if self.bias is None else out + self.bias
        return multiply(x, self.weight, self.bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K], weight [N, K], bias [N] -> [M, N], all of one dtype."""
    if x.is_cpu and x.dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16 and len(x) > ROWS:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)

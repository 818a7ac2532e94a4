"""How torch.compile makes the parts of a decode step around the attention."""

from __future__ import annotations

import torch

from .linear import Linear
from .quantized import Int8Linear


def compile_options(linear: type) -> dict[str, object]:
    """Options of torch.compile for a few rows, where most products are those of this class; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    from torch._inductor import config  # takes seconds

    options = {}
    if hasattr(config.triton, "enable_pdl"):  # each kernel starts while the one before it ends: 4% less a step
        options["triton.enable_pdl"] = True
    if linear in (Linear, Int8Linear):
        # Products of a row by 16-bit weights (of 2 to 16 rows: see `few_rows`): 3 to 7% less a step of Llama-2-7B on an
        # H100, for 10 to 30 seconds more at first; without a word. Other products are not torch's kernels, and what is
        # left takes a few microseconds, which tuning cannot tell apart: a norm of 2.4 us then took 1.5 to 12.
        options |= {"max_autotune_gemm": True, "coordinate_descent_tuning": True, "autotune_num_choices_displayed": 0}
    return options

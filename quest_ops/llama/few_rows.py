"""Products of a few rows by 16-bit weights, in one Triton kernel that reads the weights at the memory's rate.

Triton, because no library that was measured reaches it: for 8 rows (H100, bfloat16, the four products of a layer of
Llama-3.1-8B, each after a norm) cuBLAS took 181 us, this kernel 165; kernels that torch.compile chooses by timing took
160 to 180 without the norms, by chance, and 10 to 30 seconds to choose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_ROWS = 16  # the columns of a product by tensor cores
OUTPUTS, INPUTS, TILES_AHEAD, WARPS = 64, 128, 6, 4  # of a block: of a tile of weights, and tiles on their way
EARLY_INPUTS = 256  # of its weights, asked for before the kernel ahead has ended


@triton.jit
def _multiply(
    x, weight, out, rows, outputs, inputs,
    MOST: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, MOST)
    weights = weight + output[:, None].to(tl.int64) * inputs
    lines = (weights + tl.arange(0, EARLY // 64)[None, :] * 64).to(tl.int64)  # of 128 bytes
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )
    gdc_wait()
    gdc_launch_dependents()
    total = tl.zeros((OUTPUTS, MOST), tl.float32)
    for start in tl.range(0, inputs, INPUTS, num_stages=AHEAD):
        channel = start + tl.arange(0, INPUTS)
        tile = tl.load(weights + channel[None, :], eviction_policy="evict_first")
        columns = tl.load(x + row[None, :] * inputs + channel[:, None], mask=(row < rows)[None, :], other=0.0)
        total = tl.dot(tile, columns, total)
    tl.store(out + row[None, :] * outputs + output[:, None], total.to(out.dtype.element_ty), (row < rows)[None, :])


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply_few_rows` takes x [M, K] and weight [N, K]: 2 to 16 rows in float16 or bfloat16, N a multiple
    of 64 and K of 256, on a GPU of compute capability 9.0 or later, where a kernel can start before its inputs are
    there."""
    return (
        x.is_cuda
        and x.device == weight.device
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and 2 <= x.size(0) <= MOST_ROWS
        and weight.size(0) % OUTPUTS == 0
        and weight.size(1) % EARLY_INPUTS == 0
        and torch.cuda.get_device_properties(x.device).major >= 9
    )


@torch.library.custom_op("quest_ops_llama::multiply_few_rows", mutates_args=(), device_types="cuda")
def multiply_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], weight [N, K] -> [M, N], sums in float32. Products are the same whatever M. Raises ValueError for what
    `serves` is not true of."""
    if not serves(x, weight):
        raise ValueError(
            "x must have 2 to 16 rows and weight be [N, K] of N % 64 = 0 and K % 256 = 0, both in float16 or bfloat16 "
            f"on one GPU of compute capability 9.0 or later, got {list(x.shape)} in {x.dtype} on {x.device} and "
            f"{list(weight.shape)} in {weight.dtype} on {weight.device}"
        )
    rows, inputs = x.shape
    outputs = weight.size(0)
    out = x.new_empty(rows, outputs)
    with torch.cuda.device(x.device):
        _multiply[(outputs // OUTPUTS,)](
            x.contiguous(), weight.contiguous(), out, rows, outputs, inputs, MOST_ROWS, OUTPUTS, INPUTS, TILES_AHEAD,
            EARLY_INPUTS, num_warps=WARPS, num_stages=TILES_AHEAD, launch_pdl=True,
        )  # fmt: skip
    return out


@multiply_few_rows.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))

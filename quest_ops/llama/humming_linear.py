"""Linear layers with weights of 8 or 4 bits, multiplied by humming's kernels: nearly as fast for 16 rows as for one,
and made for many rows too.

humming (github.com/vllm-project/humming, the extra "int4" of this package) compiles a few kernels for each shape of
weights when a layer of that shape is first made, within seconds, and keeps them in a folder of its own.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

# A zero point is kept in bfloat16, in steps of the scale. Were it larger, its rounding would be felt.
MOST_ZERO_POINT = 512
ROWS = 8, 16  # the numbers that kernels are made for
MANY_ROWS = 64, 8192


def humming_takes(outputs: int, inputs: int, device: torch.device) -> bool:
    """Whether humming is installed and serves weights [outputs, inputs] on this device."""
    if device.type != "cuda" or outputs % 128 or inputs % 128 or not _is_installed():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("humming") is not None


class HummingLinear(nn.Module):
    """Weights (code - zero_point) * scale, bfloat16 inputs, outputs and bias.

    codes: [N, K] of 0 to 15 (4 bits) or 0 to 255 (8 bits), N and K multiples of 128.
    scales: bfloat16, [N, K / group_size] of a group_size of 128, 64 or 32 (4 bits), or [N, 1] (8 bits).
    zero_points: like scales, of magnitude up to 512; with 8 bits None, which stands for 128.
    In the product a weight is what two roundings to bfloat16 leave of it.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None = None):
        from humming.kernel.humming import HummingKernel
        from humming.layer import HummingLayer
        from humming.ops import pack_weight

        super().__init__()
        self.out_features, self.in_features = codes.shape
        bits = 8 if zero_points is None else 4
        self.kind = f"int{bits}"
        groups = {"group_size": 0} if bits == 8 else {"group_size": self.in_features // scales.size(1)}
        zeros = {"has_zero_point": bits == 4, "is_fp_zero_point": bits == 4}
        tensors = {"weight": pack_weight(codes.int().contiguous(), bits), "weight_scale": scales.contiguous()}
        if zero_points is not None:
            tensors["zero_point"] = zero_points.contiguous()
        with torch.cuda.device(codes.device):
            layer = HummingLayer(
                shape_n=self.out_features,
                shape_k=self.in_features,
                weight_config={"dtype": self.kind, **groups, **zeros},
                torch_dtype=torch.bfloat16,
            ).to(codes.device)
            layer.load_from_tensors(tensors)
            layer.transform()
            config = layer.humming_config
            self.kernels = HummingKernel.prepare_kernels(config.to_str(), None, _tuning(layer, codes.device))
        self.register_buffer("packed", layer.weight.data)
        self.register_buffer("scales", layer.weight_scale.data)
        self.register_buffer("zero_points", None if zero_points is None else layer.zero_point.data)
        self.register_buffer("locks", layer.locks)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], bfloat16."""
        from humming.ops import launch_kernel

        out = launch_kernel(
            configs=self.kernels,
            inputs=x.contiguous(),
            weight=self.packed,
            weight_scale=self.scales,
            zero_point=self.zero_points,
            outputs=x.new_empty(len(x), self.out_features),
            locks=self.locks,
        )
        return out if self.bias is None else out + self.bias

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.packed.is_cpu or self.scales.dtype != torch.bfloat16:
            raise RuntimeError(
                f"{self.kind} weights cannot become {self.scales.dtype} on {self.packed.device}: load the model there, "
                "in bfloat16"
            )
        return self


def _tuning(layer: nn.Module, device: torch.device) -> list:
    """Which kernel serves how many rows: [more than, at most, its shape]. Above 16 rows as humming chooses."""
    from humming.layer import HummingLayerMethod

    # Up to 16 rows, its choice reads some shapes slowly. In us, on an H100, a row by 4-bit weights: 6144x4096 13.9 as
    # it chooses, 11.6 here; 28672x4096 36.3, 31.8; 12288x4096 19.0, 17.2; 22016x4096 29.2, 25.4; with K of 14336 or
    # 11008 19.9 and 19.2, 20.7 and 18.3. By 8-bit weights 128256x4096: 194, 185.
    outputs, inputs = layer.shape_n, layer.shape_k
    gpu = torch.cuda.get_device_properties(device)
    stages = dict.fromkeys(ROWS, 4)
    if outputs <= 64 * gpu.multi_processor_count and inputs <= 4096 and inputs % 256 == 0:
        # Each block's sums are whole. Blocks take two thirds of an SM's shared memory, so that each has an SM to
        # itself: they are there before a decoder's attention has ended, and two or more met on SMs that it left free
        # (4096x4096, after attention: 12.9 us with 4 stages, 8.0 so).
        tile, blocks = (64, 256), 1
        weights = tile[0] * tile[1] * layer.weight.nbytes // (outputs * inputs)
        for rows in ROWS:
            stages[rows] = max(4, gpu.shared_memory_per_block_optin * 2 // 3 // (weights + 2 * rows * tile[1]))
    elif outputs < 170 * gpu.multi_processor_count:
        tile, blocks = (64, 128), 3
    else:
        tile, blocks = (128, 128), 2
    few = [
        {
            "block_shape": (rows, *tile),
            "warp_shape": (rows, 64, 32),
            "mma_type": "mma",
            "use_stream_k": blocks > 1,
            "num_stages": stages[rows],
            "num_ctas_per_sm": blocks,
            "use_pdl": True,
        }
        for rows in ROWS
    ]
    theirs = HummingLayerMethod.get_default_tuning_configs(layer)
    many = [next(config for low, high, config in theirs if low < rows <= high) for rows in MANY_ROWS]
    return [[0, ROWS[0], few[0]], [*ROWS, few[1]], [ROWS[1], MANY_ROWS[0], many[0]], [MANY_ROWS[0], 1 << 30, many[1]]]

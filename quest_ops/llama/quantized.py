"""Linear layers with weights of 8 or 4 bits, rounded to nearest, or of 4 bits as a checkpoint has them. Inputs, outputs
and sums are those of bfloat16 layers.

On a GPU the products are humming's, where that is installed (see `humming_linear`). Else they are torch's own. Where
torch has none that is fast (many rows; 8 bits on a GPU), the weights are expanded to bfloat16 for the call, or within
the kernel that torch.compile makes of the call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .humming_linear import MOST_ZERO_POINT, HummingLinear, humming_takes
from .linear import multiply
from .packed_int4 import PACKED, Int4Packing

# Up to so many rows, products with low-bit weights beat those with expanded ones.
INT8_ROWS, INT4_ROWS = 4, 16


class Int8Linear(nn.Module):
    """Weights [N, K] in 8 bits, with one bfloat16 scale for each of the N outputs: each is within scale / 2.

    weight, bias: bfloat16, of any N and K. Raises ValueError for other dtypes and for weights that are not finite.
    """

    kind = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        rounded, scales = round_to_8_bits(weight)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("bias", bias)

    @property
    def in_features(self) -> int:
        return self.weight.size(1)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], bfloat16."""
        few = len(x) <= INT8_ROWS
        if few and x.device.type == "cpu":
            out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.weight, self.scales)
        elif few and torch.compiler.is_compiling():  # one kernel that reads the weights once, in 8 bits
            out = torch.stack([(self.weight * row.float()).sum(1) for row in x]) * self.scales
        else:
            out = multiply(x, self.weight.to(x.dtype)) * self.scales
        out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias


class Int4Linear(nn.Module):
    """Weights [N, K] in 4 bits: q * scale + zero with q of -8 to 7, and a bfloat16 scale and zero for each group.

    A group is `group_size` adjacent weights of an output: 128, or 64 or 32 where K is no multiple. Its 16 values span
    its weights, so each is within scale / 2 + 1/64 of the largest magnitude in the group (for the rounding of scale and
    zero). They are packed for the kernels of the device that `weight` is on, and stay there.

    weight, bias: bfloat16, N a multiple of 16 and K of 32. Raises ValueError for others and for weights that are not
    finite.
    """

    kind = "int4"

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        check_weight("int4", weight)
        outputs, inputs = weight.shape
        if outputs % 16 or inputs % 32:
            raise ValueError(f"int4 weights must be [N, K] of N % 16 = 0 and K % 32 = 0, got {list(weight.shape)}")
        group_size = next(size for size in (128, 64, 32) if inputs % size == 0)
        groups = weight.float().view(outputs, -1, group_size)
        low, high = groups.aminmax(dim=2, keepdim=True)
        scales = ((high - low) / 15).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype).float()
        zeros = (low + 8 * scales).to(weight.dtype).float()
        codes = ((groups - zeros) / scales).round_().clamp_(-8, 7).add_(8).view(outputs, inputs)
        self._hold(codes, scales[..., 0].to(weight.dtype), zeros[..., 0].to(weight.dtype), bias)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Int4Linear:
        """The layer of weights (code - 8) * scale + zero: codes [N, K] of 0 to 15; scales and zeros bfloat16
        [N, K / group_size], with a group_size of 128, 64 or 32. Raises ValueError for other shapes and dtypes and for
        scales that are not finite."""
        check_weight("int4", scales)
        outputs, inputs = codes.shape
        fitting = [(outputs, inputs / size) for size in (128, 64, 32)]
        if outputs % 16 or scales.shape != zeros.shape or tuple(scales.shape) not in fitting:
            raise ValueError(
                "int4 codes must be [N, K] of N % 16 = 0, scales and zeros [N, K / 128, 64 or 32], got "
                f"{list(codes.shape)}, {list(scales.shape)} and {list(zeros.shape)}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(codes, scales, zeros, bias)
        return layer

    def _hold(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> None:
        check_finite("int4", scales)
        self.in_features = codes.size(1)
        self.group_size = codes.size(1) // scales.size(1)
        self.register_buffer("packed", _pack(codes, self.group_size))
        scales_and_zeros = torch.stack([scales, zeros], 2).transpose(0, 1).contiguous()  # [K / group_size, N, 2]
        self.register_buffer("scales_and_zeros", scales_and_zeros)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], bfloat16."""
        arguments = x.contiguous(), self.packed, self.group_size, self.scales_and_zeros
        if x.device.type == "cpu":
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(*arguments)
        elif len(x) <= INT4_ROWS:
            out = torch.ops.aten._weight_int4pack_mm(*arguments)
        else:
            out = F.linear(x, self._expanded())
        return out if self.bias is None else out + self.bias

    def _expanded(self) -> Tensor:
        """The weights [N, K] that the CUDA kernel multiplies by, bit by bit, in bfloat16."""
        # The layout of m16n8k16 tensor core tiles (matrix_to_m16n8k16_Bint4_layout of torch's int4mm.cu): an int32
        # holds, of a lane's row, 2 tiles of 16 weights x 2 halves of 8 x 2 neighbours, its bytes in the order below.
        octets, tiles, _, words = self.packed.shape
        pairs = self.packed.view(torch.uint8)
        values = torch.stack([pairs & 15, pairs >> 4], -1).view(octets, tiles, 8, 4, words, 2, 2, 2)
        #         n / 8, k / (32 * words), n % 8, k % 8 / 2, k / 32, k % 2, k / 16 % 2, k / 8 % 2
        values = values.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * octets, -1, self.group_size).view(torch.int8) - 8
        scales, zeros = self.scales_and_zeros.transpose(0, 1).unsqueeze(-1).unbind(2)
        return torch.addcmul(zeros, values.to(scales.dtype), scales).flatten(1)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device, dtype = self.packed.device, self.scales_and_zeros.dtype
        if self.packed.is_cpu != (self.packed.dtype == torch.uint8) or dtype != torch.bfloat16:
            raise RuntimeError(f"int4 weights cannot become {dtype} on {device}: load the model there, in bfloat16")
        return self


QUANTIZED = {"int8": Int8Linear, "int4": Int4Linear}
WEIGHTS = ("bf16", *QUANTIZED)


def low_bit_linear(kind: str, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """The layer of weights in "int8" or "int4" that is the fastest on their device."""
    if not humming_takes(*weight.shape, weight.device):
        return QUANTIZED[kind](weight, bias)
    if kind == "int8":
        rounded, scales = round_to_8_bits(weight)
        return HummingLinear(rounded.add_(128), scales, None, bias)
    return HummingLinear(*round_to_4_bits_and_zero_points(weight), bias)


def linear_of_codes(codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Of the weights that `Int4Linear.from_codes` takes, the layer that is the fastest on their device."""
    if humming_takes(*codes.shape, codes.device):
        check_finite("int4", scales)
        zero_points = 8 - zeros.float() / scales.float()
        if bool((zero_points.abs() <= MOST_ZERO_POINT).all()):
            return HummingLinear(codes, scales, zero_points.to(scales.dtype), bias)
    return Int4Linear.from_codes(codes, scales, zeros, bias)


def round_to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, K] in units of a scale, -127 to 127, in float32, and the scales, bfloat16 [N, 1]: each weight is
    within scale / 2. Raises as Int8Linear."""
    check_weight("int8", weight)
    rows = weight.float()
    scales = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    check_finite("int8", scales)
    return (rows / scales.float()).round_().clamp_(-127, 127), scales


def round_to_4_bits_and_zero_points(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] of 0 to 15, in float32, scales and zero points, bfloat16 [N, K / 128], for HummingLinear: each
    weight is within scale / 2 + 1/64 of the largest magnitude in its group. Raises as Int4Linear."""
    check_weight("int4", weight)
    groups = weight.float().unflatten(1, (-1, 128))
    low, high = groups.aminmax(dim=2, keepdim=True)
    least = torch.maximum(low.abs(), high.abs()) / MOST_ZERO_POINT  # where a group's weights are nearly the same
    scales = torch.maximum((high - low) / 15, least).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    check_finite("int4", scales)
    zero_points = (-low / scales.float()).to(weight.dtype)
    codes = (groups / scales.float() + zero_points.float()).round_().clamp_(0, 15).flatten(1)
    return codes, scales[..., 0], zero_points[..., 0]


def take_packed(block: nn.Module, tensors: dict[str, Tensor], packing: Int4Packing) -> None:
    """Replaces the linear layers within a block by those of its packed tensors, and these tensors by theirs."""
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        packed = {kind: tensors.pop(f"{name}.{kind}") for kind in PACKED if f"{name}.{kind}" in tensors}
        layer = linear_of_codes(*packing.unpack(**packed), tensors.pop(f"{name}.bias", None))
        block.set_submodule(name, layer)
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in layer.state_dict().items()}


def round_linears(block: nn.Module, kind: str) -> None:
    """Replaces the linear layers within a block by low-bit ones; embedding, norm and lm_head have none within."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                bias = None if child.bias is None else child.bias.data
                setattr(parent, name, low_bit_linear(kind, child.weight.data, bias))


def check_weights(weights: str | None, dtype: torch.dtype, packing: Int4Packing | None = None) -> None:
    """weights and dtype of a model, the packing of its checkpoint."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if packing and weights not in (None, "int4"):
        raise ValueError(f"the checkpoint's weights are in 4 bits: weights must be None or 'int4', got {weights!r}")
    if (packing or weights) and dtype != torch.bfloat16:
        raise ValueError(f"weights {weights or 'int4'!r} go with dtype bfloat16, got {dtype}")


def check_weight(kind: str, weight: Tensor) -> None:
    if weight.dtype != torch.bfloat16:  # torch's products on a CPU are 10 times slower for float32 rows
        raise ValueError(f"{kind} weights need a model in bfloat16, got {weight.dtype}")


def check_finite(kind: str, scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{kind} weights must be finite numbers, got NaN or infinity")


def _pack(values: Tensor, group_size: int) -> Tensor:
    """values [N, K] of 0 to 15 in the layout of torch's kernels on their device."""
    if values.is_cpu:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
    pairs = values.to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs[:, ::2] << 4 | pairs[:, 1::2], group_size // 16)

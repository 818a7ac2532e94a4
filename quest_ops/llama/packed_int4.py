"""Int4Packing: how GPTQ, AWQ and GGUF checkpoints hold weights of 4 bits, and those as Int4Linear takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PACKED = ("qweight", "qzeros", "zeros", "scales")  # qzeros or zeros

# Where the codes of outputs 0 to 7 are in an int32 of AWQ, which from its lowest bits on holds 0, 2, 4, 6, 1, 3, 5, 7.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class Int4Packing:
    """Weights [N, K] of (code - zero) * scale: codes and zeros of 0 to 15, a zero and scale for `group_size` inputs.

    layout: what a projection has instead of its weight, besides scales [K / group_size, N]. An int32 holds 8 codes.
        "gptq_v2": qweight [K / 8, N], 8 adjacent inputs, and qzeros [K / group_size, N / 8], 8 adjacent outputs, the
            first in the lowest bits.
        "gptq": the same, but 0x11111111 was subtracted from the int32s of qzeros: 1 from each zero.
        "gemm" (AWQ): qweight [K, N / 8] and qzeros [K / group_size, N / 8], 8 adjacent outputs, the even ones first.
        "ggml" (Q4_0 and Q4_1 of a GGUF, as `from_ggml` reads them): qweight as gptq_v2, and instead of qzeros zeros
            [K / group_size, N], what a code of 8 stands for.
    desc_act: inputs may have been sorted, which a tensor g_idx [K] tells: the group of each.
    Sources: qlinear_cuda.py of AutoGPTQ and utils/model.py of GPTQModel (convert_gptq_v1_to_v2_format);
    modules/linear/gemm.py and utils/packing_utils.py of AutoAWQ.
    """

    layout: str
    group_size: int
    desc_act: bool = False

    @classmethod
    def from_hf(cls, settings: dict) -> Int4Packing:
        """Reads the quantization_config of a config.json; ValueError names what is not supported in it."""
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method not in ("gptq", "awq"):
            raise ValueError(
                f"quantization_config ({method!r}) is not supported; supported: 'gptq' and 'awq' in 4 bits, folders "
                "without quantization, and GGUF files"
            )
        keys, layouts = ("checkpoint_format", "format"), ("gptq", "gptq_v2")
        if method == "awq":
            keys, layouts = ("version", *keys), ("gemm",)
        key = next((key for key in keys if settings.get(key) is not None), keys[0])
        layout = str(settings.get(key) or layouts[0]).lower()
        supported = {
            "bits": (4,),
            "group_size": (128, 64, 32),
            "lm_head": (None, False),
            "dynamic": (None, {}),  # settings for single layers
            "pack_dtype": (None, "int32"),
            "is_marlin_format": (None, False),
        }
        odd = {name: settings.get(name) for name, values in supported.items() if settings.get(name) not in values}
        if layout not in layouts:
            odd[key] = settings[key]
        if settings.get("backend") == "llm-awq":  # another order than that of gemm
            odd["backend"] = "llm-awq"
        if any(str(name) not in ("lm_head", "embed_tokens") for name in settings.get("modules_to_not_convert") or ()):
            odd["modules_to_not_convert"] = settings["modules_to_not_convert"]
        if odd:
            received = ", ".join(f"{name} {value!r}" for name, value in odd.items())
            raise ValueError(
                f"quantization_config ({method!r}) has {received}; supported: bits 4, group_size 128, 64 or 32, {key} "
                f"{' or '.join(map(repr, layouts))} in int32, the layers' projections alike, lm_head not quantized"
            )
        return cls(layout, int(settings["group_size"]), method == "gptq" and bool(settings.get("desc_act")))

    def shapes(self, name: str, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        """{kind: shape} of the tensors of projection `name`, all of them with its outputs last."""
        if outputs % 16 or inputs % self.group_size:
            needed = f"[N, K] of N % 16 = 0 and K % {self.group_size} = 0 (its group_size)"
            raise ValueError(f"{name} in 4 bits must be {needed}, got [{outputs}, {inputs}]")
        groups = inputs // self.group_size
        qweight = (inputs, outputs // 8) if self.layout == "gemm" else (inputs // 8, outputs)
        zeros = {"zeros": (groups, outputs)} if self.layout == "ggml" else {"qzeros": (groups, outputs // 8)}
        return {"qweight": qweight} | zeros | {"scales": (groups, outputs)}

    def redundant(self, found: set[str], expected: dict[str, tuple], read: Callable[[str], Tensor]) -> set[str]:
        """Names of tensors to leave out: g_idx of unsorted inputs, and biases of zeros (AutoGPTQ's where there were
        none). Raises ValueError for a g_idx of sorted inputs."""
        names = set()
        for projection in [name.removesuffix(".qweight") for name in expected if name.endswith(".qweight")]:
            order, bias = f"{projection}.g_idx", f"{projection}.bias"
            groups = torch.arange(expected[f"{projection}.scales"][0]).repeat_interleave(self.group_size)
            wrong = "" if order in found or not self.desc_act else "is missing, with desc_act true"
            if order in found and not torch.equal(read(order).long(), groups):
                wrong = "sorts the inputs"
            if wrong:
                supported = f"input i of {len(groups)} in group i // {self.group_size}, as with desc_act false"
                raise ValueError(f"{order} {wrong}; supported: {supported}")
            names.add(order)
            if bias in found and bias not in expected and not read(bias).any():
                names.add(bias)
        return names

    def unpack(
        self, qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None, zeros: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """codes [N, K] uint8 of 0 to 15, scales and zeros [N, K / group_size]: what Int4Linear.from_codes takes.

        The codes are the checkpoint's, and (code - z) * scale is (code - 8) * scale + zero with zero = (8 - z) * scale.
        As scales and zeros are rounded to bfloat16, each weight is within scale / 32 + 1/256 of itself.
        """
        codes = _codes(qweight)
        codes = codes[..., _AWQ_PLACES].flatten(1).T if self.layout == "gemm" else codes.transpose(0, 1).flatten(1)
        if qzeros is not None:
            if (
                self.layout == "gptq"
            ):  # in whole words, as it was subtracted: borrows between zeros are undone by carries
                qzeros = qzeros + 0x11111111
            places = _codes(qzeros)
            places = places[..., _AWQ_PLACES] if self.layout == "gemm" else places
            zeros = (8 - places.flatten(1).to(scales.dtype)) * scales
        return codes.contiguous(), scales.T, zeros.T


def from_ggml(blocks: Tensor, inputs: int) -> dict[str, Tensor]:
    """The tensors of layout "ggml", qweight and float32, of a weight [N, inputs] in ggml's Q4_0 or Q4_1: uint8
    [N, inputs / 32 * 18 or 20].

    A block of 32 inputs is a scale d, in Q4_1 a minimum m, both float16, and 16 bytes: codes 0 to 15 in their low
    bits, 16 to 31 in their high ones. A weight is d * (code - 8), in Q4_1 d * code + m (ggml-quants.c of llama.cpp).
    """
    blocks = blocks.unflatten(1, (inputs // 32, -1))
    size = blocks.size(2)
    pairs = blocks[..., size - 16 :]
    codes = torch.cat([pairs & 15, pairs >> 4], -1).unflatten(2, (4, 8)).flatten(1, 2)  # [N, K / 8, 8]
    words = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous().view(torch.int32)[..., 0]
    numbers = blocks[..., : size - 16].contiguous().view(torch.float16).float()
    scales = numbers[..., 0]
    zeros = numbers[..., 1] + 8 * scales if size == 20 else torch.zeros_like(scales)
    return {"qweight": words.T.contiguous(), "zeros": zeros.T.contiguous(), "scales": scales.T.contiguous()}


def _codes(words: Tensor) -> Tensor:
    """The 8 codes of int32s [...], those of the lowest bits first: [..., 8] uint8."""
    pairs = words.unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)

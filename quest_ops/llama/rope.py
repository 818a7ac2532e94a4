"""Rotary position embeddings (Su et al. 2021), in the half-split channel layout of Hugging Face weights."""

import math

import torch
from torch import Tensor, nn

from .config import LlamaConfig


class RotaryEmbedding(nn.Module):
    """The rotations of a step's positions: computed once a step, where a table for 1M positions would take 500 MB."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        frequencies, self.attention_factor = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, fn, recurse=True):
        # They stay float32 when the model changes dtype: a bfloat16 angle is off by whole turns at position 10,000.
        super()._apply(fn, recurse)
        self.frequencies = rope_frequencies(self.config)[0].to(self.frequencies.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [N] int64 -> (cos, sin) float32 [N, 1, D] for `rotate`, the sign of the half split in `sin`."""
        angles = positions[:, None, None].float() * self.frequencies
        cos = angles.cos() * self.attention_factor
        sin = angles.sin() * self.attention_factor
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each (d, d + D/2) pair of heads [N, H, D] by its angle; float32 inside, the dtype of `heads` outside."""
    return torch.addcmul(heads * cos, heads.roll(heads.size(-1) // 2, -1), sin).to(heads.dtype)


def rope_frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """The angle per position of each channel pair, float32 [D / 2], and the factor on cos and sin (1.0 but for yarn).

    Plain: theta^(-2i/D). linear: positions divided by `factor` (Chen et al. 2023). llama3: slow channels divided by
    `factor`, fast ones kept, a linear blend between. yarn: Peng et al. 2023, section 3. freq_factors: divided by one
    number a channel pair, llama.cpp's way of storing these.
    """
    dim = config.head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    kind = scaling["rope_type"]
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "freq_factors":
        return plain / torch.tensor(scaling["factors"], dtype=torch.float32), 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, scaling, config)
    raise ValueError(
        f"rope_scaling type {kind!r} is not supported; supported: None, linear, llama3, yarn, freq_factors"
    )


def _llama3(plain: Tensor, scaling: dict) -> Tensor:
    # How often a channel pair turns over the length the model was first trained at.
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling["factor"]


def _yarn(plain: Tensor, scaling: dict, config: LlamaConfig) -> tuple[Tensor, float]:
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def channel(turns: float) -> float:  # the channel pair that turns this often over the trained length
        return config.head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    if first == last:
        last += 0.001
    interpolated = ((torch.arange(config.head_dim // 2) - first) / (last - first)).clamp(0, 1)
    factor = scaling["factor"]
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return interpolated * plain / factor + (1 - interpolated) * plain, attention_factor

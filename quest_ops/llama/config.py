"""LlamaConfig: what the reference decoder needs to know of a model, read from a Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import dataclass

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# rope type -> (required keys, optional keys), as in transformers' rope parameters.
ROPE_KEYS = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor"},
        {"attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "truncate"},
    ),
    "freq_factors": ({"factors"}, set()),
}


@dataclass(frozen=True)
class LlamaConfig:
    """A dense Llama, Mistral, Qwen2 or Qwen3 decoder.

    attention_bias: q, k and v projections have a bias (an output bias shows in the state dict alone).
    qk_norm: RMS norm over head_dim on each query and key head before RoPE (Qwen3).
    rope_scaling: None (plain RoPE) or a dict with "rope_type" and that type's keys, as in transformers: "linear",
        "llama3", "yarn"; or "freq_factors" from a GGUF file: "factors" is a tuple of head_dim / 2 floats that divide
        the inverse frequencies.
    sliding_window: tokens, kept only when it cannot matter (>= max_position_embeddings).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    sliding_window: int | None = None

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {self.model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not all(isinstance(token, int) for token in self.eos_token_ids):
            raise ValueError(f"eos_token_id must be one or more token ids (int), got {self.eos_token_ids!r}")
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise ValueError(
                f"sliding_window {self.sliding_window} is smaller than max_position_embeddings "
                f"{self.max_position_embeddings}: window attention is not supported, only full attention"
            )
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling, self.head_dim)

    @classmethod
    def from_hf(cls, config: dict) -> LlamaConfig:
        """Reads the dict of a Hugging Face config.json (transformers 4 and 5 spellings).

        Raises ValueError that names the key, what it holds and what is supported."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; supported: 'silu'")
        if config.get("mlp_bias"):
            raise ValueError("mlp_bias true is not supported: the MLP has no biases")

        required = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ]
        # Only the original Llama left the key heads out, meaning one a query head; Qwen3's head size is its own.
        if model_type != "llama":
            required.append("num_key_value_heads")
        if model_type == "qwen3":
            required.append("head_dim")
        missing = [key for key in required if config.get(key) is None]
        if missing:
            raise ValueError(f"the config of this {model_type} model lacks {', '.join(missing)}")

        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or head_dim_of(config["hidden_size"], heads)
        rope_theta, rope_scaling = _read_rope(config)
        eos = config.get("eos_token_id")
        return cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=model_type == "qwen2"
            or (model_type != "mistral" and bool(config.get("attention_bias", False))),
            qk_norm=model_type == "qwen3",
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
            bos_token_id=config.get("bos_token_id"),
            sliding_window=_read_window(config),
        )


def head_dim_of(hidden_size: int, num_attention_heads: int) -> int:
    """The head dimension of a model whose config leaves it out."""
    sizes = (hidden_size, num_attention_heads)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or hidden_size % num_attention_heads:
        raise ValueError(
            f"without a head_dim, hidden_size ({hidden_size!r}) must be a multiple of num_attention_heads "
            f"({num_attention_heads!r}), both positive integers"
        )
    return hidden_size // num_attention_heads


def _read_rope(config: dict) -> tuple[float, dict | None]:
    # transformers 5 keeps rope_theta and the scaling in one dict, transformers 4 in two keys.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters (or rope_scaling) must be an object, got {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", config.get("rope_theta") or 10000.0)
    rope_type = rope.pop("rope_type", None) or rope.get("type", "default")
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported: RoPE turns the whole head")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"rope parameters for each layer type ({', '.join(nested)}) are not supported")
    if rope_type == "default":
        return theta, None
    rope = {key: value for key, value in rope.items() if value is not None}
    if rope_type == "linear":
        # Newer transformers add this key to every type; linear scaling does not read it.
        rope.pop("original_max_position_embeddings", None)
    if rope_type == "yarn":
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return theta, {"rope_type": rope_type, **rope}


def _check_rope_scaling(rope_scaling: dict, head_dim: int) -> None:
    rope_type = rope_scaling.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        supported = ", ".join(["default", *ROPE_KEYS])
        raise ValueError(f"rope_scaling type {rope_type!r} is not supported; supported: {supported}")
    required, optional = ROPE_KEYS[rope_type]
    keys = set(rope_scaling) - {"rope_type"}
    if missing := required - keys:
        raise ValueError(f"rope_scaling of type {rope_type!r} lacks {', '.join(sorted(missing))}")
    if unknown := keys - required - optional:
        raise ValueError(
            f"rope_scaling of type {rope_type!r} has {', '.join(sorted(unknown))}, which is not supported; "
            f"supported: {', '.join(sorted(required | optional))}"
        )
    for key in keys - {"factors", "truncate"}:
        value = rope_scaling[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling {key} must be a positive number, got {value!r}")
    if rope_type == "llama3" and rope_scaling["low_freq_factor"] >= rope_scaling["high_freq_factor"]:
        raise ValueError(
            f"rope_scaling low_freq_factor {rope_scaling['low_freq_factor']} must be below high_freq_factor "
            f"{rope_scaling['high_freq_factor']}"
        )
    if rope_type == "freq_factors" and len(rope_scaling["factors"]) != head_dim // 2:
        raise ValueError(
            f"rope_scaling factors must be head_dim / 2 = {head_dim // 2} floats, got {len(rope_scaling['factors'])}"
        )


def _read_window(config: dict) -> int | None:
    window = config.get("sliding_window")
    if window is None or config["model_type"] == "llama":
        return None
    if config["model_type"] == "mistral":
        return window
    # Qwen writes a window even where no layer uses it: layers from max_window_layers on do, when it is switched on.
    layers = config["num_hidden_layers"]
    windowed = config.get("use_sliding_window", False) and config.get("max_window_layers", layers) < layers
    if config.get("layer_types"):
        windowed = any(kind != "full_attention" for kind in config["layer_types"])
    return window if windowed else None

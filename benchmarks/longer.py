"""A model at longer contexts than it was trained for, by other rotary frequencies; its weights stay as they are."""

from dataclasses import replace

from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.model import Llama
from quest_ops.llama.rope import RotaryEmbedding

METHODS = ("ntk", "yarn")


def longer_config(config: LlamaConfig, method: str, factor: float) -> LlamaConfig:
    """The config of a model for `factor` times as many positions.

    "ntk": the base of the frequencies times factor^(D / (D - 2)), so that the slowest channel pair turns `factor` times
    more slowly and the fastest one as it did (Peng et al. 2023, YaRN, section 3.1). "yarn": section 3.4 there.
    Raises ValueError for another method, a factor of 1 or less, and a model whose frequencies are scaled already.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not 1 < factor < float("inf"):
        raise ValueError(f"factor must be a number above 1, got {factor}")
    if config.rope_scaling is not None:
        raise ValueError(f"the model's rotary frequencies are scaled already: {config.rope_scaling}")
    trained = config.max_position_embeddings
    longer = replace(config, max_position_embeddings=int(factor * trained))
    if method == "ntk":
        return replace(longer, rope_theta=config.rope_theta * factor ** (config.head_dim / (config.head_dim - 2)))
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    return replace(longer, rope_scaling=scaling)


def lengthen(model: Llama, method: str, factor: float) -> None:
    """Gives a model the frequencies of `longer_config`."""
    model.config = longer_config(model.config, method, factor)
    model.rope = RotaryEmbedding(model.config).to(model.device)

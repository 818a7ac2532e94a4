"""Random models of the reference decoder, for the tests that need one and no checkpoint file."""

import pytest
import torch

from quest_ops.config import QuestConfig
from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.model import Llama
from quest_ops.llama.weights import Checkpoint, expected_shapes


def pages_of_16(**settings) -> QuestConfig:
    """Minimum and maximum of pages of 16 tokens in the cache's dtype, and the defaults of the other settings: where a
    test counts pages, or is about something else than the metadata."""
    return QuestConfig(**{"page_size": 16, "bound": "minmax", "metadata_dtype": None} | settings)


def small_config(**settings) -> LlamaConfig:
    """A decoder of two query heads a KV head with 512 positions, small enough to run in a blink."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(model_type="llama", head_dim=64, **sizes | settings)


def random_checkpoint(config: LlamaConfig, dtype: torch.dtype) -> Checkpoint:
    torch.manual_seed(0)
    weights = {
        name: (1 + 0.3 * torch.randn(shape) if "norm" in name else 0.15 * torch.randn(shape)).to(dtype)
        for name, shape in expected_shapes(config).items()
    }
    return Checkpoint(config, weights, tokenizer=None)


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: str, weights: str | None = None) -> Llama:
    return Llama.from_checkpoint(random_checkpoint(config, dtype), weights=weights, device=device)


def fetch_smollm2_or_skip():
    """The embedded model's file; skips the test where it cannot be fetched."""
    for package in ("gguf", "tokenizers", "jinja2"):
        pytest.importorskip(package)
    from quest_ops.llama.smollm2 import fetch_smollm2

    try:
        return fetch_smollm2()
    except RuntimeError as error:
        if "fetching SmolLM2 failed" not in str(error):  # offline is a reason to skip, another file is not
            raise
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")

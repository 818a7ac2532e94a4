"""Random models of the reference decoder, for the tests that need one and no checkpoint file."""

import torch

from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.model import Llama
from quest_ops.llama.weights import Checkpoint, expected_shapes


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: str) -> Llama:
    torch.manual_seed(0)
    weights = {
        name: 1 + 0.3 * torch.randn(shape) if "norm" in name else 0.15 * torch.randn(shape)
        for name, shape in expected_shapes(config).items()
    }
    return Llama.from_checkpoint(Checkpoint(config, weights, tokenizer=None)).to(device, dtype)

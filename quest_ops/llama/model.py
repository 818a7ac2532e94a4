"""A dense Llama, Mistral, Qwen2 or Qwen3 decoder over packed tokens. Attention and its cache are the caller's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LlamaConfig
from .rope import RotaryEmbedding, rotate
from .weights import Checkpoint, expected_shapes, load_checkpoint


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """One projection for query, key and value; the three reach the cache and the kernels as slices of it."""

    def __init__(self, config: LlamaConfig, layer: int, output_bias: bool):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=output_bias)
        # One row a query or key head, though heads of a kind share theirs: so one product norms them all.
        self.qk_norm = nn.Parameter(torch.empty(self.heads + self.kv_heads, self.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention) -> Tensor:
        qk, value = self.qkv(x).view(len(x), -1, self.head_dim).split([self.heads + self.kv_heads, self.kv_heads], 1)
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (self.head_dim,), None, self.eps) * self.qk_norm
        query, key = rotate(qk, cos, sin).split([self.heads, self.kv_heads], 1)
        return self.o(attention.run(self.layer, query, key, value).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, output_bias: bool):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, output_bias)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attention)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The decoder. Weights are uninitialised until `from_checkpoint` or `load` fills them; inference only.

    output_bias: the attention's output projection has a bias, which a config does not tell.
    """

    def __init__(self, config: LlamaConfig, *, output_bias: bool = False):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i, output_bias) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config)

    def forward(self, tokens: Tensor, positions: Tensor, attention, last: Tensor | None = None) -> Tensor:
        """Logits of packed tokens of any number of sequences.

        tokens, positions: [N] int64, each token and its place in its own sequence. attention: a QuestAttention planned
        for these tokens, or any object whose run(layer, query [N, Hq, D], key [N, Hkv, D], value [N, Hkv, D]) returns
        [N, Hq, D]. last: [X] int64, the rows whose logits are wanted; None: all.
        Returns float32 [X or N, vocab_size].
        """
        x = self.embedding(tokens)
        cos, sin = self.rope(positions)
        for block in self.blocks:
            x = block(x, cos, sin, attention)
        if last is not None:
            x = x[last]
        return self.lm_head(self.norm(x)).float()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Llama:
        """The model of a checkpoint (see `load_checkpoint`), with its weights' dtype and device.

        Empties `checkpoint.state_dict` as it goes: fusing copies, and a large model must not be in memory twice.
        Raises ValueError, before that, naming tensors that are missing, unknown or of another shape than the config's.
        """
        config, weights = checkpoint.config, checkpoint.state_dict
        output_bias = "model.layers.0.self_attn.o_proj.bias" in weights
        expected = expected_shapes(config, output_bias)
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if wrong := dict(sorted(found.items() ^ expected.items())):
            listed = ", ".join(f"{name}: {found.get(name)}, expected {expected.get(name)}" for name in list(wrong)[:4])
            raise ValueError(f"the state dict does not fit the config in {len(wrong)} tensors: {listed}")
        with torch.device("meta"):
            model = cls(config, output_bias=output_bias)
        model.load_state_dict(_fuse(config, weights), assign=True)
        model.rope = RotaryEmbedding(config).to(model.device)
        return model.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        progress: Callable | None = None,
    ):
        """(model, tokenizer) of "smollm2", a Hugging Face folder or hub id, or a .gguf file; see `load_checkpoint`.

        dtype None: `default_dtype(device)`.
        """
        checkpoint = load_checkpoint(source, dtype=dtype or default_dtype(device), device=device, progress=progress)
        return cls.from_checkpoint(checkpoint), checkpoint.tokenizer


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 on a GPU and on a CPU with AVX-512 bfloat16 instructions, else float32."""
    # Milliseconds in the linear layers of SmolLM2-135M for 512 tokens and for one (torch 2.13, 2 cores of an AMD EPYC
    # with avx512_bf16): bfloat16 111 and 10, float32 507 and 28, float16 1978 and 6.
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _fuse(config: LlamaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `Llama` from one with Hugging Face names, which is emptied on the way."""
    fused = {
        "embedding.weight": weights.pop("model.embed_tokens.weight"),
        "norm.weight": weights.pop("model.norm.weight"),
    }
    fused["lm_head.weight"] = fused["embedding.weight"] if config.tie_word_embeddings else weights.pop("lm_head.weight")
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        fused[ours + "attention_norm.weight"] = weights.pop(theirs + "input_layernorm.weight")
        fused[ours + "mlp_norm.weight"] = weights.pop(theirs + "post_attention_layernorm.weight")
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{theirs}self_attn.{n}_proj.{kind}", None) for n in "qkv"]
            if parts[0] is not None:
                fused[f"{ours}attention.qkv.{kind}"] = torch.cat(parts)
            output = weights.pop(f"{theirs}self_attn.o_proj.{kind}", None)
            if output is not None:
                fused[f"{ours}attention.o.{kind}"] = output
        if config.qk_norm:
            norms = [weights.pop(f"{theirs}self_attn.{n}_norm.weight") for n in "qk"]
            fused[ours + "attention.qk_norm"] = torch.cat([w.expand(count, -1) for w, count in zip(norms, heads)])
        gate_up = [weights.pop(f"{theirs}mlp.{n}_proj.weight") for n in ("gate", "up")]
        fused[ours + "mlp.gate_up.weight"] = torch.cat(gate_up)
        fused[ours + "mlp.down.weight"] = weights.pop(theirs + "mlp.down_proj.weight")
    return fused

"""Reads GGUF files of Llama, Mistral, Qwen2 and Qwen3 into Hugging Face's names, shapes and RoPE layout."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .config import LlamaConfig, head_dim_of
from .packed_int4 import Int4Packing, from_ggml
from .tokenizer import LLAMA_EXTRA

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """An opened GGUF file: config (LlamaConfig), reader (gguf.GGUFReader), shapes {Hugging Face name: shape}.

    Raises FileNotFoundError, or ValueError that names the file, what was found and what is supported."""

    def __init__(self, path: Path):
        self.path = path
        self.reader = _open(path)
        self._tensors = {}
        self._packed = "", {}  # the last projection that was asked for in 4 bits, its tensors
        for tensor in self.reader.tensors:
            if tensor.name != _ROPE_FACTORS:
                self._tensors[_hugging_face_name(tensor.name)] = tensor
        try:
            self.config = self._read_config()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        # ggml counts the contiguous dimension first.
        self.shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in self._tensors.items()}

    @property
    def packing(self) -> Int4Packing | None:
        """How the layers' projections are held, where that is in 4 bits for all of them (Q4_0, Q4_1)."""
        types = {tensor.tensor_type.name for name, tensor in self._tensors.items() if name.endswith("_proj.weight")}
        return Int4Packing("ggml", 32) if types and types <= {"Q4_0", "Q4_1"} else None

    def tensor(self, name: str) -> torch.Tensor:
        """The float32 tensor of a Hugging Face name, dequantized, with q and k rows in Hugging Face's order; of a name
        of `packing` the tensor that it has in place of a weight."""
        import gguf

        if name not in self._tensors:
            projection, kind = name.rsplit(".", 1)
            if self._packed[0] != projection:
                source = self._tensors[f"{projection}.weight"]
                rows = self._in_order(projection, torch.from_numpy(source.data.copy()))
                self._packed = projection, from_ggml(rows, int(source.shape[0]))
            return self._packed[1][kind]
        source = self._tensors[name]
        try:
            data = gguf.quants.dequantize(source.data, source.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {source.name} has type {source.tensor_type.name}, which the gguf package cannot "
                "dequantize"
            ) from error
        # Whatever is still a view of the memory-mapped file is read-only: torch wants a copy.
        return self._in_order(name, torch.from_numpy(data if data.flags.writeable else data.copy()))

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._architecture == "llama":
            if ".self_attn.q_proj" in name:
                return _unpermute(tensor, self.config.num_attention_heads)
            if ".self_attn.k_proj" in name:
                return _unpermute(tensor, self.config.num_key_value_heads)
        return tensor

    def _value(self, key: str, default=None):
        field = self.reader.get_field(key.replace("{arch}", self._architecture))
        return default if field is None else field.contents()

    def _need(self, key: str):
        value = self._value(key)
        if value is None:
            raise ValueError(f"the metadata lacks {key.replace('{arch}', self._architecture)}")
        if type(value) is list:
            raise ValueError(f"{key.replace('{arch}', self._architecture)} differs by layer, which is not supported")
        return value

    def _read_config(self) -> LlamaConfig:
        architecture = self.reader.get_field("general.architecture")
        self._architecture = architecture.contents() if architecture else None
        if self._architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self._architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        if (parts := self._value("split.count", 1)) > 1:
            raise ValueError(f"the model is split over {parts} files: join them with llama-gguf-split --merge")
        if experts := self._value("{arch}.expert_count", 0):
            raise ValueError(f"a mixture of {experts} experts is not supported, only dense models")
        heads = self._need("{arch}.attention.head_count")
        hidden = self._need("{arch}.embedding_length")
        head_dim = self._value("{arch}.attention.key_length") or head_dim_of(hidden, heads)
        for key in ("{arch}.attention.value_length", "{arch}.rope.dimension_count"):
            if (size := self._value(key, head_dim)) != head_dim:
                raise ValueError(f"{key.replace('{arch}', self._architecture)} {size} differs from head_dim {head_dim}")
        if "model.embed_tokens.weight" not in self._tensors:
            raise ValueError("tensor token_embd.weight is missing")
        context = self._need("{arch}.context_length")
        eos = [self._value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return LlamaConfig(
            model_type=self._architecture,
            # The embedding may be padded beyond the vocabulary that the metadata counts.
            vocab_size=int(self._tensors["model.embed_tokens.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=self._need("{arch}.feed_forward_length"),
            num_hidden_layers=self._need("{arch}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._value("{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            # Both are stored in float32: the shortest decimal that reads back the same is what was meant.
            rms_norm_eps=_shortest(self._need("{arch}.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(self._value("{arch}.rope.freq_base", 10000.0)),
            rope_scaling=self._read_rope_scaling(context),
            tie_word_embeddings="lm_head.weight" not in self._tensors,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in self._tensors,
            qk_norm=self._architecture == "qwen3",
            eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
            bos_token_id=self._value("tokenizer.ggml.bos_token_id"),
            sliding_window=self._value("{arch}.attention.sliding_window"),
        )

    def _read_rope_scaling(self, context: int) -> dict | None:
        for tensor in self.reader.tensors:
            # llama.cpp's form of Llama 3's scaling: each inverse frequency is divided by its factor.
            if tensor.name == _ROPE_FACTORS:
                return {"rope_type": "freq_factors", "factors": tuple(tensor.data.reshape(-1).tolist())}
        kind = self._value("{arch}.rope.scaling.type")
        # Files older than rope.scaling.* give a linear factor alone.
        factor = self._value("{arch}.rope.scaling.factor", self._value("{arch}.rope.scale_linear"))
        if kind is None and factor is not None:
            kind = "linear"
        if kind in (None, "none"):
            return None
        if kind not in ("linear", "yarn"):
            raise ValueError(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
        if factor is None:
            raise ValueError(f"rope.scaling.type {kind!r} comes without rope.scaling.factor")
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if (attention := self._value("{arch}.rope.scaling.attn_factor", 1.0)) != 1.0:
            raise ValueError(f"rope.scaling.attn_factor {attention} is not supported; supported: 1.0")
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._value("{arch}.rope.scaling.original_context_length", context),
        }
        for name in ("beta_fast", "beta_slow"):
            if (beta := self._value(f"{{arch}}.rope.scaling.yarn_{name}")) is not None:
                scaling[name] = beta
        return scaling


def _open(path: Path):
    with open(path, "rb") as file:
        head = file.read(4)
    if head != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {head!r}, not b'GGUF'")
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise ImportError(f"{error.name} is needed to read {path}: {LLAMA_EXTRA}") from error

    class Reader(gguf.GGUFReader):
        """Keeps the mapped file as a plain array: each of its slices is several times cheaper than one of np.memmap,
        and a vocabulary takes half a million."""

        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, mapped):
            self._data = mapped.view(np.ndarray)

    try:
        reader = Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # The reader does not check lengths: a cut or damaged file shows as whatever breaks first.
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged, or of a GGUF version that is not supported "
            f"(2 and 3 are): {type(error).__name__}: {error}"
        ) from error
    if reader.byte_order != "I":
        raise ValueError(f"{path} is written in the other byte order, which is not supported")
    return reader


def _hugging_face_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return name  # reported as unexpected, under its own name


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from llama.cpp's order to Hugging Face's.

    For architecture llama, llama.cpp's RoPE turns neighbours (2i, 2i + 1) and its converter interleaves each head's
    rows so; Hugging Face turns (i, i + head_dim / 2). tensor [heads * head_dim, ...]."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _shortest(value: float) -> float:
    import numpy

    return float(str(numpy.float32(value)))

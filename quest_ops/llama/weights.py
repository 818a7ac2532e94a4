"""load_checkpoint: a model's config, weights and tokenizer from a GGUF file, a Hugging Face folder or hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .config import LlamaConfig
from .gguf_reader import GGUFFile
from .packed_int4 import Int4Packing
from .smollm2 import fetch_smollm2
from .tokenizer import LLAMA_EXTRA, Tokenizer, read_json

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
]
_INT32 = (".qweight", ".qzeros")
# Buffers that early Llama checkpoints carry along: the model computes them.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Checkpoint:
    """config; state_dict {Hugging Face name: tensor}; tokenizer.

    With tie_word_embeddings the state dict has no lm_head.weight. model.layers.N.self_attn.o_proj.bias is there for
    every layer or for none. packing: the layers' projections are in 4 bits, and have the tensors that it names instead
    of a weight."""

    config: LlamaConfig
    state_dict: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    packing: Int4Packing | None = None


def load_checkpoint(source, *, dtype=None, device="cpu", progress=None, keep_int4=False) -> Checkpoint:
    """Loads a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    source: "smollm2" (fetched into the cache folder), a GGUF file, a folder with config.json, model.safetensors (or
        its shards and index) and tokenizer.json, or a Hugging Face hub id ("owner/name"). What exists on disk wins
        over a hub id. A folder's projections may be in 4 bits, by GPTQ or AWQ (see `packed_int4`).
    dtype: float32, float16 or bfloat16 for every tensor; None: the embedding's stored dtype, float32 for a GGUF. With
        projections in 4 bits: bfloat16 or None, for all but their codes and zeros, which stay int32.
    progress(done_bytes, total_bytes): first for a fetch of smollm2, then from 0 again while tensors are read.
    keep_int4: a GGUF whose projections are all in Q4_0 or Q4_1 keeps their codes; else they are expanded to dtype.

    Every expected tensor is checked to be there, with its shape, before any is read. Raises FileNotFoundError,
    ValueError or RuntimeError (hub or package index not reached) that names the file and what is wrong."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not supported; supported: None, {', '.join(map(str, DTYPES))}")
    path = find_checkpoint(source, progress)
    if path.is_file():
        return _load_gguf(path, dtype or torch.float32, device, progress, keep_int4)
    return _load_folder(path, dtype, device, progress)


def find_checkpoint(source, progress=None) -> Path:
    """The GGUF file or the folder of a source of `load_checkpoint`, fetched where it is not on disk."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a str or a path, got {type(source).__name__}")
    path = fetch_smollm2(progress) if source == "smollm2" else Path(source).expanduser()
    if not path.is_file() and not path.is_dir():
        if not isinstance(source, str) or not _HUB_ID.fullmatch(source) or source.endswith(".gguf"):
            raise FileNotFoundError(
                f"there is no model at {str(source)!r}; supported: 'smollm2', a GGUF file, a Hugging Face folder, or a "
                "hub id 'owner/name'"
            )
        return _download(source)
    return path


def packing_of(path: Path) -> Int4Packing | None:
    """How the checkpoint at a path of `find_checkpoint` holds projections in 4 bits; None: it does not."""
    return _read_config(path)[1] if path.is_dir() else None


def expected_shapes(
    config: LlamaConfig, output_bias: bool = False, packing: Int4Packing | None = None
) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of every tensor of the model. output_bias: o_proj has a bias. packing: of the layers'
    projections; raises ValueError where it does not fit their sizes."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        layer |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
        layer |= {"self_attn.v_proj.bias": (keys,)}
    if output_bias:
        layer |= {"self_attn.o_proj.bias": (hidden,)}
    if packing:
        for name in [name.removesuffix(".weight") for name in layer if name.endswith("_proj.weight")]:
            packed = packing.shapes(name, *layer.pop(f"{name}.weight"))
            layer |= {f"{name}.{kind}": shape for kind, shape in packed.items()}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _check_shapes(where: Path, expected: dict, found: dict) -> None:
    problems = []

    def listed(title: str, entries: Iterable[str]):
        if entries := sorted(entries):
            more = f" and {len(entries) - 6} more" if len(entries) > 6 else ""
            problems.append(f"{title}: {', '.join(entries[:6])}{more}")

    listed("missing tensors", expected.keys() - found.keys())
    listed("unexpected tensors", found.keys() - expected.keys())
    wrong = [name for name in expected.keys() & found.keys() if tuple(found[name]) != expected[name]]
    listed("wrong shapes", (f"{name} is {list(found[name])}, expected {list(expected[name])}" for name in wrong))
    if problems:
        raise ValueError(f"{where} does not hold the model that its config describes: {'; '.join(problems)}")


def _read_all(shapes: dict, read: Callable[[str], torch.Tensor], dtype, device, progress) -> dict[str, torch.Tensor]:
    dtypes = {name: torch.int32 if name.endswith(_INT32) else dtype for name in shapes}
    total = sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items())
    state_dict, done = {}, 0
    for name in shapes:
        state_dict[name] = read(name).to(device=device, dtype=dtypes[name])
        done += state_dict[name].nbytes
        if progress:
            progress(done, total)
    return state_dict


def _load_gguf(path: Path, dtype, device, progress, keep_int4: bool) -> Checkpoint:
    file = GGUFFile(path)
    packing = file.packing if keep_int4 else None
    output_bias = "model.layers.0.self_attn.o_proj.bias" in file.shapes
    _check_shapes(path, expected_shapes(file.config, output_bias), file.shapes)
    try:
        expected = expected_shapes(file.config, output_bias, packing)
        tokenizer = Tokenizer.from_gguf(file.reader)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(file.config, _read_all(expected, file.tensor, dtype, device, progress), tokenizer, packing)


def _load_folder(folder: Path, dtype, device, progress) -> Checkpoint:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"safetensors is needed to read {folder}: {LLAMA_EXTRA}") from error
    config, packing = _read_config(folder)
    if packing and dtype not in (None, torch.bfloat16):
        raise ValueError(f"{folder} has weights in 4 bits, which go with dtype bfloat16, got {dtype}")
    tokenizer = Tokenizer.from_folder(folder)
    # generation_config.json may name more end tokens, as it does for chat models.
    config = replace(config, eos_token_ids=tokenizer.eos_token_ids)

    with ExitStack() as stack:
        holder = {}  # name -> the opened file that holds it
        for file in _safetensors_files(folder):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                size = file.stat().st_size
                raise ValueError(f"{file} ({size} bytes) is truncated or no safetensors file: {error}") from error
            holder.update(dict.fromkeys(opened.keys(), opened))
        found = {name: holder[name].get_slice(name).get_shape() for name in holder if not _IGNORED.fullmatch(name)}
        if config.tie_word_embeddings:
            found.pop("lm_head.weight", None)  # a copy of the embedding
        # In transformers attention_bias covers the output projection, but Qwen2's own biases do not.
        output_bias = config.attention_bias and config.model_type != "qwen2"

        def read(name: str) -> torch.Tensor:
            return holder[name].get_tensor(name)

        try:
            expected = expected_shapes(config, output_bias, packing)
            redundant = packing.redundant(found.keys(), expected, read) if packing else ()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        _check_shapes(folder, expected, {name: found[name] for name in found.keys() - redundant})
        stored = {name: holder[name].get_slice(name).get_dtype() for name in expected}
        for name in expected:
            supported = ("I32",) if name.endswith(_INT32) else ("F32", "F16", "BF16")
            if stored[name] not in supported:
                raise ValueError(f"{folder}: {name} is stored as {stored[name]}; supported: {', '.join(supported)}")
        if dtype is None:
            names = dict(zip(("F32", "F16", "BF16"), DTYPES))
            dtype = torch.bfloat16 if packing else names[stored["model.embed_tokens.weight"]]
        state_dict = _read_all(expected, read, dtype, device, progress)
    return Checkpoint(config, state_dict, tokenizer, packing)


def _read_config(folder: Path) -> tuple[LlamaConfig, Int4Packing | None]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    raw_config = read_json(file)
    try:
        settings = raw_config.get("quantization_config")
        return LlamaConfig.from_hf(raw_config), None if settings is None else Int4Packing.from_hf(settings)
    except (AttributeError, TypeError, ValueError) as error:  # the first two: a value of another type than it should be
        raise ValueError(f"{file}: {error}") from error


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        held = sorted(file.name for file in folder.iterdir())[:12]
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json (it has {', '.join(held)}); "
            "weights in other formats are not supported"
        )
    weight_map = read_json(index).get("weight_map")
    if type(weight_map) is not dict or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    return files


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"huggingface_hub is needed to fetch {hub_id!r}: {LLAMA_EXTRA}") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, refused, unknown: every kind has its own class, none in common
        raise RuntimeError(
            f"there is no local folder {hub_id!r}, and fetching it from the Hugging Face hub failed: "
            f"{type(error).__name__}: {error}. Check the name, the network and (for gated models) HF_TOKEN, or fetch "
            "the folder elsewhere and give its path"
        ) from error

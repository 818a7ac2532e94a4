"""Checkpoints in 4 bits by GPTQ, AWQ and ggml: their codes are taken over, and what cannot be is named first."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import test_llama_weights
import torch
from test_llama_weights import GGUF_LAYER_NAMES, TYPES, make_model, save_tokenizer, write_gguf
from test_quantized import exact_rows, linears, logits_of, relative

from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.model import PROJECTIONS, Llama
from quest_ops.llama.packed_int4 import Int4Packing, from_ggml
from quest_ops.llama.quantized import Int4Linear
from quest_ops.llama.weights import Checkpoint, expected_shapes, load_checkpoint

safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("without_humming")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "lm_head": False}
SETTINGS = {
    "gptq": GPTQ,
    "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2", "sym": True, "pack_dtype": "int32"},
    "gemm": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True, "modules_to_not_convert": None},
}


def words(codes: np.ndarray) -> torch.Tensor:
    """[..., 8] of 0 to 15 as int32, the first in the lowest 4 bits."""
    packed = sum(codes[..., i].astype(np.uint64) << np.uint64(4 * i) for i in range(8))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32)).contiguous()


def pack(layout: str, codes: np.ndarray, zeros: np.ndarray) -> dict[str, torch.Tensor]:
    """qweight and qzeros of codes [N, K] and zeros [N, K / group_size], from the definitions of the formats."""
    (outputs, inputs), groups = codes.shape, zeros.shape[1]
    zeros = zeros.T.reshape(groups, outputs // 8, 8)
    if layout == "gemm":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {
            "qweight": words(codes.T.reshape(inputs, outputs // 8, 8)[..., order]),
            "qzeros": words(zeros[..., order]),
        }
    qweight = words(codes.reshape(outputs, inputs // 8, 8)).T.contiguous()
    return {"qweight": qweight, "qzeros": words(zeros - 1 if layout == "gptq" else zeros)}


def random_projection(layout, outputs, inputs, group_size, zeros_of=(1, 16), seed=0):
    """The tensors of a packed projection, its codes, and its weight in float64."""
    numbers = np.random.default_rng(seed)
    codes = numbers.integers(0, 16, (outputs, inputs))
    zeros = numbers.integers(*zeros_of, (outputs, inputs // group_size))
    scales = (0.02 * numbers.uniform(0.5, 2, zeros.shape)).astype(np.float16)
    weight = (codes - zeros.repeat(group_size, 1)) * scales.astype(np.float64).repeat(group_size, 1)
    tensors = pack(layout, codes, zeros) | {"scales": torch.from_numpy(scales).T.contiguous()}
    return tensors, torch.from_numpy(codes), torch.from_numpy(weight)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", SETTINGS)
def test_codes_are_taken_over_and_weights_are_within_a_32nd_of_a_scale_and_a_256th(device, layout, group_size):
    packing = Int4Packing.from_hf(SETTINGS[layout] | {"group_size": group_size})
    assert packing == Int4Packing(layout, group_size)
    tensors, codes, weight = random_projection(layout, 48, 384, group_size, (1 if layout == "gptq" else 0, 16))
    assert {kind: tuple(t.shape) for kind, t in tensors.items()} == packing.shapes("mlp.up_proj", 48, 384)
    tensors["scales"] = tensors["scales"].bfloat16()
    found, scales, zeros = packing.unpack(**{kind: tensor.to(device) for kind, tensor in tensors.items()})
    assert torch.equal(found.cpu().long(), codes)
    layer = Int4Linear.from_codes(found, scales, zeros)
    assert layer.group_size == group_size and layer.in_features == 384
    for used, rounding in (
        ((found.double() - 8) * scales.repeat_interleave(group_size, 1) + zeros.repeat_interleave(group_size, 1), 0),
        (exact_rows(layer, 384, device, 16), 2**-8),  # as the kernel has them, rounded once more
    ):
        allowed = scales.double().cpu().repeat_interleave(group_size, 1) / 32 + weight.abs() * (2**-8 + rounding)
        assert ((used.double().cpu() - weight).abs() <= allowed).all()


def test_zeros_of_gptq_are_less_1_in_whole_words():
    zeros = np.array([[0, 1, 15, 0, 8, 0, 0, 15] * 2]).T
    stored = pack("gptq_v2", np.zeros((16, 32), int), zeros)
    stored["qzeros"] = (stored["qzeros"].long() - 0x11111111).int()  # GPTQModel's convert_gptq_v2_to_v1_format
    unpacked = Int4Packing("gptq", 32).unpack(**stored, scales=torch.ones(1, 16))[2]
    assert unpacked.T.tolist() == [[8 - zero for zero in zeros[:, 0]]]


def packed_model(layout, group_size=32, model_type="llama", **sizes):
    """A config, the tensors of a packed checkpoint in float16, those of the model in float32, and the codes."""
    hf = dict(SIZES, model_type=model_type, rms_norm_eps=1e-5, hidden_act="silu", eos_token_id=2) | sizes
    hf["quantization_config"] = SETTINGS[layout] | {"group_size": group_size}
    torch.manual_seed(0)
    tensors, dense, codes = {}, {}, {}
    for seed, (name, shape) in enumerate(expected_shapes(LlamaConfig.from_hf(hf)).items()):
        if name.endswith("_proj.weight"):
            projection = name.removesuffix(".weight")
            packed, codes[projection], dense[name] = random_projection(layout, *shape, group_size, (6, 11), seed)
            tensors |= {f"{projection}.{kind}": tensor for kind, tensor in packed.items()}
        else:
            tensors[name] = ((1 if "norm" in name else 0) + 0.3 * torch.randn(shape)).half()
            dense[name] = tensors[name]
    return hf, tensors, {name: tensor.float() for name, tensor in dense.items()}, codes


def save(folder, hf, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    safetensors_torch.save_file(tensors, folder / "model.safetensors")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize(
    ("layout", "group_size", "model_type"),
    [
        ("gptq", 128, "llama"),
        ("gptq", 32, "qwen2"),
        ("gptq_v2", 64, "qwen3"),
        ("gemm", 128, "qwen2"),
        ("gemm", 32, "llama"),
    ],
)
def test_logits_are_those_of_the_checkpoint(device, tmp_path, layout, group_size, model_type, weights):
    hf, tensors, dense, codes = packed_model(layout, group_size, model_type)
    if layout != "gemm":  # what AutoGPTQ saves besides
        for name in codes:
            tensors[f"{name}.g_idx"] = (torch.arange(codes[name].shape[1]) // group_size).int()
            tensors.setdefault(f"{name}.bias", torch.zeros(len(codes[name]), dtype=torch.float16))
    seen = []
    folder = save(tmp_path / "model", hf, tensors)
    model, _ = Llama.load(folder, weights=weights, device=device, progress=lambda *bytes: seen.append(bytes))
    assert seen[-1][0] == seen[-1][1] and model.weights == "int4" and model.dtype == torch.bfloat16
    for layer, block in enumerate(model.blocks):
        for ours, names in PROJECTIONS.items():
            linear = block.get_submodule(ours)
            linear.bias, bias = None, linear.bias
            scales, zeros = linear.scales_and_zeros.repeat_interleave(group_size, 0).permute(2, 1, 0).float()
            values = (exact_rows(linear, linear.in_features, device, 16).float() - zeros) / scales + 8
            expected = torch.cat([codes[f"model.layers.{layer}.{name}"] for name in names])
            assert torch.equal(values.round().cpu().long(), expected)
            assert (bias is not None) == (model_type == "qwen2" and ours == "attention.qkv")
            linear.bias = bias
    reference = Llama.from_checkpoint(Checkpoint(model.config, dense, None), device=device)
    assert len(linears(model)) == 8
    assert relative(logits_of(model), logits_of(reference)) < 0.03


def test_shards_and_tied_embeddings(tmp_path):
    hf, tensors, dense, _ = packed_model("gemm", tie_word_embeddings=True)
    folder = save(tmp_path, hf, tensors)
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in shards.items():
        safetensors_torch.save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    checkpoint = load_checkpoint(folder)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.state_dict[name], tensor if tensor.dtype == torch.int32 else tensor.bfloat16())
    model = Llama.from_checkpoint(checkpoint)
    assert not checkpoint.state_dict and model.lm_head.weight is model.embedding.weight
    assert relative(logits_of(model), logits_of(Llama.from_checkpoint(Checkpoint(model.config, dense, None)))) < 0.03


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, r"'bitsandbytes'\) is not supported; supported: 'gptq' and 'awq'"),
        ("gptq", {"quant_method": "fp8"}, r"\('fp8'\) is not supported"),
        ("gptq", {"quant_method": "compressed-tensors"}, r"\('compressed-tensors'\) is not supported"),
        ("gptq", {"bits": 8}, r"\('gptq'\) has bits 8; supported: bits 4, group_size 128, 64 or 32"),
        ("gptq", {"bits": 3, "group_size": -1}, "has bits 3, group_size -1; supported: bits 4"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; supported: .* 'gptq' or 'gptq_v2'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format True"),
        ("gptq", {"lm_head": True}, "lm_head True; .* lm_head not quantized"),
        ("gptq", {"dynamic": {"+:.*down": {"bits": 8}}}, "has dynamic .*; .* the layers' projections alike"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ("gemm", {"bits": 8}, r"\('awq'\) has bits 8"),
        ("gemm", {"version": "gemv"}, "version 'gemv'; .* version 'gemm'"),
        ("gemm", {"backend": "llm-awq"}, "backend 'llm-awq'"),
        ("gemm", {"modules_to_not_convert": ["lm_head", "o_proj"]}, r"modules_to_not_convert \['lm_head', 'o_proj'\]"),
    ],
)
def test_unsupported_settings_are_named(tmp_path, layout, change, message):
    hf, tensors, _, _ = packed_model(layout)
    hf["quantization_config"] |= change
    save(tmp_path, hf, tensors)
    for load in (load_checkpoint, Llama.load):
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            load(tmp_path, progress=lambda *_: pytest.fail("read a tensor"))


def test_unsupported_tensors_are_named_before_any_is_read(tmp_path):
    hf, tensors, _, _ = packed_model("gptq")
    up = "model.layers.1.mlp.up_proj"
    order = torch.arange(128, dtype=torch.int32) // 32
    tensors[f"{up}.g_idx"] = order

    def refused(message, changes, **settings):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save(tmp_path, hf | {"quantization_config": hf["quantization_config"] | settings}, changed)
        with pytest.raises(ValueError, match=message):
            Llama.load(tmp_path, progress=lambda *_: pytest.fail("read a tensor"))

    refused(f"{up}.g_idx sorts the inputs; supported: input i of 128 in group i // 32", {f"{up}.g_idx": order.flip(0)})
    refused(r"g_idx is missing, with desc_act true", {}, desc_act=True)
    refused(f"unexpected tensors: {up}.bias", {f"{up}.bias": torch.ones(384)})
    refused("unexpected tensors: lm_head.qweight", {"lm_head.qweight": torch.ones(16, 96, dtype=torch.int32)})
    refused(
        rf"missing tensors: {up}.qweight; unexpected tensors: {up}.weight",
        {f"{up}.qweight": None, f"{up}.weight": torch.ones(384, 128)},
    )
    refused(r"mlp.up_proj.qzeros is \[4, 48\], expected \[2, 48\]", {f"{up}.g_idx": None}, group_size=64)
    refused(f"{up}.qweight is stored as I64; supported: I32", {f"{up}.qweight": tensors[f"{up}.qweight"].long()})
    hf["num_key_value_heads"], hf["head_dim"], hf["num_attention_heads"] = 1, 8, 16
    refused(r"self_attn.k_proj in 4 bits must be \[N, K\] of N % 16 = 0 .* got \[8, 128\]", {})
    hf["intermediate_size"], hf["head_dim"] = 400, 32
    refused(r"mlp.down_proj in 4 bits must be .* K % 32 = 0 \(its group_size\), got \[128, 400\]", {})


def test_sorting_that_changes_nothing_is_read(tmp_path):
    hf, tensors, _, codes = packed_model("gptq")
    tensors |= {f"{name}.g_idx": (torch.arange(code.shape[1]) // 32).int() for name, code in codes.items()}
    hf["quantization_config"]["desc_act"] = True
    assert Llama.load(save(tmp_path, hf, tensors))[0].weights == "int4"


def test_other_weights_and_dtypes_are_refused(tmp_path):
    hf, tensors, _, _ = packed_model("gemm")
    save(tmp_path, hf, tensors)
    for settings, message in (
        ({"weights": "int8"}, "weights are in 4 bits: weights must be None or 'int4', got 'int8'"),
        ({"weights": "bf16"}, "weights must be None or 'int4', got 'bf16'"),
        ({"dtype": torch.float16}, "weights 'int4' go with dtype bfloat16, got torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            Llama.load(tmp_path, **settings, progress=lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(ValueError, match="weights in 4 bits, which go with dtype bfloat16, got torch.float32"):
        load_checkpoint(tmp_path, dtype=torch.float32)
    checkpoint = load_checkpoint(tmp_path)
    held = len(checkpoint.state_dict)
    with pytest.raises(ValueError, match="must be None or 'int4', got 'int8'"):
        Llama.from_checkpoint(checkpoint, weights="int8")
    assert len(checkpoint.state_dict) == held
    checkpoint.state_dict["model.layers.0.mlp.up_proj.scales"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="int4 weights must be finite"):
        Llama.from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="does not fit the config in .*qweight"):
        Llama.from_checkpoint(dataclasses.replace(load_checkpoint(tmp_path), packing=None))


@pytest.mark.parametrize("shape", [(48, 320), (16, 576)])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_of_ggml_are_read_as_gguf_dequantizes_them(kind, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    blocks = gguf.quants.quantize(weight, TYPES[kind])
    tensors, packing = from_ggml(torch.from_numpy(blocks), shape[1]), Int4Packing("ggml", 32)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == packing.shapes("o_proj", *shape)
    codes, scales, zeros = packing.unpack(**tensors)
    assert codes.max() == 15 and codes.min() == 0
    back = (codes.float() - 8) * scales.repeat_interleave(32, 1) + zeros.repeat_interleave(32, 1)
    torch.testing.assert_close(
        back, torch.from_numpy(gguf.quants.dequantize(blocks, TYPES[kind])), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int4_keeps_the_codes_of_a_gguf(device, tmp_path, monkeypatch, family, kind):
    projections = [name for ours, name in GGUF_LAYER_NAMES.items() if ours.endswith("_proj")]
    monkeypatch.setattr(test_llama_weights, "QUANTIZED", dict.fromkeys(projections, TYPES[kind]))
    expected = write_gguf(tmp_path / "model.gguf", make_model(family))
    model, _ = Llama.load(tmp_path / "model.gguf", weights="int4", device=device)
    for layer, block in enumerate(model.blocks):
        for ours, names in PROJECTIONS.items():
            linear = block.get_submodule(ours)
            linear.bias = None
            found = exact_rows(linear, linear.in_features, device, 16).float().cpu()
            weight = torch.cat([expected[f"model.layers.{layer}.{name}.weight"] for name in names])
            scales = linear.scales_and_zeros[..., 0].T.float().cpu().repeat_interleave(32, 1)
            assert linear.group_size == 32
            assert ((found - weight).abs() <= scales.abs() / 16 + weight.abs() / 64).all()
    assert model.weights == "int4"
    assert Llama.load(tmp_path / "model.gguf", weights="bf16", device=device)[0].weights == "bfloat16"


def test_a_gguf_with_other_projections_is_rounded(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model("llama"))
    model, _ = Llama.load(tmp_path / "model.gguf", weights="int4")
    assert model.weights == "int4"
    assert load_checkpoint(tmp_path / "model.gguf", keep_int4=True).packing is None

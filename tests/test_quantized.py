"""Weights of 8 and 4 bits: how far from the given ones, what is computed with them, what they take, what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import random_checkpoint, random_llama
from test_generate import CONFIG, make, random_prompts
from torch import nn

from quest_ops.llama.generate import Generator
from quest_ops.llama.model import Llama
from quest_ops.llama.quantized import QUANTIZED, Int4Linear, Int8Linear
from quest_ops.llama.weights import Checkpoint, expected_shapes

pytestmark = pytest.mark.usefixtures("without_humming")
SHAPES = [(48, 32), (640, 96), (64, 192), (512, 1024)]  # groups of 32, 32, 64 and 128
KINDS = sorted(QUANTIZED)


def random_weight(shape, device, seed=0) -> torch.Tensor:
    """Rows of all sizes, some off centre; one of zeros, one of equal numbers, one of a single large number."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0])[:, None]
    weight[::3] += 2 * weight[::3].abs().amax(1, keepdim=True)
    weight[1], weight[2], weight[4] = 0, 0.3, 0
    weight[4, 7] = -5
    return weight.to(device, torch.bfloat16)


def exact_rows(layer, inputs: int, device, rows: int) -> torch.Tensor:
    """The weights [N, K] that a layer multiplies by, read `rows` input rows at a time."""
    units = torch.eye(inputs, dtype=torch.bfloat16, device=device)
    return torch.cat([layer(part) for part in units.split(rows)]).T


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_are_within_half_a_scale(device, shape):
    weight = random_weight(shape, device)
    layer = Int8Linear(weight)
    error = (layer.weight * layer.scales[:, None].float() - weight.float()).abs()
    assert (error <= layer.scales[:, None].float() / 2 * (1 + 1e-5)).all()
    assert (layer.scales.float() <= weight.float().abs().amax(1) / 127 * (1 + 2**-8) + 1e-37).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_weights_are_within_half_a_scale_and_a_64th_of_the_largest(device, shape):
    weight = random_weight(shape, device)
    layer = Int4Linear(weight)
    error = (
        (exact_rows(layer, shape[1], device, 16).float() - weight.float()).abs().view(shape[0], -1, layer.group_size)
    )
    scales = layer.scales_and_zeros[..., 0].T.float()[..., None]
    groups = weight.float().view_as(error)
    assert layer.group_size == {32: 32, 96: 32, 192: 64, 1024: 128}[shape[1]]
    assert (error <= scales / 2 + groups.abs().amax(2, keepdim=True) / 64).all()
    spread = groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)
    assert (scales <= spread / 15 * (1 + 2**-8) + 1e-37).all()


@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_products_do_not_depend_on_how_many_rows_there_are(device, kind, rows):
    check_products(QUANTIZED[kind], (640, 192), rows, device)


def check_products(layer_of, shape, rows: int, device) -> None:
    """layer_of(weight, bias): its products are those of the weights that it has, with one row and with `rows`."""
    weight, generator = random_weight(shape, device), torch.Generator().manual_seed(1)
    bias = torch.randn(shape[0], generator=generator).to(device, torch.bfloat16)
    x = torch.randn(rows, shape[1], generator=generator).to(device, torch.bfloat16)
    weights_used = exact_rows(layer_of(weight), shape[1], device, 1).float()
    layer = layer_of(weight, bias)
    out = layer(x)
    assert torch.equal(layer(torch.cat([x, x], 1)[:, : shape[1]]), out)  # as a slice of rows
    # Rows of the weights differ by 5 orders of magnitude, so each output has a tolerance of its own.
    tolerance = 0.01 * (x.float().norm(dim=1)[:, None] * weight.float().norm(dim=1) + bias.float().abs())
    assert out.dtype == torch.bfloat16
    assert ((out.float() - F.linear(x.float(), weights_used, bias.float())).abs() <= tolerance).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_expanded_int4_weights_are_those_of_the_kernel_bit_by_bit(shape):
    layer = Int4Linear(random_weight(shape, "cuda"))
    assert torch.equal(layer._expanded(), exact_rows(layer, shape[1], "cuda", 16))


class CausalAttention:
    def run(self, layer, query, key, value):
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def logits_of(model: Llama, tokens: int = 30) -> torch.Tensor:
    numbers = torch.arange(tokens, device=model.device)
    with torch.inference_mode():
        return model(numbers + 20, numbers, CausalAttention())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, model_type="qwen2", attention_bias=True)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_model_with_the_rounded_weights(device, kind, config):
    original = random_llama(config, torch.bfloat16, device)
    quantized = random_llama(config, torch.bfloat16, device, weights=kind)
    rounded = random_llama(config, torch.bfloat16, device)
    for layer, low in zip(linears(rounded), linears(quantized)):
        assert isinstance(low, QUANTIZED[kind])
        bias, low.bias = low.bias, None
        layer.weight.copy_(exact_rows(low, layer.in_features, device, 8))
        low.bias = bias
        assert (layer.bias is None) == (bias is None) and (bias is None or torch.equal(layer.bias, bias))
    logits, expected = logits_of(quantized), logits_of(rounded)
    error, distance = relative(logits, expected), relative(expected, logits_of(original))
    assert error < 0.03 and distance > error / (0.5 if kind == "int4" else 2), (error, distance)


def linears(model: Llama) -> list[nn.Module]:
    return [m for m in model.blocks.modules() if isinstance(m, (nn.Linear, Int8Linear, Int4Linear))]


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.51), ("int4", 0.29)])
def test_weights_take_less_memory_and_are_rounded_layer_by_layer(device, kind, share, monkeypatch):
    def bytes_of(model):
        return sum(t.nbytes for module in linears(model) for t in (*module.parameters(), *module.buffers()))

    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512)
    checkpoint, waiting = random_checkpoint(config, torch.bfloat16), []
    layers = QUANTIZED[kind]
    monkeypatch.setitem(
        QUANTIZED, kind, lambda *weights: (waiting.append(len(checkpoint.state_dict)), layers(*weights))[1]
    )
    model = Llama.from_checkpoint(checkpoint, weights=kind, device=device)
    assert waiting == sorted([18, 9, 0] * 4, reverse=True), "9 tensors a layer, gone when the layer is rounded"
    assert bytes_of(model) < share * bytes_of(random_llama(config, torch.bfloat16, device))
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16 and model.device.type == device


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_never_holds_all_weights_unrounded(kind):
    config = dataclasses.replace(CONFIG, hidden_size=1024, intermediate_size=4096, num_hidden_layers=32)
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_shapes(config).items()}
    checkpoint, unrounded = Checkpoint(config, zeros, None), sum(tensor.nbytes for tensor in zeros.values())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = Llama.from_checkpoint(checkpoint, weights=kind, device="cuda")
    held = torch.cuda.memory_allocated() - before
    assert held < {"int8": 0.55, "int4": 0.35}[kind] * unrounded and model.device.type == "cuda"
    assert torch.cuda.max_memory_allocated() - before < held + 0.4 * unrounded  # one layer, several times in float32


@pytest.mark.parametrize("kind", KINDS)
def test_generation_runs_on_rounded_weights(device, kind):
    model = random_llama(CONFIG, torch.bfloat16, device, weights=kind)
    results = make(model).generate(random_prompts(150, 20), 12, stop_tokens=())
    assert [len(result.tokens) for result in results] == [12, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_with_rounded_weights_knows_a_capital(smollm2, kind):
    model, tokenizer = Llama.load("smollm2", weights=kind)
    assert model.blocks[0].mlp.down.__class__ is QUANTIZED[kind]
    assert kind == "int8" or model.blocks[0].mlp.down.group_size == 32  # the file's own 4 bits
    prompt = tokenizer.encode("Question: What is the capital of France?\nAnswer: The capital of France is")
    assert "Paris" in tokenizer.decode(Generator(model, max_sequence_tokens=64).generate([prompt], 3)[0].tokens)


def test_what_is_not_supported_is_named(monkeypatch):
    checkpoint = random_checkpoint(CONFIG, torch.float32)
    with pytest.raises(ValueError, match="weights 'int4' go with dtype bfloat16, got torch.float32"):
        Llama.from_checkpoint(checkpoint, weights="int4")
    assert checkpoint.state_dict
    with pytest.raises(ValueError, match=r"weights must be one of \('bf16', 'int8', 'int4'\), got 'fp8'"):
        Llama.from_checkpoint(checkpoint, weights="fp8")
    monkeypatch.setattr("quest_ops.llama.model.load_checkpoint", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(ValueError, match="weights must be one of"):
        Llama.load("smollm2", weights="int3")
    with pytest.raises(ValueError, match="weights 'bf16' go with dtype bfloat16, got torch.float16"):
        Llama.load("smollm2", weights="bf16", dtype=torch.float16)
    for shape in ((64, 48), (40, 64)):
        with pytest.raises(ValueError, match=rf"int4 weights must be \[N, K\] .* got \[{shape[0]}, {shape[1]}\]"):
            Int4Linear(torch.ones(shape, dtype=torch.bfloat16))
    for kind, layer in QUANTIZED.items():
        with pytest.raises(ValueError, match=f"{kind} weights need a model in bfloat16, got torch.float16"):
            layer(torch.ones(64, 64, dtype=torch.float16))
        for odd in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{kind} weights must be finite"):
                layer(torch.full((64, 64), odd, dtype=torch.bfloat16))


def test_layers_of_other_codes_are_refused():
    codes, scales = torch.zeros(16, 96, dtype=torch.uint8), torch.ones(16, 3, dtype=torch.bfloat16)
    Int4Linear.from_codes(codes, scales, scales)
    for changed in (
        (codes[:8], scales[:8], scales[:8]),
        (codes, scales[:, :2], scales[:, :2]),
        (codes, scales, scales[:1]),
    ):
        with pytest.raises(ValueError, match=r"int4 codes must be \[N, K\] of N % 16 = 0, scales and zeros .* got \["):
            Int4Linear.from_codes(*changed)
    with pytest.raises(ValueError, match="int4 weights need a model in bfloat16, got torch.float16"):
        Int4Linear.from_codes(codes, scales.half(), scales.half())


def test_int4_weights_stay_on_their_device():
    for place in ("meta", torch.float16):
        model = random_llama(CONFIG, torch.bfloat16, "cpu", weights="int4")
        with pytest.raises(RuntimeError, match="int4 weights cannot become .* load the model there, in bfloat16"):
            model.to(place)

"""Low-bit weights by humming's kernels: how far from the given ones, products of few and many rows, in the decoder."""

import dataclasses
import functools

import pytest
import torch
from models import random_llama
from test_generate import CONFIG, COVERING, assert_same_choices, generate_with_logits, make, random_prompts
from test_quantized import KINDS, check_products, exact_rows, linears, logits_of, random_weight, relative

from quest_ops.llama.humming_linear import HummingLinear, humming_takes
from quest_ops.llama.quantized import Int4Linear, linear_of_codes, low_bit_linear

pytestmark = pytest.mark.gpu
pytest.importorskip("humming")

SHAPES = [(128, 128), (640, 256), (256, 1152)]
WIDE = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512, vocab_size=512)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_within_half_a_scale_and_rounding(kind, shape):
    weight = random_weight(shape, "cuda")
    layer = low_bit_linear(kind, weight)
    assert (
        isinstance(layer, HummingLinear)
        and layer.kind == kind
        and layer.packed.nbytes == weight.nbytes // (2 if kind == "int8" else 4)
    )
    groups = weight.float().view(shape[0], 1 if kind == "int8" else -1, shape[1] if kind == "int8" else 128)
    error = (exact_rows(layer, shape[1], "cuda", 16).float() - weight.float()).view_as(groups).abs()
    largest = groups.abs().amax(2, keepdim=True)
    spread = largest * 2 if kind == "int8" else groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)
    steps = 254 if kind == "int8" else 15
    assert (error <= spread / steps / 2 * (1 + 2**-7) + largest / (256 if kind == "int8" else 64)).all()


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(640, 256), (16384, 512), (32768, 256)])
def test_products_do_not_depend_on_how_many_rows_there_are(kind, rows, shape):
    check_products(functools.partial(low_bit_linear, kind), shape, rows, "cuda")


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_of_a_checkpoint_are_taken_over(group_size):
    generator = torch.Generator("cuda").manual_seed(2)
    codes = torch.randint(0, 16, (256, 384), generator=generator, device="cuda")
    scales = torch.rand(256, 384 // group_size, generator=generator, device="cuda").add(0.1).bfloat16()
    zeros = (scales * torch.randn(scales.shape, generator=generator, device="cuda") * 4).bfloat16()
    layer = linear_of_codes(codes, scales, zeros)
    assert isinstance(layer, HummingLinear)
    wide_scales, wide_zeros = (t.float().repeat_interleave(group_size, 1) for t in (scales, zeros))
    error = (exact_rows(layer, 384, "cuda", 16).float() - ((codes - 8) * wide_scales + wide_zeros)).abs()
    assert (error <= (8 * wide_scales + wide_zeros.abs()) / 64).all()


def test_zero_points_far_off_are_left_to_torch():
    codes, scales = (
        torch.zeros(128, 128, dtype=torch.int64, device="cuda"),
        torch.ones(128, 1, device="cuda").bfloat16(),
    )
    assert isinstance(linear_of_codes(codes, scales, -400 * scales), HummingLinear)
    assert isinstance(linear_of_codes(codes, scales, -1000 * scales), Int4Linear)
    scales[5] = 0
    assert isinstance(linear_of_codes(codes, scales, torch.zeros_like(scales)), Int4Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused(kind):
    weight = torch.zeros(128, 128, device="cuda", dtype=torch.bfloat16)
    weight[5, 7] = torch.inf
    with pytest.raises(ValueError, match=f"{kind} weights must be finite"):
        low_bit_linear(kind, weight)
    with pytest.raises(ValueError, match=f"{kind} weights need a model in bfloat16"):
        low_bit_linear(kind, torch.zeros(128, 128, device="cuda"))
    with pytest.raises(RuntimeError, match="load the model there"):
        low_bit_linear(kind, torch.zeros_like(weight)).cpu()
    assert not humming_takes(128, 96, weight.device) and not humming_takes(128, 128, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_model_with_the_rounded_weights(kind):
    original, quantized, rounded = (random_llama(WIDE, torch.bfloat16, "cuda", weights=w) for w in (None, kind, None))
    low_bits = [m for m in quantized.blocks.modules() if isinstance(m, HummingLinear)]
    assert len(low_bits) == len(linears(rounded)) and isinstance(quantized.lm_head, HummingLinear)
    assert quantized.weights == kind and quantized.lm_head.kind == "int8"
    for layer, low in zip([*linears(rounded), rounded.lm_head], [*low_bits, quantized.lm_head]):
        layer.weight.copy_(exact_rows(low, layer.in_features, "cuda", 8))
    logits, expected = logits_of(quantized), logits_of(rounded)
    error, distance = relative(logits, expected), relative(expected, logits_of(original))
    assert error < 0.05 and distance > error / (0.5 if kind == "int4" else 2), (error, distance)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_graphs_are_close_to_eager_steps(kind):
    torch._dynamo.reset()
    model = random_llama(WIDE, torch.bfloat16, "cuda", kind)
    for lengths in ((90,), (60, 7, 90)):
        prompts = random_prompts(*lengths)
        compiled, eager = (
            generate_with_logits(make(model, quest=COVERING, compile=compile), prompts, 20) for compile in (None, False)
        )
        for some, others in zip(compiled, eager):
            assert_same_choices(some, others)

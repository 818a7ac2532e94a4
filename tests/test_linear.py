"""Products of the decoder's layers on a CPU with and without instructions for bfloat16."""

import pytest
import torch

from quest_ops.llama import linear
from quest_ops.llama.model import default_dtype


@pytest.mark.parametrize("multiplies_bfloat16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_the_nearest_to_float64s(dtype, multiplies_bfloat16, monkeypatch):
    monkeypatch.setattr(linear, "MULTIPLIES_BFLOAT16", multiplies_bfloat16)
    generator = torch.Generator().manual_seed(0)
    for bias in (False, True):
        layer = linear.Linear(96, 40, bias=bias, dtype=dtype)
        for rows in (0, 1, linear.ROWS, linear.ROWS + 1, 33):
            x = torch.randn(rows, 96, generator=generator).to(dtype)
            with torch.inference_mode():
                out = layer(x)
                exact = torch.nn.functional.linear(x.double(), *(p.double() for p in layer.parameters()))
            assert out.dtype == dtype and out.shape == (rows, 40)
            rounding = torch.finfo(dtype).eps / 2 * 1.01
            assert ((out - exact).abs() <= rounding * exact.abs() + 1e-5).all()


def test_rows_are_expanded_only_without_instructions(monkeypatch):
    """What is called with float32 weights tells: in bfloat16 nothing is, where the CPU can multiply it."""
    called = []
    product = torch.nn.functional.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, *rest: called.append(x.dtype) or product(x, *rest))
    layer = linear.Linear(32, 32, dtype=torch.bfloat16)
    for multiplies_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(linear, "MULTIPLIES_BFLOAT16", multiplies_bfloat16)
        called.clear()
        for rows in (linear.ROWS, linear.ROWS + 1):
            layer(torch.zeros(rows, 32, dtype=torch.bfloat16))
        assert called == [torch.bfloat16, expected]


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_default_dtype_is_what_the_cpu_reads_fastest(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert default_dtype("cpu") == (torch.float32 if capability == "DEFAULT" else torch.bfloat16)
    assert default_dtype("cuda") == torch.bfloat16


@pytest.fixture
def few_rows():
    if linear.few_rows is None or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Triton and compute capability 9.0")
    return linear.few_rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_few_rows(few_rows, dtype):
    torch.manual_seed(0)
    weight = torch.randn(192, 1024, device="cuda").to(dtype)
    x = torch.randn(few_rows.MOST_ROWS, 1024, device="cuda").to(dtype)
    exact = x.double() @ weight.double().T
    outs = {rows: few_rows.multiply_few_rows(x[:rows], weight) for rows in (2, 3, 8, len(x))}
    for rows, out in outs.items():
        assert out.dtype == dtype and torch.equal(out, outs[len(x)][:rows])
        rounding = torch.finfo(dtype).eps / 2 * 1.01
        assert ((out - exact[:rows]).abs() <= rounding * exact[:rows].abs() + 1e-3).all()
    torch.library.opcheck(few_rows.multiply_few_rows, (x[:5], weight))
    with pytest.raises(ValueError, match=r"2 to 16 rows.*got \[1, 1024\]"):
        few_rows.multiply_few_rows(x[:1], weight)


@pytest.mark.gpu
def test_compiled_layers_multiply_few_rows_by_triton(few_rows):
    torch._dynamo.reset()
    layer = linear.Linear(512, 128, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(layer, fullgraph=True)
    with torch.inference_mode():
        for rows in (2, few_rows.MOST_ROWS, few_rows.MOST_ROWS + 1):
            x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda")
            assert few_rows.serves(x, layer.weight) == (rows <= few_rows.MOST_ROWS)
            out = compiled(x)
            torch.testing.assert_close(out, layer(x), rtol=0.02, atol=0.01)  # the bias is added to what is rounded
            if rows <= few_rows.MOST_ROWS:
                product = few_rows.multiply_few_rows(x, layer.weight)
                torch.testing.assert_close(out, product + layer.bias, rtol=0.01, atol=0.01)
    assert not few_rows.serves(torch.zeros(1, 512, dtype=torch.bfloat16, device="cuda"), layer.weight)
    assert not few_rows.serves(torch.zeros(2, 512, device="cuda"), layer.weight.float())

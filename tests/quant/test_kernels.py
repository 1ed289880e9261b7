"""The product by the number of rows: bitsandbytes' fused kernels where they may be used, and nowhere else.

Few machines have them. So their layouts and arguments are tested everywhere, with a kernel in Python that reads them,
and the kernels themselves where they are.
"""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_map

import vera_func as vf
from vera_func import private
from vera_func.model.base_layers import QuantizedLinear
from vera_func.quant import linear as module
from vera_func.quant.cpu_layout import FUSED_ROWS, fused_weight, unpack_cpu_layout
from vera_func.quant.value import flatten

from helpers import FORMATS, llama, quantized, randomized, relative_error, repack


OUT, IN = 64, 128
FOUR_BITS = [name for name in FORMATS if name != "int8"]
needs_kernel = pytest.mark.skipif(not functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(name):
    return FORMATS[name](normal(OUT, IN, seed=1, dtype=torch.float32))


@pytest.fixture
def calls(monkeypatch):
    """A stand-in for the kernel, which reads the copy's layout as a module's, and notes the rows of each call."""
    rows = []

    def product(x, fused, spec):
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        rows.append(x.numel() // x.shape[-1])
        state = SimpleNamespace(
            shape=spec.shape,
            absmax=fused.absmax,
            original_dtype=x.dtype,
            quant_type=spec.quant_type,
            blocksize=spec.blocksize,
        )
        return torch.nn.functional.linear(x, vf.dequantize(unpack_cpu_layout(fused.packed, state, None)))

    monkeypatch.setattr(private, "bnb_has_avx512bf16", lambda: True)
    monkeypatch.setattr(module, "fused_product", product)
    return rows


@pytest.mark.parametrize("name", FOUR_BITS)
def test_the_copy_is_bitsandbytes_layout(calls, name):
    q = weight(name)
    fused, layer = fused_weight(q), repack(vf.to_bnb(q))
    assert torch.equal(fused.packed, layer.weight.data)
    assert torch.equal(fused.absmax, layer.weight.quant_state.absmax)


def test_no_copy_where_nothing_could_use_it(calls, monkeypatch):
    narrow = normal(OUT, 96, dtype=torch.float32)
    assert fused_weight(vf.quantize_4bit(narrow)) is None  # rows are no whole blocks
    assert fused_weight(vf.quantize_4bit(narrow.T[:, :64])) is not None
    assert fused_weight(vf.quantize_4bit(narrow.T[:70, :64])) is None  # 32 rows at a time
    assert fused_weight(weight("int8")) is None
    monkeypatch.setattr(private, "bnb_has_avx512bf16", lambda: False)
    assert fused_weight(weight("nf4")) is None


@pytest.mark.parametrize("batch", [(), (1,), (4, 8), (FUSED_ROWS,)], ids=str)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_few_rows_without_gradients_are_fused(calls, name, batch):
    q, x, bias = weight(name), normal(*batch, IN), normal(OUT, seed=2)
    fused, plain = fused_weight(q), vf.quantized_linear(q, x, bias)
    assert torch.equal(vf.quantized_linear(q, x, bias, fused=fused), plain)  # gradients may be asked for
    assert calls == []
    with torch.no_grad():
        y = vf.quantized_linear(q, x, bias, fused=fused)
    assert calls == [max(1, x.numel() // IN)]
    assert relative_error(y.float(), plain.float()) < 0.02
    if name != "bf16 storage":
        assert not torch.equal(y, plain)  # its scales are rounded


@pytest.mark.parametrize(
    ("batch", "dtype"), [((FUSED_ROWS + 1,), torch.bfloat16), ((0,), torch.bfloat16), ((1,), torch.float32)], ids=str
)
def test_others_are_not(calls, batch, dtype):
    q, x = weight("nf4"), normal(*batch, IN, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(vf.quantized_linear(q, x, fused=fused_weight(q)), vf.quantized_linear(q, x))
    assert calls == []


def test_rows_are_counted_after_folding(calls):
    q, xs = weight("nf4"), normal(5, 2, IN)
    f = lambda x: vf.quantized_linear(q, x, fused=fused_weight(q))
    with torch.no_grad():
        assert_close(vmap(f)(xs), torch.stack([f(x) for x in xs]))
        assert calls == [10, 2, 2, 2, 2, 2]
        assert_close(vmap(f, 1, 1)(xs), f(xs))


def test_derivatives_are_those_of_the_weight_itself(calls):
    q, x, tangent = weight("nf4"), normal(3, IN), normal(3, IN, seed=3)
    fused = fused_weight(q)
    loss = lambda x, fused=fused: vf.quantized_linear(q, x, fused=fused).float().square().sum()
    assert torch.equal(grad(loss)(x), grad(lambda x: loss(x, None))(x))
    with torch.no_grad():  # torch.func.grad is not told by it
        assert torch.equal(grad(loss)(x), grad(lambda x: loss(x, None))(x))
        y, y_t = jvp(lambda x: vf.quantized_linear(q, x, fused=fused), (x,), (tangent,))
    assert calls == [3]
    assert relative_error(y.float(), vf.quantized_linear(q, x).float()) < 0.02
    assert torch.equal(y_t, vf.quantized_linear(q, tangent))


def test_a_copy_of_another_weight_is_refused(calls):
    q = weight("nf4")
    with pytest.raises(
        ValueError, match=r"fused, of shape \(128, 32\), was not made from this weight, of shape \(64, 128\)"
    ):
        vf.quantized_linear(q, normal(IN), fused=fused_weight(vf.quantize_4bit(normal(IN, OUT), blocksize=32)))
    with pytest.raises(ValueError, match="was not made from"):
        vf.quantized_linear(weight("int8"), normal(IN), fused=fused_weight(q))


def test_a_model_decodes_with_fused_weights(calls):
    model = quantized(llama(torch.bfloat16, hidden_size=64, intermediate_size=128), "nested")
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    params, fast = randomized(params), apply.with_fused_weights(max_rows=FUSED_ROWS)
    ids = torch.randint(3, 60, (2, 3), generator=torch.Generator().manual_seed(0))

    def logits(apply, ids):
        with torch.no_grad():
            return apply(params, frozen, input_ids=ids).logits.float()

    expected = logits(apply, ids)
    assert calls == []
    actual = logits(fast, ids)
    assert calls == [6] * 2 * len(["q", "k", "v", "o", "gate", "up", "down"])  # adapted or not
    assert 0 < relative_error(actual, expected) < 0.05
    # A gradient goes through the weights as they are, and the first function knows nothing of all this.
    loss = lambda params, apply: apply(params, frozen, input_ids=ids).logits.float().square().sum()
    for key, value in grad(loss)(params, fast).items():
        assert torch.equal(value, grad(loss)(params, apply)[key])
    assert torch.equal(logits(apply, ids), expected)
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda _: logits(fast, ids), range(8)):
            assert torch.equal(result, actual)


def test_a_cast_layer_keeps_its_copy(calls):
    layer = QuantizedLinear(weight("nf4"), None)
    layer.fused = fused_weight(layer.quantized)
    assert layer.bfloat16().fused is not None
    assert layer.to("meta").fused.packed.device.type == "cpu"  # a skeleton without state, but with its constants


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FOUR_BITS)
def test_bitsandbytes_choice_has_the_right_arguments(name, bias):
    """What a GPU is asked; on a CPU the same operation dequantizes, so that it may be compared bit by bit."""
    q, x, b = weight(name), normal(3, 5, IN, dtype=torch.float32), normal(OUT, dtype=torch.float32)
    leaves, spec = flatten(q)
    assert len(leaves) == len(tree_flatten(q)[0])
    b = b if bias else None
    assert torch.equal(module._gpu_product(x, b, spec, leaves), vf.quantized_linear(q, x, b))


@needs_kernel
@pytest.mark.parametrize("rows", [1, 3, FUSED_ROWS])
@pytest.mark.parametrize("name", FOUR_BITS)
def test_the_kernel_itself(name, rows):
    q, x, bias = weight(name), normal(rows, IN), normal(OUT, seed=2)
    with torch.no_grad():
        y = vf.quantized_linear(q, x, bias, fused=fused_weight(q))
    assert relative_error(y.float(), vf.quantized_linear(q, x, bias).float()) < 0.02


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 4, 64, 2000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_on_a_gpu(name, dtype, rows):
    q = tree_map(lambda leaf: leaf.cuda(), weight(name))
    x, bias = normal(rows, IN, dtype=dtype).cuda(), normal(OUT, seed=2, dtype=dtype).cuda()
    dense = vf.dequantize(q, torch.float64)
    expected = x.double() @ dense.T + bias.double()
    tolerance = {torch.bfloat16: 0.02, torch.float16: 3e-3, torch.float32: 3e-3}[dtype]  # TF32, where it is on
    assert relative_error(vf.quantized_linear(q, x, bias).double(), expected) < tolerance
    with torch.no_grad():
        assert relative_error(vf.quantized_linear(q, x, bias).double(), expected) < tolerance
        _, tangent = jvp(lambda x: vf.quantized_linear(q, x), (x,), (x,))
    assert relative_error(tangent.double(), x.double() @ dense.T) < tolerance
    mapped = vmap(grad(lambda x: vf.quantized_linear(q, x).float().sum()))(x)
    assert relative_error(mapped.double(), dense.sum(0).expand_as(x)) < tolerance


def test_the_limit_is_given_or_measured(calls, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "measured_rows", lambda kind, *rest: asked.append(kind) or 5)
    q, dense = weight("nf4"), vf.dequantize(weight("nf4"), torch.bfloat16)
    with torch.no_grad():
        for rows in (1, 5, 6, 257):
            for given in (None, dense):
                vf.quantized_linear(q, normal(rows, IN), fused=fused_weight(q, None), dense=given)
        assert calls == [1, 1, 5, 5]
        assert len(asked) == 6  # not for 257 rows, which are always multiplied by a dense weight
        assert len(set(asked)) == 2  # the alternatives are a dense copy, and dequantizing
        calls.clear()
        for limit in (0, 3, 300):
            vf.quantized_linear(q, normal(3, IN), fused=fused_weight(q, limit), dense=dense)
        assert calls == [3, 3]
    vf.quantized_linear(q, normal(3, IN), fused=fused_weight(q, None))  # gradients may be asked for
    assert (len(asked), len(calls)) == (6, 2)


@needs_kernel
def test_the_measured_choice_is_fixed_in_a_process():
    q, x = weight("nf4"), normal(16, IN)
    with torch.no_grad():
        fused = fused_weight(q, None)
        first = vf.quantized_linear(q, x, fused=fused)
        assert all(torch.equal(vf.quantized_linear(q, x, fused=fused_weight(q, None)), first) for _ in range(3))
        either = [vf.quantized_linear(q, x, fused=fused_weight(q, limit)) for limit in (0, 16)]
    assert any(torch.equal(first, y) for y in either)

"""C functions called without torch's dispatcher: the bits of the operators, where nothing observes operations."""

import pytest
import torch
from bitsandbytes import functional
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import vera_func as vf
from vera_func import private
from vera_func.quant import native
from vera_func.quant.cpu_layout import fused_weight
from vera_func.quant.linear import fused_product
from vera_func.quant.value import flatten

from helpers import normal


needs_kernel = pytest.mark.skipif(not functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")


@pytest.fixture
def operators(monkeypatch):
    """The names of the operators that are called, in order."""
    called, ops = [], private.bnb_ops()

    class Operators:
        def __getattr__(self, name):
            called.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(private, "bnb_ops", Operators)
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 2048])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantizing_gives_the_operators_bits(operators, quant_type, blocksize, dtype):
    q = vf.quantize_4bit(normal(35, 192), quant_type, blocksize)
    arguments = q.packed, q.absmax, blocksize, quant_type, (35, 192), dtype
    own = native.dequantize_4bit(*arguments)
    assert operators == (["dequantize_4bit"] if blocksize == 2048 else [])
    assert torch.equal(own, private.bnb_ops().dequantize_4bit(*arguments))


@needs_kernel
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 5, 128)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_fused_product_gives_the_operators_bits(operators, quant_type, shape):
    q = vf.quantize_4bit(normal(64, 128), quant_type)
    fused, spec = fused_weight(q), flatten(q)[1]
    x = normal(*shape, dtype=torch.bfloat16)
    own = fused_product(x, fused, spec)
    assert operators == []
    assert torch.equal(own, private.bnb_ops().gemv_4bit(x, fused.packed, q.shape, fused.absmax, fused.code, 64))


@needs_kernel
def test_a_negated_view_is_negated():
    q = vf.quantize_4bit(normal(64, 128))
    x = normal(2, 128, seed=1, dtype=torch.bfloat16)
    negated = torch._neg_view(x)  # such as the imaginary part of a conjugated tensor
    fused = fused_weight(q)
    with torch.no_grad():
        assert torch.equal(vf.quantized_linear(q, negated, fused=fused), vf.quantized_linear(q, -x, fused=fused))


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    pass


def test_operators_are_called_where_the_memory_is_not_all(operators):
    q = vf.quantize_4bit(normal(32, 64))
    arguments = 64, "nf4", q.shape, torch.float32
    dense = native.dequantize_4bit(q.packed, q.absmax, *arguments)
    assert operators == []
    with Passing():
        assert torch.equal(native.dequantize_4bit(q.packed, q.absmax, *arguments), dense)
    assert operators == ["dequantize_4bit"]
    native.dequantize_4bit(q.packed.as_subclass(Marked), q.absmax, *arguments)
    with private.fake_tensors():
        assert native.dequantize_4bit(q.packed, q.absmax, *arguments).shape == q.shape
    vmap(lambda x: x * native.dequantize_4bit(q.packed, q.absmax, *arguments).sum())(torch.ones(2))
    grad(lambda x: x * native.dequantize_4bit(q.packed, q.absmax, *arguments).sum())(torch.ones(()))
    assert len(operators) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiler_traces_the_operator(dtype):
    q, x = vf.quantize_4bit(normal(32, 64)), normal(3, 64, dtype=dtype)
    compiled = torch.compile(lambda x: vf.quantized_linear(q, x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), vf.quantized_linear(q, x))


def test_a_missing_function_is_none():
    assert private.bnb_function("no_such_function", "np") is None


def test_operators_are_called_with_unknown_releases_of_bitsandbytes(monkeypatch):
    # A C function with other arguments would write to memory that is not ours.
    name = "cdequantize_blockwise_cpu_nf4_fp32"
    assert private.bnb_function(name, "pppnnn")
    monkeypatch.setattr(private.bitsandbytes(), "__version__", "0.51.0")
    assert private.bnb_function(name, "pppnnn") is None

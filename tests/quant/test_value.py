"""Quantized weights as values: bitsandbytes' bytes, the formula, and their invariants."""

import dataclasses
import re
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn, ones
from torch.testing import assert_close

import vera_func as vf
from vera_func.quant import native, quantize as quantize_module
from vera_func.quant.value import BLOCKSIZES, flatten, validate

from helpers import FORMATS, normal, relative_error
from refused import INF, Q4, Q4_NESTED, Q8, Refused, X
from weights import OPTIONS, SHAPES, assert_same, formula


# Rows that are no whole blocks of some size; and a width of a Llama for which bitsandbytes is off by half.
STRADDLING = [(32, 64), (33, 96), (64, 160), (6, 48), (40, 144), (3, 16), (7, 2064)]


class TestBytes:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), OPTIONS)
    def test_equal_bitsandbytes(self, quant_type, blocksize, double_quant, shape):
        weight = normal(*shape)
        q = vf.quantize_4bit(weight, quant_type, blocksize, double_quant)
        packed, state = functional.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
        )
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.absmax, state.absmax)
        assert (q.shape, q.dtype, q.quant_type, q.blocksize) == (shape, torch.float32, quant_type, blocksize)
        if double_quant:
            assert torch.equal(q.nested.scale, state.state2.absmax)
            assert torch.equal(q.nested.code, state.state2.code)
            assert torch.equal(q.nested.offset, state.offset)
        else:
            assert q.nested is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
    def test_equal_what_moving_a_module_stores(self, storage, dtype):
        weight = normal(32, 64, dtype=dtype)
        module = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", quant_storage=storage)
        module.weight.data = weight.clone()
        module = module.to("cpu")
        q = vf.quantize_4bit(weight, double_quant=True, quant_storage=storage)
        # torch.equal of floats would take NaN patterns for unequal.
        assert q.packed.dtype == module.weight.dtype == storage
        assert torch.equal(q.packed.view(torch.uint8), module.weight.data.view(torch.uint8))
        assert torch.equal(q.absmax, module.weight.quant_state.absmax)
        assert q.dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equal_8bit_modules(self, shape, dtype):
        weight = normal(*shape, dtype=dtype)
        module = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
        module.weight.data = weight.clone()
        module = module.to("cpu")
        q = vf.quantize_8bit(weight)
        assert torch.equal(q.codes, module.weight.CB)
        assert torch.equal(q.scale, module.weight.SCB)
        assert q.shape == shape

    def test_depend_on_nothing_but_the_weight(self):
        weight = normal(64, 96)
        for quantize in FORMATS.values():
            q = quantize(weight)
            assert_same(quantize(weight.t().contiguous().t()), q)
            assert_same(quantize(weight.clone().requires_grad_()), q)
        assert torch.equal(weight, normal(64, 96))


class TestDequantize:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), OPTIONS)
    def test_is_the_formula(self, quant_type, blocksize, double_quant, shape):
        q = vf.quantize_4bit(normal(*shape), quant_type, blocksize, double_quant)
        assert_close(vf.dequantize(q).double(), formula(q), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("blocksize", BLOCKSIZES)
    @pytest.mark.parametrize("shape", STRADDLING, ids=str)
    def test_blocks_may_straddle_rows(self, shape, blocksize, quant_type, double_quant):
        """bitsandbytes' kernel for CPUs with AVX512 takes wrong scales there. The oracle is the formula."""
        q, x, bias = vf.quantize_4bit(normal(*shape), quant_type, blocksize, double_quant), normal(3, shape[1]), None
        dense = formula(q)
        assert_close(vf.dequantize(q).double(), dense, rtol=1e-6, atol=1e-7)
        for dtype in (torch.float16, torch.bfloat16):
            rounding = torch.finfo(dtype).eps
            assert_close(vf.dequantize(q, dtype).double(), dense, rtol=rounding, atol=1e-7)
        y, pullback = torch.func.vjp(lambda x: vf.quantized_linear(q, x, bias), x)
        assert relative_error(y.double(), x.double() @ dense.T) < 1e-5
        assert relative_error(pullback(y)[0].double(), y.double() @ dense) < 1e-5

    @pytest.mark.parametrize("blocksize", BLOCKSIZES)
    @pytest.mark.parametrize("shape", STRADDLING, ids=str)
    def test_no_row_reaches_the_kernel_with_a_part_of_a_block(self, monkeypatch, shape, blocksize):
        """What makes the numbers right with AVX512, seen on every machine: the row length that the kernel is given."""
        given = []

        def dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype):
            given.append(shape)
            return native.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)

        q = vf.quantize_4bit(normal(*shape), blocksize=blocksize)
        monkeypatch.setattr(quantize_module, "dequantize_4bit", dequantize_4bit)
        assert vf.dequantize(q).shape == shape
        rows, length = given[0]
        assert rows * length == shape[0] * shape[1]
        assert rows == 1 or length % blocksize == 0

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_the_formula_of_8_bits(self, shape):
        q = vf.quantize_8bit(normal(*shape))
        assert_close(vf.dequantize(q).double(), formula(q), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("name", FORMATS)
    def test_dtypes(self, name):
        weight = normal(64, 96, dtype=torch.bfloat16)
        q = FORMATS[name](weight)
        default = torch.float32 if name == "int8" else torch.bfloat16
        assert vf.dequantize(q).dtype == q.dtype == default
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            dense = vf.dequantize(q, dtype)
            assert dense.dtype == dtype
            eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            # Codes and scales of 8 bits are each rounded to the dtype: two roundings, and one of the product.
            assert_close(dense.double(), formula(q), rtol=2 * eps, atol=1e-7)
        with pytest.raises(ValueError, match="int32"):
            vf.dequantize(q, torch.int32)

    @pytest.mark.parametrize("name", FORMATS)
    def test_error_is_bounded(self, name):
        weight = normal(256, 256)
        error = (vf.dequantize(FORMATS[name](weight)) - weight).norm() / weight.norm()
        bound = {"int8": 0.01, "fp4": 0.15 if name == "fp4" else 0}.get(name, 0.11)
        assert bound / 2 < error < bound


NF4 = vf.quantize_4bit(normal(13, 37))
NESTED = vf.quantize_4bit(normal(97, 101), blocksize=32, double_quant=True)
INT8 = vf.quantize_8bit(normal(13, 37))
INVALID = {
    "transposed codes": (INT8, {"codes": INT8.codes.t()}, r"codes must have shape \(13, 37\)"),
    "codes of another dtype": (INT8, {"codes": INT8.codes.int()}, r"int8, got .* torch.int32"),
    "a scale for each column": (INT8, {"scale": torch.ones(37)}, r"scale must have shape \(13,\)"),
    "scale in half precision": (INT8, {"scale": INT8.scale.half()}, "torch.float16"),
    "no rows": (INT8, {"shape": (0, 37)}, "both positive"),
    "no columns": (INT8, {"shape": (13, 0)}, "both positive"),
    "a byte too few": (NF4, {"packed": NF4.packed[1:]}, r"has 240 bytes, .* \(13, 37\) packs into 241"),
    "bytes in another storage": (NF4, {"packed": NF4.packed.int()}, "bytes"),
    "another shape": (NF4, {"shape": (13, 38)}, "packs into 247"),
    "a block too many": (NF4, {"absmax": torch.ones(9)}, r"absmax must have shape \(8,\)"),
    "repacked statistics": (NF4, {"absmax": NF4.absmax[None]}, r"absmax must have shape \(8,\)"),
    "absmax in bfloat16": (NF4, {"absmax": NF4.absmax.bfloat16()}, "bfloat16"),
    "nested absmax not nested": (NF4, {"nested": NESTED.nested}, "uint8"),
    "a blocksize that is none": (NF4, {"blocksize": 100}, "blocksize must be one of"),
    "another blocksize": (NF4, {"blocksize": 128}, r"absmax must have shape \(4,\)"),
    "another type": (NF4, {"quant_type": "int4"}, "'nf4' or 'fp4', got 'int4'"),
    "computing in integers": (NF4, {"compute_dtype": torch.int8}, "compute_dtype"),
    "a weight of integers": (NF4, {"dtype": torch.int8}, "dtype must be one of"),
    "nested scale": (
        NESTED,
        {"nested": NESTED.nested._replace(scale=torch.ones(1))},
        r"nested.scale must have shape \(2,\)",
    ),
    "nested code": (
        NESTED,
        {"nested": NESTED.nested._replace(code=torch.ones(16))},
        r"nested.code must have shape \(256,\)",
    ),
    "nested offset": (
        NESTED,
        {"nested": NESTED.nested._replace(offset=torch.ones(1))},
        r"nested.offset must have shape \(\)",
    ),
}


@pytest.mark.parametrize("q", [NF4, NESTED, INT8, *(f(normal(64, 64)) for f in FORMATS.values())])
def test_validate_accepts(q):
    validate(q)


@pytest.mark.parametrize("case", INVALID)
def test_validate_refuses(case):
    q, changes, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(q, **changes))


BAD = {
    "a 1-D weight": (lambda: vf.quantize_4bit(normal(64)), r"got \(64,\)"),
    "a 3-D weight": (lambda: vf.quantize_8bit(normal(2, 3, 4)), r"got \(2, 3, 4\)"),
    "an empty weight": (lambda: vf.quantize_4bit(normal(0, 64)), r"got \(0, 64\)"),
    "float64": (lambda: vf.quantize_4bit(normal(2, 64).double()), "torch.float64"),
    "integers": (lambda: vf.quantize_8bit(torch.ones(2, 64, dtype=torch.int8)), "torch.int8"),
    "NaN": (lambda: vf.quantize_4bit(torch.full((2, 64), torch.nan)), "NaN or inf"),
    "inf": (lambda: vf.quantize_8bit(torch.full((2, 64), torch.inf)), "NaN or inf"),
    "beyond float16": (lambda: vf.quantize_8bit(torch.full((2, 64), 7e4)), "overflows float16"),
    "an unknown type": (lambda: vf.quantize_4bit(normal(2, 64), "NF4"), "'nf4' or 'fp4', got 'NF4'"),
    "an unknown blocksize": (lambda: vf.quantize_4bit(normal(2, 64), blocksize=16), "got 16"),
    "an integer compute dtype": (lambda: vf.quantize_4bit(normal(2, 64), compute_dtype=torch.int8), "torch.int8"),
    "half a storage element": (lambda: vf.quantize_4bit(normal(1, 2), quant_storage=torch.bfloat16), "torch.uint8"),
    "a negative threshold": (lambda: vf.quantize_8bit(normal(2, 64), threshold=-1.0), "got -1"),
    "a threshold of NaN": (lambda: vf.quantize_8bit(normal(2, 64), threshold=float("nan")), "got nan"),
    "x of another size": (lambda: vf.quantized_linear(NF4, normal(3, 13)), r"shape \(\*batch, 37\) .*\(3, 13\)"),
    "a scalar x": (lambda: vf.quantized_linear(NF4, torch.ones(())), r"\(\*batch, in\), got \(\)"),
    "a bias of another size": (lambda: vf.quantized_linear(NF4, normal(3, 37), normal(37)), r"\(13,\), got \(37,\)"),
    "a bias for each row": (lambda: vf.quantized_linear(NF4, normal(3, 37), normal(3, 13)), r"got \(3, 13\)"),
    "a module's bias": (lambda: vf.to_bnb(NF4, normal(37)), r"\(13,\), got \(37,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# What is refused

bad = Refused()


for quantize in ("quantize_4bit", "quantize_8bit"):
    f = getattr(vf, quantize)
    bad(quantize, "a list", lambda _, f=f: f([[1.0]]), r"weight must be a tensor of shape .*, got list")
    bad(quantize, "a module", lambda _, f=f: f(nn.Linear(2, 3)), "must be a tensor .*got Linear")
    bad(quantize, "complex", lambda _, f=f: f(ones(2, 64) + 0j), "float16, bfloat16 or float32, got torch.complex64")
    bad(quantize, "booleans", lambda _, f=f: f(ones(2, 64) > 0), "got torch.bool")
    bad(quantize, "no columns", lambda _, f=f: f(ones(2, 0)), r"both positive, got \(2, 0\)")

for kind in ("int4", None, 4, ["nf4"]):
    bad(
        "quantize_4bit", f"type {kind!r}", lambda _, kind=kind: vf.quantize_4bit(ones(2, 64), kind),
        f"quant_type must be 'nf4' or 'fp4', got {re.escape(repr(kind))}",
    )  # fmt: skip

for size in (0, -64, 63, 64.0, None, "64", [64]):
    bad(
        "quantize_4bit", f"blocksize {size!r}", lambda _, size=size: vf.quantize_4bit(ones(2, 64), "nf4", size),
        "blocksize must be one of .32, 64",
    )  # fmt: skip

for dtype in (torch.int64, torch.bool, torch.complex64, "uint8", None):
    bad(
        "quantize_4bit", f"storage {dtype}", lambda _, dtype=dtype: vf.quantize_4bit(ones(2, 64), quant_storage=dtype),
        "quant_storage must be one of",
    )  # fmt: skip

for dtype in (torch.complex64, torch.float8_e4m3fn, "bfloat16"):
    bad(
        "quantize_4bit", f"computing in {dtype}",
        lambda _, dtype=dtype: vf.quantize_4bit(ones(2, 64), compute_dtype=dtype), "compute_dtype must be None or one",
    )  # fmt: skip

bad("quantize_8bit", "an infinite threshold", lambda _: vf.quantize_8bit(ones(2, 64), threshold=INF), "got inf")

for dtype in (torch.int8, torch.bool, torch.complex64, "float32"):
    bad("dequantize", f"to {dtype}", lambda _, d=dtype: vf.dequantize(Q4, d), "dtype must be a floating-point dtype")

bad("dequantize", "a dense weight", lambda _: vf.dequantize(X), "q must be a Quantized4bit or Quantized8bit, .*Tensor")
bad("dequantize", "None", lambda _: vf.dequantize(None), "q must be a Quantized4bit .* got NoneType")

# A value made by hand: the kernels would read past the end of these.
LIES = {
    "a larger shape": (Q4, {"shape": (64, 64)}, r"packs into 2048"),
    "too few scales": (
        Q4,
        {"absmax": Q4.absmax[:2]},
        r"absmax must have shape \(32,\) and dtype torch.float32, got \(2,\)",
    ),
    "smaller blocks": (Q4, {"blocksize": 32}, r"absmax must have shape \(64,\)"),
    "too few nested scales": (
        Q4_NESTED,
        {"nested": Q4_NESTED.nested._replace(scale=ones(0))},
        r"nested.scale must have shape \(1,\)",
    ),
    "one scale for all rows": (Q8, {"scale": ones(1)}, r"scale must have shape \(32,\)"),
    "codes of another shape": (Q8, {"codes": Q8.codes.T}, r"codes must have shape \(32, 64\)"),
}

bad("validate", "a tensor", lambda _: vf.validate(X), "got Tensor")

for what, (q, change, message) in LIES.items():
    lying = dataclasses.replace(q, **change)
    bad("dequantize", what, lambda _, q=lying: vf.dequantize(q), message)
    bad("quantized_linear", what, lambda _, q=lying: vf.quantized_linear(q, ones(2, q.shape[1])), message)
    bad("to_bnb", what, lambda _, q=lying: vf.to_bnb(q), message)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)


# Files


@pytest.mark.parametrize("q", [Q4, Q4_NESTED, Q8, FORMATS["bf16 storage"](normal(32, 64))], ids=repr)
def test_a_value_is_safe_to_load(q, tmp_path):
    torch.save({"q": q}, tmp_path / "file")
    (read, spec), (leaves, right) = (
        flatten(each) for each in (torch.load(tmp_path / "file", weights_only=True)["q"], q)
    )
    assert spec == right
    assert all(torch.equal(one, other) for one, other in zip(read, leaves, strict=True))


def test_a_new_process_reads_it_as_well(tmp_path):
    torch.save(Q4_NESTED, tmp_path / "file")
    code = f"import torch, vera_func; print(torch.load({str(tmp_path / 'file')!r}, weights_only=True))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == (repr(Q4_NESTED), "")

"""Quantized weights: bitsandbytes' bytes, the formula, every state of a module, and a product that is linear in x."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn
from torch.func import grad, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import vera_func as vf
from vera_func import private
from vera_func.quant.value import BLOCKSIZES, validate

from helpers import FORMATS, llama, quantized, randomized, relative_error, repack


# A single value; one row; primes; no whole byte; rows that are no whole blocks; more than 256 blocks.
SHAPES = [(1, 1), (1, 64), (5, 1), (13, 37), (32, 64), (33, 96), (97, 101)]
# Rows that are no whole blocks of some size; and a width of a Llama for which bitsandbytes is off by half.
STRADDLING = [(32, 64), (33, 96), (64, 160), (6, 48), (40, 144), (3, 16), (7, 2064)]
OPTIONS = list(product(["nf4", "fp4"], BLOCKSIZES[:2] + BLOCKSIZES[-1:], [False, True]))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(q):
    """The oracle: `code[index] * absmax` in float64, for every value; slow and obvious."""
    if isinstance(q, vf.Quantized8bit):
        return q.codes.double() * q.scale.double()[:, None] / 127
    count = q.shape[0] * q.shape[1]
    packed = q.packed.reshape(-1).view(torch.uint8).long()
    indices = torch.stack([packed // 16, packed % 16], 1).reshape(-1)[:count]
    absmax = q.absmax.double()
    if q.nested is not None:
        scale = q.nested.scale.double().repeat_interleave(256)[: absmax.numel()]
        absmax = q.nested.code.double()[q.absmax.long()] * scale + q.nested.offset.double()
    code = functional.get_4bit_type(q.quant_type, device="cpu").double()
    return (code[indices] * absmax.repeat_interleave(q.blocksize)[:count]).reshape(q.shape)


def rounded(q):
    """What is left of a 4-bit weight after bitsandbytes rounded its statistics to bfloat16."""
    absmax = q.absmax
    if q.nested is not None:
        state = functional.QuantState(absmax=q.nested.scale, code=q.nested.code, blocksize=256, dtype=torch.float32)
        absmax = functional.dequantize_blockwise(q.absmax, state) + q.nested.offset
    return dataclasses.replace(q, absmax=absmax.bfloat16().float(), nested=None)


def assert_same(actual, expected):
    """Equal in every bit and in all metadata."""
    leaves, spec = tree_flatten(actual)
    expected_leaves, expected_spec = tree_flatten(expected)
    assert spec == expected_spec
    for leaf, other in zip(leaves, expected_leaves, strict=True):
        assert leaf.dtype == other.dtype
        assert torch.equal(leaf, other)


def contents(module):
    """Everything that a bitsandbytes module holds, down to the attributes of its weight and states."""
    found = {}

    def visit(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = (id(value), value.data_ptr(), value.dtype, value.shape, value.detach().clone())
        elif not isinstance(value, nn.Module):
            found[name] = (id(value), repr(value))
        if isinstance(value, torch.Tensor | functional.QuantState | bnb.MatmulLtState):
            for key, inner in vars(value).items():
                visit(f"{name}.{key}", inner)

    for key, value in {**vars(module), **module._parameters}.items():
        visit(key, value)
    return found


def assert_unchanged(module, before):
    after = contents(module)
    assert after.keys() == before.keys()
    for name, (*identity, value) in before.items():
        *still, now = after[name]
        assert still == identity, name
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value, name


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
        ops, given = private.bnb_ops(), []

        def dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype):
            given.append(shape)
            return ops.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)

        q = vf.quantize_4bit(normal(*shape), blocksize=blocksize)
        monkeypatch.setattr(private, "bnb_ops", lambda: SimpleNamespace(dequantize_4bit=dequantize_4bit))
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
        assert vf.dequantize(q).dtype == default
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


class TestModules:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), OPTIONS)
    def test_round_trip(self, quant_type, blocksize, double_quant, shape):
        q = vf.quantize_4bit(normal(*shape), quant_type, blocksize, double_quant)
        back, bias = vf.from_bnb(vf.to_bnb(q))
        assert_same(back, q)
        assert bias is None

    @pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
    def test_round_trip_of_storage_and_compute_dtype(self, storage, compute_dtype):
        weight = normal(32, 64, dtype=torch.float16)
        q = vf.quantize_4bit(weight, double_quant=True, quant_storage=storage, compute_dtype=compute_dtype)
        back, bias = vf.from_bnb(vf.to_bnb(q, normal(32)))
        assert torch.equal(back.packed.view(torch.uint8), q.packed.view(torch.uint8))
        as_bytes = partial(dataclasses.replace, packed=q.packed.view(torch.uint8))
        assert_same(as_bytes(back), as_bytes(q))
        assert back.packed.dtype == storage
        assert torch.equal(bias, normal(32))

    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    def test_round_trip_of_8_bits(self, threshold):
        q = vf.quantize_8bit(normal(13, 37), threshold=threshold)
        back, bias = vf.from_bnb(vf.to_bnb(q, normal(13)))
        assert_same(back, q)
        assert torch.equal(bias, normal(13))

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    def test_made_modules_are_set_up_like_others(self, storage, double_quant, quant_type):
        options = {"compress_statistics": double_quant, "quant_type": quant_type, "quant_storage": storage}
        other = bnb.nn.Linear4bit(64, 32, False, compute_dtype=torch.float16, **options).to("cpu")
        made = vf.to_bnb(vf.from_bnb(other)[0])
        for name in ("blocksize", "bnb_quantized", "requires_grad", *options):
            assert getattr(made.weight, name) == getattr(other.weight, name)
        assert (made.quant_storage, made.compute_dtype) == (storage, torch.float16)
        assert made.quant_state is made.weight.quant_state
        assert made.weight.module is made
        assert made.quant_state.as_dict().keys() == other.quant_state.as_dict().keys()
        assert torch.equal(made.quant_state.code, other.quant_state.code)

    def test_made_8_bit_modules_are_set_up_like_others(self):
        other = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        made = vf.to_bnb(*vf.from_bnb(other))
        for name in ("has_fp16_weights", "requires_grad"):
            assert getattr(made.weight, name) == getattr(other.weight, name)
        assert vars(made.state).keys() == vars(other.state).keys()
        assert made.state.has_fp16_weights is other.state.has_fp16_weights is False
        assert not made.bias.requires_grad

    @pytest.mark.parametrize("name", FORMATS)
    def test_made_modules_share_nothing(self, name):
        q = FORMATS[name](normal(64, 96))
        bias = normal(64)
        before = copy.deepcopy((q, bias))
        module = vf.to_bnb(q, bias)
        for value in contents(module).values():
            if len(value) > 2 and value[1]:
                assert all(value[1] != leaf.data_ptr() for leaf in (*tree_leaves(q), bias))
        for parameter in module.parameters():
            parameter.data.zero_()
        assert_same((q, bias), before)

    @pytest.mark.parametrize("name", FORMATS)
    def test_made_modules_work_in_bitsandbytes(self, name):
        # Rows of whole blocks: bitsandbytes' own product is wrong for others on CPUs with AVX512.
        q, bias, x = FORMATS[name](normal(64, 128)), normal(64), normal(3, 128, seed=1)
        module = vf.to_bnb(q, bias).train()
        expected = nn.functional.linear(x, vf.dequantize(q), bias)
        assert relative_error(module(x), expected) < 1e-5
        assert relative_error(vf.quantized_linear(q, x, bias), expected) < 1e-6


# Ways in which a module comes to be read: after what, from a fresh module, and an input.
STATES = {
    "fresh": lambda module, x: None,
    "training forward": lambda module, x: module.train()(x),
    "training forward and backward": lambda module, x: module.train()(x.clone().requires_grad_()).sum().backward(),
    "eval forward": lambda module, x: module.eval()(x),
    "eval forward, then training": lambda module, x: (module.eval()(x), module.train()(x)),
}


class TestFromBnb:
    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("name", FORMATS)
    def test_reads_every_state_and_changes_nothing(self, name, state):
        q, x = FORMATS[name](normal(64, 128)), normal(5, 128, seed=1)
        module = vf.to_bnb(q, normal(64, seed=2))
        STATES[state](module, x)
        before = contents(module)
        read, bias = vf.from_bnb(module)
        assert_unchanged(module, before)
        assert torch.equal(bias, normal(64, seed=2))
        # On some CPUs, an eval forward repacks.
        repacked = name != "int8" and getattr(module.weight.quant_state, "packing_format_for_cpu", False)
        assert read.packed.dtype == q.packed.dtype if name != "int8" else read.threshold == q.threshold
        assert torch.equal(vf.dequantize(read), vf.dequantize(rounded(q) if repacked else q))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_reads_repacked(self, quant_type, double_quant, storage, dtype):
        weight = normal(96, 128, dtype=dtype)
        q = vf.quantize_4bit(weight, quant_type, double_quant=double_quant, quant_storage=storage)
        module = repack(vf.to_bnb(q, normal(96)))
        before = contents(module)
        read, bias = vf.from_bnb(module)
        assert_unchanged(module, before)
        assert (read.dtype, read.packed.dtype, read.packed.shape) == (dtype, storage, q.packed.shape)
        assert torch.equal(read.packed.view(torch.uint8), q.packed.view(torch.uint8))
        assert torch.equal(read.absmax, rounded(q).absmax)
        assert torch.equal(vf.dequantize(read), vf.dequantize(rounded(q)))
        assert relative_error(vf.dequantize(read).float(), vf.dequantize(q).float()) < 2**-8
        assert torch.equal(bias, normal(96))

    @pytest.mark.parametrize("name", ["nf4", "fp4", "nested", "bf16 storage"])
    def test_reads_repacked_after_its_state_dict(self, name):
        # state_dict() unpacks the weight, and leaves the statistics transposed or, if nested, quantized once more.
        q = FORMATS[name](normal(96, 128))
        module = repack(vf.to_bnb(q))
        module.state_dict()
        before = contents(module)
        read, _ = vf.from_bnb(module)
        assert_unchanged(module, before)
        assert torch.equal(read.packed.view(torch.uint8), q.packed.view(torch.uint8))
        assert relative_error(vf.dequantize(read), vf.dequantize(q)) < 2**-7

    @pytest.mark.parametrize("shape", [(48, 128), (32, 96)])
    def test_reads_what_repacking_could_not_finish(self, shape):
        # Rows that are not a multiple of 32, or no whole blocks: bitsandbytes raises in the middle.
        q = vf.quantize_4bit(normal(*shape), double_quant=True)
        module = vf.to_bnb(q)
        with pytest.raises((AssertionError, RuntimeError)):
            repack(module)
        assert torch.equal(vf.dequantize(vf.from_bnb(module)[0]), vf.dequantize(q))

    @pytest.mark.parametrize("blocksize", [32, 64, 128])
    def test_reads_repacked_with_any_blocksize(self, blocksize):
        q = vf.quantize_4bit(normal(32, 128), blocksize=blocksize)
        assert_same(vf.from_bnb(repack(vf.to_bnb(q)))[0], rounded(q))

    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_reads_unquantized(self, quant_type, compress):
        weight, bias = normal(32, 64, dtype=torch.bfloat16), normal(32)
        module = bnb.nn.Linear4bit(
            64, 32, quant_type=quant_type, compress_statistics=compress, quant_storage=torch.bfloat16,
            compute_dtype=torch.bfloat16,
        )  # fmt: skip
        module.weight.data, module.bias.data = weight.clone(), bias.clone()
        before = contents(module)
        q, read_bias = vf.from_bnb(module)
        assert_unchanged(module, before)
        assert not read_bias.requires_grad
        assert torch.equal(read_bias, bias)
        moved = vf.from_bnb(module.to("cpu"))[0]
        assert q.compute_dtype == torch.bfloat16
        assert torch.equal(q.packed.view(torch.uint8), moved.packed.view(torch.uint8))
        assert torch.equal(vf.dequantize(q), vf.dequantize(moved))
        assert (q.nested is not None) == compress

    @pytest.mark.parametrize("has_fp16_weights", [False, True])
    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    def test_reads_unquantized_8_bits(self, threshold, has_fp16_weights):
        module = bnb.nn.Linear8bitLt(37, 13, has_fp16_weights=has_fp16_weights, threshold=threshold)
        module.weight.data = normal(13, 37)
        before = contents(module)
        q, _ = vf.from_bnb(module)
        assert_unchanged(module, before)
        assert_same(q, vf.quantize_8bit(normal(13, 37), threshold=threshold))

    @pytest.mark.parametrize("threshold", [0.0, 1.0])
    def test_reads_8_bits_whose_statistics_moved(self, threshold):
        q = vf.quantize_8bit(normal(64, 128), threshold=threshold)
        module = vf.to_bnb(q).train()
        module(normal(5, 128))
        assert module.weight.SCB is None  # they are in module.state now
        assert_same(vf.from_bnb(module)[0], q)
        module.eval()(normal(5, 128))
        assert_same(vf.from_bnb(module)[0], q)

    @pytest.mark.parametrize("as_parameter", [False, True])
    def test_reads_a_state_that_only_the_module_has(self, as_parameter):
        # FSDP replaces the parameter, and with it what hung on it.
        q = vf.quantize_4bit(normal(32, 64), double_quant=True)
        module = vf.to_bnb(q)
        if as_parameter:
            module.weight = nn.Parameter(module.weight.data, requires_grad=False)
        else:
            module.weight.quant_state = None
        before = contents(module)
        assert_same(vf.from_bnb(module)[0], q)
        assert_unchanged(module, before)

    def test_reads_deep_copies_and_pickles(self, tmp_path):
        for name, quantize in FORMATS.items():
            q = quantize(normal(64, 128))
            copied = copy.deepcopy(vf.to_bnb(q))
            assert torch.equal(vf.dequantize(vf.from_bnb(copied)[0]), vf.dequantize(q)), name

    def test_refuses_others(self):
        with pytest.raises(ValueError, match="got Linear"):
            vf.from_bnb(nn.Linear(2, 3))
        module = vf.to_bnb(vf.quantize_8bit(normal(13, 37)))
        module.weight.SCB = None
        with pytest.raises(ValueError, match="SCB"):
            vf.from_bnb(module)
        module = vf.to_bnb(vf.quantize_4bit(normal(32, 64)))
        module.weight.quant_state.absmax = torch.ones(5)
        with pytest.raises(ValueError, match=r"absmax must be \(32,\)"):
            vf.from_bnb(module)

    @pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_computes_as_the_module_trains(self, dtype, compute_dtype):
        module = vf.to_bnb(vf.quantize_4bit(normal(64, 128), compute_dtype=compute_dtype), normal(64)).train()
        x = normal(5, 128, dtype=dtype)
        q, bias = vf.from_bnb(module)
        actual = vf.quantized_linear(q, x, bias.clone())
        expected = module(x)
        assert actual.dtype == expected.dtype == dtype
        coarsest = max(torch.finfo(d).eps for d in (dtype, compute_dtype or dtype))
        assert relative_error(actual.float(), expected.float()) <= max(2 * coarsest, 1e-6)
        # As far from the exact product as the compute dtype makes it, and no nearer.
        error = relative_error(actual.double(), nn.functional.linear(x.double(), formula(q), bias.double()))
        assert error > coarsest / 16

    @pytest.mark.parametrize("name", ["nf4", "nested", "bf16 storage"])
    def test_gradients_of_a_repacked_model_equal_a_fresh_ones(self, name):
        ids = torch.randint(0, 67, (2, 7), generator=torch.Generator().manual_seed(0))
        config = vf.VeraConfig(r=8, target_modules=["q_proj", "v_proj"])

        def gradient(model):
            apply, params, frozen, _ = vf.adapt(model, config)
            return grad(lambda p: apply(p, frozen, input_ids=ids).logits.square().sum())(randomized(params))

        fresh = gradient(quantized(llama(), name))
        used = quantized(llama(), name)
        used.eval()(input_ids=ids)
        repacked, coarse = quantized(llama(), name), quantized(llama(), name)
        for path, module in list(coarse.named_modules()):
            if isinstance(module, bnb.nn.Linear4bit):
                repack(repacked.get_submodule(path))
                parent, _, child = path.rpartition(".")
                setattr(coarse.get_submodule(parent), child, vf.to_bnb(rounded(vf.from_bnb(module)[0])))
        expected = gradient(coarse)
        for actual in (gradient(used), gradient(repacked)):
            for key, value in fresh.items():
                assert relative_error(actual[key], value) < 0.02, key
        for key, value in gradient(repacked).items():
            assert torch.equal(value, expected[key]), key


class Products(TorchDispatchMode):
    """Remembers the large floating-point tensors that operations make, without keeping them alive."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() >= self.size:
                self.made.append(StorageWeakRef(leaf.untyped_storage()))
        return out

    def alive(self):
        return [ref for ref in self.made if not ref.expired()]


class TestSavedForBackward:
    SIZE = 1024 * 1024
    CASES = pytest.mark.parametrize("name", FORMATS)

    @CASES
    def test_nothing_dense_is_saved(self, name):
        q, saved = FORMATS[name](normal(1024, 1024)), []
        x, bias = normal(2, 1024).requires_grad_(), normal(1024).requires_grad_()

        def keep(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = vf.quantized_linear(q, x, bias)
        assert saved
        on_node = [leaf for value in vars(y.grad_fn).values() for leaf in tree_leaves(value)]
        for tensor in (*saved, *(leaf for leaf in on_node if isinstance(leaf, torch.Tensor))):
            # Bytes of a bfloat16 storage are no dense weight: there are a quarter as many.
            assert not (tensor.is_floating_point() and tensor.numel() >= self.SIZE)
            assert any(tensor.data_ptr() == leaf.data_ptr() for leaf in tree_leaves(q))

    @pytest.mark.parametrize("transform", ["autograd", "vjp", "vmap of vjp", "jvp of vjp"])
    @CASES
    def test_no_dense_weight_stays_alive(self, name, transform):
        q, x = FORMATS[name](normal(1024, 1024)), normal(2, 1024)

        def alive(f):
            if transform == "autograd":
                with Products(self.SIZE) as products:
                    y = f(x.clone().requires_grad_())
            else:
                with Products(self.SIZE) as products:
                    mapped = vmap(f) if transform == "vmap of vjp" else f
                    y = torch.func.vjp(mapped, x)
                    if transform == "jvp of vjp":
                        y = (y, jvp(lambda x: torch.func.vjp(f, x)[1](x), (x,), (x,)))
            assert products.made
            return len(products.alive()) if y is not None else 0

        assert alive(partial(vf.quantized_linear, q)) == 0
        # The measure sees it where it is kept.
        assert alive(lambda x: nn.functional.linear(x, vf.dequantize(q))) > 0

    def test_a_model_keeps_no_dense_weight(self):
        model = quantized(llama(hidden_size=64, intermediate_size=128), "nf4")
        for layer in model.model.layers:
            layer.mlp.down_proj = vf.to_bnb(vf.quantize_4bit(normal(64, 128)))
        apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        leaves = {key: value.requires_grad_() for key, value in randomized(params).items()}
        shapes = {(64, 128), (128, 64)}  # of no activation: there are 2 x 3 tokens
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            apply(leaves, frozen, input_ids=torch.ones(2, 3, dtype=torch.long)).logits.sum().backward()
        assert saved
        assert not [t for t in saved if tuple(t.shape) in shapes]


class TestInt8Activations:
    @pytest.mark.parametrize("threshold", [0.0, 3.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("batch", [(5,), (2, 3)], ids=str)
    def test_equal_the_module_in_eval_mode(self, batch, dtype, threshold):
        q = vf.quantize_8bit(normal(64, 96), threshold=threshold)
        x = normal(*batch, 96, seed=1, dtype=dtype)
        x[..., 7] *= 20
        bias = normal(64, dtype=dtype)
        expected = vf.to_bnb(q, bias).eval()(x)
        actual = vf.quantized_linear(q, x, bias, int8_activations=True)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
        # It is another product than the exact one, and the threshold brings it nearer.
        error = relative_error(actual.float(), vf.quantized_linear(q, x, bias).float())
        assert 1e-4 < error < (0.03 if threshold == 0 else 0.01)

    @pytest.mark.parametrize("threshold", [0.0, 3.0])
    def test_derivatives_are_the_exact_products(self, threshold):
        q = vf.quantize_8bit(normal(13, 32), threshold=threshold)
        x, bias = normal(3, 32, seed=1), normal(13)
        exact = lambda x, b: vf.quantized_linear(q, x, b)
        straight = lambda x, b: vf.quantized_linear(q, x, b, int8_activations=True)
        w = normal(3, 13, seed=2)
        for argnums in (0, 1):
            expected = grad(lambda *a: (exact(*a) * w).sum(), argnums)(x, bias)
            assert_close(grad(lambda *a: (straight(*a) * w).sum(), argnums)(x, bias), expected)
        tangents = (normal(3, 32, seed=3), normal(13, seed=4))
        assert_close(jvp(straight, (x, bias), tangents)[1], jvp(exact, (x, bias), tangents)[1])
        for f in (straight, exact):
            assert torch.equal(jvp(lambda b, f=f: f(x, b), (bias,), tangents[1:])[1], tangents[1].expand(3, 13))
        leaf = x.clone().requires_grad_()
        (straight(leaf, bias) * w).sum().backward()
        assert_close(leaf.grad, grad(lambda x: (exact(x, bias) * w).sum())(x))

    def test_vmap_is_a_loop(self):
        q = vf.quantize_8bit(normal(13, 32), threshold=2.0)
        xs, biases = normal(4, 3, 32, seed=1), normal(4, 13, seed=2)
        f = lambda x, b: vf.quantized_linear(q, x, b, int8_activations=True)
        assert torch.equal(vmap(f)(xs, biases), torch.stack([f(x, b) for x, b in zip(xs, biases, strict=True)]))
        assert torch.equal(vmap(f, (1, None))(xs.movedim(0, 1), biases[0]), torch.stack([f(x, biases[0]) for x in xs]))
        gradients = vmap(grad(lambda x, b: f(x, b).square().sum()))(xs, biases)
        for i, (x, b) in enumerate(zip(xs, biases, strict=True)):
            assert_close(gradients[i], grad(lambda x, b: f(x, b).square().sum())(x, b))

    def test_needs_8_bits(self):
        with pytest.raises(ValueError, match="4 bits"):
            vf.quantized_linear(vf.quantize_4bit(normal(3, 64)), normal(64), int8_activations=True)


def scaled(q, factor):
    """The weight with its statistics as a function of something."""
    if isinstance(q, vf.Quantized8bit):
        return dataclasses.replace(q, scale=q.scale * factor)
    if q.nested is not None:
        return dataclasses.replace(q, nested=q.nested._replace(scale=q.nested.scale * factor))
    return dataclasses.replace(q, absmax=q.absmax * factor)


PRODUCTS = {
    "product": lambda q, x: vf.quantized_linear(q, x),
    "int8 product": lambda q, x: vf.quantized_linear(q, x, int8_activations=True),
}


class TestConstants:
    CASES = pytest.mark.parametrize(("name", "f"), [*product(FORMATS, ["product"]), ("int8", "int8 product")])

    @CASES
    def test_the_weight_cannot_be_differentiated(self, name, f):
        q, x, one = FORMATS[name](normal(13, 64)), normal(3, 64, seed=1), torch.ones(())
        g = lambda factor: PRODUCTS[f](scaled(q, factor), x).sum()
        with pytest.raises(ValueError, match="a quantized weight is a constant"):
            grad(g)(one)
        with pytest.raises(ValueError, match="a quantized weight is a constant"):
            jvp(g, (one,), (one,))
        with pytest.raises(ValueError, match="a quantized weight is a constant"):
            g(one.clone().requires_grad_()).backward()
        with pytest.raises(ValueError, match="a quantized weight is a constant"):
            grad(lambda x: jvp(lambda x: PRODUCTS[f](scaled(q, x.sum()), x).sum(), (x,), (x,))[1])(x)

    @pytest.mark.parametrize("name", ["nf4", "nested"])
    def test_not_differentiated_when_compiled(self, name):
        """Also where the statistics are the argument itself, whose derivative Dynamo does not see."""
        q, x = FORMATS[name](normal(13, 64)), normal(3, 64, seed=1)
        leaf = q.absmax if q.nested is None else q.nested.scale

        def put(leaf):
            if q.nested is None:
                return dataclasses.replace(q, absmax=leaf)
            return dataclasses.replace(q, nested=q.nested._replace(scale=leaf))

        for f in (lambda leaf: vf.quantized_linear(put(leaf), x), lambda leaf: vf.dequantize(put(leaf))):
            compiled = torch.compile(grad(lambda leaf, f=f: f(leaf).sum()), fullgraph=True, backend="aot_eager")
            with pytest.raises(torch._dynamo.exc.Unsupported, match="a quantized weight is a constant"):
                compiled(leaf)

    @CASES
    def test_the_weight_cannot_be_mapped_over(self, name, f):
        q, x = FORMATS[name](normal(13, 64)), normal(3, 64, seed=1)
        stacked = tree_map(lambda *leaves: torch.stack(leaves), q, q)
        for dims, inputs in (((0, None), x), ((0, 0), torch.stack([x, x]))):
            with pytest.raises(ValueError, match="can't be mapped over"):
                vmap(PRODUCTS[f], dims)(stacked, inputs)
            with pytest.raises(ValueError, match="can't be mapped over"):
                vmap(grad(lambda q, x: PRODUCTS[f](q, x).sum(), 1), dims)(stacked, inputs)

    @pytest.mark.parametrize("name", FORMATS)
    def test_dequantizing_is_not_differentiated_to_zero(self, name):
        q, one = FORMATS[name](normal(13, 64)), torch.ones(())
        g = lambda factor: vf.dequantize(scaled(q, factor)).square().sum()
        if name == "int8":  # ordinary arithmetic, with ordinary derivatives
            expected = 2 * vf.dequantize(q).square().sum()
            assert_close(grad(g)(one), expected)
            assert_close(jvp(g, (one,), (one,))[1], expected)
            return
        for derivative in (grad(g), lambda one: jvp(g, (one,), (one,)), lambda one: g(one.clone().requires_grad_())):
            with pytest.raises(ValueError, match="a quantized weight is a constant"):
                derivative(one)

    @CASES
    def test_may_be_an_argument(self, name, f):
        q, xs = FORMATS[name](normal(13, 64)), normal(4, 3, 64, seed=1)
        g = lambda q, x: PRODUCTS[f](q, x).square().sum()
        outputs = torch.stack([g(q, x) for x in xs])
        gradients = torch.stack([grad(partial(g, q))(x) for x in xs])
        close = partial(assert_close, rtol=1e-5, atol=1e-3)  # of gradients of about 100
        close(grad(g, argnums=1)(q, xs[0]), gradients[0])
        close(vmap(g, (None, 0))(q, xs), outputs)
        close(vmap(grad(g, argnums=1), (None, 0))(q, xs), gradients)
        close(grad(lambda q, x: vmap(g, (None, 0))(q, x).sum(), 1)(q, xs), gradients)
        close(jvp(lambda x: g(q, x), (xs[0],), (xs[1],))[1], (gradients[0] * xs[1]).sum())

    @pytest.mark.parametrize("name", FORMATS)
    def test_are_pytrees(self, name):
        q = FORMATS[name](normal(13, 64, dtype=torch.bfloat16))
        if name == "nf4":
            q = dataclasses.replace(q, compute_dtype=torch.float16)
        leaves, spec = tree_flatten(q)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert len(leaves) == {"int8": 2, "nested": 5}.get(name, 2)
        again = tree_unflatten(leaves, spec)
        assert all(a is b for a, b in zip(tree_leaves(again), leaves, strict=True))
        mapped = tree_map(torch.clone, q)
        for field in dataclasses.fields(q):
            value = getattr(q, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(mapped, field.name).view(torch.uint8), value.view(torch.uint8))
            elif field.name != "nested":
                assert getattr(mapped, field.name) == getattr(again, field.name) == value
        assert type(mapped.nested if name != "int8" else None) is type(q.nested if name != "int8" else None)
        # Metadata is part of the structure: unlike values are unlike trees.
        changed = {"threshold": 1.0} if name == "int8" else {"blocksize": 128}
        assert tree_flatten(dataclasses.replace(q, **changed))[1] != spec

    def test_is_immutable(self):
        for quantize in FORMATS.values():
            with pytest.raises(dataclasses.FrozenInstanceError):
                quantize(normal(13, 64)).shape = (1, 2)


NF4 = vf.quantize_4bit(normal(13, 37))
NESTED = vf.quantize_4bit(normal(97, 101), blocksize=32, double_quant=True)
INT8 = vf.quantize_8bit(normal(13, 37))
INVALID = {
    "transposed codes": (INT8, {"codes": INT8.codes.t()}, r"codes must be \(13, 37\)"),
    "codes of another dtype": (INT8, {"codes": INT8.codes.int()}, r"int8, got .* torch.int32"),
    "a scale for each column": (INT8, {"scale": torch.ones(37)}, r"scale must be \(13,\)"),
    "scale in half precision": (INT8, {"scale": INT8.scale.half()}, "torch.float16"),
    "no rows": (INT8, {"shape": (0, 37)}, "both positive"),
    "no columns": (INT8, {"shape": (13, 0)}, "both positive"),
    "a byte too few": (NF4, {"packed": NF4.packed[1:]}, r"holds 240 bytes, .* \(13, 37\) packs into 241"),
    "bytes in another storage": (NF4, {"packed": NF4.packed.int()}, "bytes"),
    "another shape": (NF4, {"shape": (13, 38)}, "packs into 247"),
    "a block too many": (NF4, {"absmax": torch.ones(9)}, r"absmax must be \(8,\)"),
    "repacked statistics": (NF4, {"absmax": NF4.absmax[None]}, r"absmax must be \(8,\)"),
    "absmax in bfloat16": (NF4, {"absmax": NF4.absmax.bfloat16()}, "bfloat16"),
    "nested absmax not nested": (NF4, {"nested": NESTED.nested}, "uint8"),
    "a blocksize that is none": (NF4, {"blocksize": 100}, "blocksize must be one of"),
    "another blocksize": (NF4, {"blocksize": 128}, r"absmax must be \(4,\)"),
    "another type": (NF4, {"quant_type": "int4"}, "'nf4' or 'fp4', got 'int4'"),
    "computing in integers": (NF4, {"compute_dtype": torch.int8}, "compute_dtype"),
    "a weight of integers": (NF4, {"dtype": torch.int8}, "dtype must be one of"),
    "nested scale": (NESTED, {"nested": NESTED.nested._replace(scale=torch.ones(1))}, r"nested.scale must be \(2,\)"),
    "nested code": (NESTED, {"nested": NESTED.nested._replace(code=torch.ones(16))}, r"nested.code must be \(256,\)"),
    "nested offset": (NESTED, {"nested": NESTED.nested._replace(offset=torch.ones(1))}, r"nested.offset must be \(\)"),
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
    "x of another size": (lambda: vf.quantized_linear(NF4, normal(3, 13)), r"x \(3, 13\) must end in .* 37"),
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


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_any_batch(name, batch):
    q = FORMATS[name](normal(64, 96))
    x = normal(*batch, 96, seed=1)
    expected = nn.functional.linear(x, vf.dequantize(q), normal(64))
    actual = vf.quantized_linear(q, x, normal(64))
    assert actual.shape == expected.shape
    assert_close(actual, expected)


@pytest.mark.parametrize("batch", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize(("x_dim", "bias_dim"), [(None, 0), (None, 1), (0, 0), (-1, 0), (0, 1)])
def test_biases_may_be_mapped_over(x_dim, bias_dim, batch):
    q, biases = FORMATS["nf4"](normal(64, 96)), normal(4, 64)
    x = normal(*(() if x_dim is None else (4,)), *batch, 96, seed=1)
    actual = vmap(lambda x, b: vf.quantized_linear(q, x, b), (x_dim, bias_dim))(
        x if x_dim is None else x.movedim(0, x_dim), biases.movedim(0, bias_dim)
    )
    for i in range(4):
        one = x if x_dim is None else x[i]
        assert_close(actual[i], nn.functional.linear(one, vf.dequantize(q), biases[i]))


@pytest.mark.parametrize("name", FORMATS)
def test_threads_share_one_weight(name):
    q = FORMATS[name](normal(64, 96))
    before = copy.deepcopy(q)
    xs = [normal(3, 96, seed=seed) for seed in range(16)]
    f = lambda x: grad(lambda x: vf.quantized_linear(q, x).square().sum())(x)
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(f, xs))
    for x, gradient in zip(xs, actual, strict=True):
        assert_close(gradient, f(x))
    assert torch.equal(vf.dequantize(q), vf.dequantize(before))

"""Modules of bitsandbytes as values and back: every state in which a module may come, and nothing changed in it."""

import copy
import dataclasses
import pickle
from functools import partial
from itertools import product

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn
from torch.func import grad
from torch.utils._pytree import tree_leaves

import vera_func as vf

from helpers import FORMATS, llama, normal, quantized, randomized, relative_error, repack
from refused import Q4, Q8, Refused, X
from weights import OPTIONS, SHAPES, assert_same, formula


def rounded(q):
    """What is left of a 4-bit weight after bitsandbytes rounded its statistics to bfloat16."""
    absmax = q.absmax
    if q.nested is not None:
        state = functional.QuantState(absmax=q.nested.scale, code=q.nested.code, blocksize=256, dtype=torch.float32)
        absmax = functional.dequantize_blockwise(q.absmax, state) + q.nested.offset
    return dataclasses.replace(q, absmax=absmax.bfloat16().float(), nested=None)


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

    @pytest.mark.parametrize("steps", list(product(["pickle", "copy", "train", "eval"], repeat=3)), ids=" ".join)
    def test_an_8bit_layer_after_many_lives(self, steps):
        q = vf.quantize_8bit(normal(32, 64))
        module, pickled, ran, lost = vf.to_bnb(q), False, False, False
        for step in steps:
            if step == "pickle":
                module, pickled = pickle.loads(pickle.dumps(module)), True
            elif step == "copy":
                # An unpickled weight is an ordinary parameter, whose copy has no attributes; after a run the module has
                # what they held.
                module, lost = copy.deepcopy(module), lost or (pickled and not ran)
            elif not lost:  # bitsandbytes' own layer no longer runs then
                module.train(step == "train")(normal(3, 64, dtype=torch.float16))
                ran = True
        if lost:
            with pytest.raises(ValueError, match=r"no row scales \(SCB\).*unpickle the layer a second time"):
                vf.from_bnb(module)
        else:
            assert_same(vf.from_bnb(module)[0], q)

    def test_refuses_others(self):
        with pytest.raises(ValueError, match="got Linear"):
            vf.from_bnb(nn.Linear(2, 3))
        module = vf.to_bnb(vf.quantize_8bit(normal(13, 37)))
        module.weight.SCB = None
        with pytest.raises(ValueError, match="SCB"):
            vf.from_bnb(module)
        module = vf.to_bnb(vf.quantize_4bit(normal(32, 64)))
        module.weight.quant_state.absmax = torch.ones(5)
        with pytest.raises(ValueError, match=r"absmax must have shape \(32,\)"):
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


# What is refused

bad = Refused()

bad("to_bnb", "a dense weight", lambda _: vf.to_bnb(X), "q must be a Quantized4bit or Quantized8bit")
bad("from_bnb", "a plain layer", lambda _: vf.from_bnb(nn.Linear(2, 3)), "must be bitsandbytes' .*, got Linear")
bad("from_bnb", "None", lambda _: vf.from_bnb(None), "got NoneType")


def module_with(q, **state):
    module = vf.to_bnb(q)
    for name, value in state.items():
        setattr(module.weight.quant_state, name, value)
    return module


def without_scales():
    module = vf.to_bnb(Q8)
    module.weight.SCB = None
    return module


bad("from_bnb", "an odd blocksize", lambda _: vf.from_bnb(module_with(Q4, blocksize=100)), "blocksize must be one of")
bad("from_bnb", "an unknown type", lambda _: vf.from_bnb(module_with(Q4, quant_type="int4")), "quant_type must be")
bad("from_bnb", "a lying shape", lambda _: vf.from_bnb(module_with(Q4, shape=torch.Size([64, 64]))), "packs into 2048")
bad("from_bnb", "no row scales", lambda _: vf.from_bnb(without_scales()), "no row scales .SCB.")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

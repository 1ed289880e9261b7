"""Every private name of another library still does what it is used for; a release that moves one fails here."""

import inspect
import logging
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import optree
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jvp, vmap
from transformers import BitsAndBytesConfig, T5Config, T5ForConditionalGeneration

import vera_func as vf
from vera_func import private

from helpers import llama, tokens


def test_each_name_has_its_test():
    own = {
        name
        for name, value in vars(private).items()
        if inspect.isfunction(value) and value.__module__ == private.__name__
    }
    tested = inspect.getsource(sys.modules[__name__])
    assert [name for name in own if not name.startswith("_") and f"private.{name}" not in tested] == []


def test_pytrees():
    q = vf.quantize_8bit(torch.ones(2, 3))  # registered by private.register_pytree
    leaves, spec = private.tree_flatten({"q": q, "x": 1})
    assert leaves == [q.codes, q.scale, 1]
    assert private.tree_leaves(q) == [q.codes, q.scale]
    assert private.tree_unflatten(leaves, spec)["q"].shape == (2, 3)
    assert private.tree_map(lambda leaf: leaf.double(), q).threshold == q.threshold
    assert private.tree_flatten_with_path({"a": [5]}) == [("['a'][0]", 5)]


def test_optree_sees_the_leaves():
    q = vf.quantize_4bit(torch.ones(32, 64), double_quant=True)  # registered by private.register_optree
    leaves, spec = optree.tree_flatten({"q": q})
    assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in private.tree_leaves(q)]
    again = optree.tree_unflatten(spec, leaves)["q"]
    assert (again.shape, again.nested.offset) == (q.shape, q.nested.offset)
    assert optree.tree_map(torch.clone, q, namespace="torchopt").blocksize == q.blocksize


def test_operations_are_seen_below_autograd():
    seen = []

    def run(name, operation, args, kwargs):
        seen.append(name)
        return operation(*args, **kwargs)

    with private.watch_operations(run):
        nn.Linear(2, 3)(torch.ones(2)).sum().backward()
    assert {"addmm", "sum"} <= {*seen}


def test_fake_tensors_have_shapes_alone():
    with private.fake_tensors():
        x = torch.empty(1 << 20, 1 << 20) @ torch.empty(1 << 20, 3)  # 4 TB
    assert x.shape == (1 << 20, 3)


def test_fake_tensors_in_one_thread_after_another():
    def shape():
        with private.fake_tensors():
            return (torch.ones(3, 5) + 1).shape

    for _ in range(20):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(shape).result() == (3, 5)


def test_values_are_there_or_not():
    x, seen = torch.ones(3), []

    def look(y):
        seen.append((private.has_values(y), private.has_values(x)))
        return y

    look(x)
    vmap(look)(x)
    with private.fake_tensors():
        look(torch.ones(3))
    look(x.to("meta"))
    assert seen == [(True, True), (False, True), (False, True), (False, True)]
    assert torch.compile(lambda x: x * private.has_values(x), backend="eager")(x).sum() == 0


def test_hooks_are_cleared():
    layer, calls = nn.Linear(2, 3), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    private.clear_hooks(layer)
    layer(torch.ones(2))
    assert not calls


def test_hooks_that_collect_outputs_are_kept():
    model = llama()
    model(tokens(), output_hidden_states=True)  # transformers installs them here
    for module in model.modules():
        private.clear_hooks(module)
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == 3


def test_views_know_their_tensor():
    x = torch.ones(3)
    assert private.viewed_tensor(x[:2]) is x
    assert private.viewed_tensor(x) is None


def test_the_signature_of_a_function_is_kept():
    @private.keep_signature
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x, factor=2):
            return x * factor

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    assert inspect.signature(Double.forward) is Double.forward.__signature__
    assert grad(lambda x: Double.apply(x))(torch.tensor(1.0)) == 2


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x, factor):
        return factor * x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.factor * grad * ctx.saved_tensors[0] ** 2, None

    @staticmethod
    def jvp(ctx, x_t, factor):
        return 3 * ctx.factor * x_t * ctx.saved_tensors[0] ** 2

    @staticmethod
    def vmap(info, dims, x, factor):
        return Cube.apply(x.movedim(dims[0], 0), factor), 0


def test_a_function_is_applied_without_its_signature(monkeypatch):
    f = lambda x: private.apply_function(Cube, x, 2)
    x, escaped = torch.tensor([1.0, 3.0]), []
    assert torch.equal(vmap(grad(f))(x), 6 * x**2)
    assert torch.equal(jvp(f, (x,), (x,))[1], 6 * x**3)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, x))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, 6 * x**3)
    grad(lambda x: escaped.append(x) or x.sum())(x)  # a wrapper that outlives its transform
    if inspect.ismethod(torch.autograd.Function.apply):  # since torch 2.14, it is built in, and binds in any case
        monkeypatch.setattr(inspect, "signature", None)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
    assert torch.equal(first, 6 * x**2)
    assert torch.equal(torch.autograd.grad(first.sum(), leaf)[0], 12 * x)
    assert torch.equal(f(escaped[0]), 2 * x**3)


def test_nested_forward_mode_needs_plain_operations():
    def called(transform):
        found = []
        transform(lambda x: found.append(private.requires_plain_form()) or x.sin())(torch.ones(2))
        return found

    tangent = lambda f: lambda x: jvp(f, (x,), (x,))[1]
    assert called(lambda f: f) == called(vmap) == called(tangent) == [False]
    assert called(lambda f: tangent(grad(lambda x: f(x).sum()))) == [False]
    assert called(lambda f: tangent(vmap(tangent(f)))) == called(functionalize) == [True]


def test_forward_mode_is_on_for_tangents_of_a_function():
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(x, y):
            return x + y

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, x_t, y_t):
            with private.forward_mode():
                return x_t + y_t

    def second(f):
        return jvp(lambda x: jvp(f, (x,), (x,))[1], (torch.ones(2),), (torch.ones(2),))[1]

    assert torch.equal(second(lambda x: Sum.apply(x**2, x**3)), second(lambda x: x**2 + x**3))


def test_a_function_is_a_constant_to_the_compiler():
    calls = []

    @private.constant_when_traced
    def count(name):
        calls.append(name)
        return len(calls)

    f = torch.compile(lambda x: x + count("a"), fullgraph=True, backend="eager")
    assert f(torch.zeros(())) == f(torch.zeros(())) == 1
    assert calls == ["a"]


def test_transforms_are_noticed():
    x, seen = torch.ones(3), []

    def f(x):
        seen.append((private.in_transform(), private.unwrap(x) is x))
        return x.sum()

    f(x), grad(f)(x), vmap(f)(x[None])
    with torch.autograd.forward_ad.dual_level():
        assert private.in_transform()
    assert seen == [(False, True), (True, False), (True, False)]


def test_a_backward_pass_has_a_number():
    inside = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda _: inside.append(private.graph_task()))
    x.sum().backward()
    assert private.graph_task() == -1
    assert inside[0] >= 0


def test_an_encoder_layer_calls_its_linear_layers():
    layer, calls = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []
    layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    private.skip_fused_encoder_path(layer)
    with torch.no_grad():
        layer(torch.ones(1, 3, 8))
    assert calls


def test_bitsandbytes_is_imported_without_the_line_about_kernels():
    code = (
        "import logging, sys\n"
        "from vera_func import private\n"
        "logger = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "private.bitsandbytes()\n"
        "assert not logger.filters\n"
        "logger.warning('something else')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "something else"
    record = logging.makeLogRecord(
        {"msg": "Failed to load CPU gemm_4bit_forward from kernels-community: %s", "args": ("x",)}
    )
    assert not private._is_not_about_kernels(record)


def test_input_grads_are_dropped():
    model = llama()
    model.enable_input_require_grads()
    private.drop_input_grads(model)
    assert not model.get_input_embeddings()(torch.ones(1, 2, dtype=torch.long)).grad_fn.__class__.__name__.startswith(
        "Alias"
    )
    assert not model.get_input_embeddings()._forward_hooks


def test_what_observes_operations():
    seen = []
    look = lambda x: (seen.append(private.is_observed()), x)[1]
    look(torch.ones(2))
    vmap(look)(torch.ones(2))
    with private.fake_tensors():
        look(torch.ones(2))
    with private.watch_operations(lambda name, operation, args, kwargs: operation(*args, **kwargs)):
        look(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda x: look(x) + 1, torch.ones(2), check_trace=False)
    assert seen == [False, True, True, True, True]


def test_names_of_bitsandbytes():
    assert private.bnb_ops().dequantize_4bit
    assert private.bnb_has_avx512bf16() in (True, False)
    dequantize = private.bnb_function("cdequantize_blockwise_cpu_nf4_fp32", "pppnnn")
    q, weight = vf.quantize_4bit(torch.eye(64)), torch.empty(64, 64)
    dequantize(q.packed.data_ptr(), q.absmax.data_ptr(), weight.data_ptr(), 64, 64, 64)
    assert torch.equal(weight, torch.eye(64))
    if private.bnb_has_avx512bf16():
        assert private.bnb_function("gemv_4bit_inference_cpu_nf4_bf16", "nnnppppnnn")


def test_marks_of_transformers():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    assert private.float32_modules(T5ForConditionalGeneration(T5Config(**sizes))) == ("wo",)
    assert private.float32_modules(nn.Linear(2, 3)) == ()


def test_quantization_is_forgotten(tmp_path):
    llama().save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_8bit=True)
    model = type(llama()).from_pretrained(tmp_path, quantization_config=options, device_map={"": "cpu"})
    assert model.is_quantized
    private.forget_quantization(model)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")


def test_wrappers_are_recognized():
    layer = nn.Linear(2, 3)
    assert private.wrapped_module(nn.DataParallel(layer)) is layer
    assert private.wrapped_module(torch.compile(layer, backend="eager")) is layer
    assert private.wrapped_module(layer) is None


def test_modules_of_peft_are_recognized():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert private.peft_part(wrapped) == ("", wrapped)
    assert private.peft_part(wrapped.base_model.model)[0].endswith("q_proj")
    assert private.peft_part(llama()) is None


def test_offloading_is_recognized():
    accelerate = pytest.importorskip("accelerate")
    layer = accelerate.cpu_offload(nn.Sequential(nn.Linear(2, 3)), execution_device="cpu")[0]
    hook = private.offload_hook(layer)
    assert torch.device(hook.execution_device).type == "cpu"
    assert {name.rpartition(".")[2] for name in hook.weights_map} == {"weight", "bias"}
    assert private.offload_hook(nn.Linear(2, 3)) is None

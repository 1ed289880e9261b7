"""The product: exact and linear in x, its derivatives, what it keeps for them, and weights that are constants."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import vera_func as vf

from helpers import FORMATS, llama, normal, quantized, randomized, relative_error
from refused import Q4, Q8, Refused, X


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


@pytest.mark.parametrize("rows", [(), (3,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "int8 activations"])
def test_gradient_of_the_bias(name, rows):
    weight, bias, x = normal(8, 64), normal(8), normal(*rows, 64, seed=1)
    f = partial(vf.quantized_linear, FORMATS.get(name, vf.quantize_8bit)(weight), int8_activations=name not in FORMATS)
    loss = lambda bias, x: (f(x, bias) * torch.arange(8.0)).sum()
    expected = torch.arange(8.0) * x[..., 0].numel()
    assert_close(grad(loss)(bias, x), expected)
    leaf = bias.clone().requires_grad_()
    assert_close(torch.autograd.grad(loss(leaf, x), leaf)[0], expected)
    if rows:
        assert_close(vmap(grad(loss), (None, 0))(bias, x).sum(0), expected)


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
        twice = lambda f: jvp(lambda *a: jvp(lambda x, b: f(x.sin(), b.sin()), a, tangents)[1], (x, bias), tangents)[1]
        assert_close(twice(straight), twice(lambda x, b: x @ vf.dequantize(q).T + b))
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


# What is refused

bad = Refused()

bad("quantized_linear", "a dense weight", lambda _: vf.quantized_linear(X, X), "must be a Quantized4bit .* got Tensor")
bad("quantized_linear", "x of integers", lambda _: vf.quantized_linear(Q4, X.long()), "floating-point .*torch.int64")
bad("quantized_linear", "x complex", lambda _: vf.quantized_linear(Q4, X + 0j), "floating-point .*torch.complex64")
bad("quantized_linear", "x of booleans", lambda _: vf.quantized_linear(Q8, X > 0), "floating-point .*torch.bool")
bad("quantized_linear", "x as None", lambda _: vf.quantized_linear(Q4, None), "got NoneType")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

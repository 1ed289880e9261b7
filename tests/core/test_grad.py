"""`grad` and `value_and_grad`: plain autograd's bits outside of transforms, `torch.func.grad`'s meaning everywhere."""

import weakref
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vera_func as vf
from vera_func.private import tree_leaves, tree_map

from helpers import BASES, FORMATS, TARGETS, TOLERANCE, llama, make_base, make_layer, quantized, randomized, row
from refused import Refused


def plain(function, params):
    """The oracle: what a user writes who does not know `torch.func`."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in params.items()}
    loss = function(leaves)
    loss.backward()
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return loss.detach(), grads


def same(a, b):
    assert_close(a, b, rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in tree_leaves(a))


def two_layers(base, *n, dtype=torch.float32):
    """Params and a loss over two layers, so that a gradient passes through the base, too."""
    params, frozen, weight, x = make_layer(*n, out=32, in_=32, dtype=dtype)
    base_fn, _ = make_base(base, weight)

    def loss(params, x=x):
        hidden = vf.vera_forward(params, frozen, x, base_fn).tanh()
        return vf.vera_forward(params, frozen, hidden, base_fn).square().mean()

    return params, loss, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_has_the_bits_of_plain_autograd(base, dtype):
    params, loss, _ = two_layers(base, dtype=dtype)
    value, grads = plain(loss, params)
    same(vf.value_and_grad(loss)(params), (value, grads))
    same(vf.grad(loss)(params), grads)
    with torch.no_grad():
        same(vf.value_and_grad(loss)(params), (value, grads))


@pytest.mark.parametrize("base", ["dense", *FORMATS])
def test_a_model_has_the_bits_of_plain_autograd(base):
    apply, params, frozen, _ = vf.adapt(quantized(llama(), base), vf.VeraConfig(r=5, target_modules=TARGETS["llama"]))
    params = randomized(params)
    ids = torch.arange(14).reshape(2, 7)
    loss = lambda p: apply(p, frozen, input_ids=ids).logits.square().mean()
    same(vf.value_and_grad(loss)(params), plain(loss, params))


@pytest.mark.parametrize("base", BASES)
def test_equals_torch(base):
    params, loss, x = two_layers(base, 4, dtype=torch.float64)
    one, tolerance = row(params, 0), TOLERANCE[torch.float64]
    assert_close(vf.grad(loss)(one), torch.func.grad(loss)(one), **tolerance)
    assert_close(vmap(vf.grad(loss))(params), vmap(torch.func.grad(loss))(params), **tolerance)
    swapped = lambda p: grad_and_value(loss)(p)[::-1]
    assert_close(vmap(vf.value_and_grad(loss))(params), vmap(swapped)(params), **tolerance)
    own, theirs = vmap(vf.grad(loss), (None, 0)), vmap(torch.func.grad(loss), (None, 0))
    assert_close(own(one, x), theirs(one, x), **tolerance)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda p: sum(leaf.sin().sum() for leaf in tree_leaves(f(p)))),
    "vf.grad": lambda f: vf.grad(lambda p: sum(leaf.sin().sum() for leaf in tree_leaves(f(p)))),
    "vjp": lambda f: lambda p: vjp(f, p)[1](f(p))[0],
    "jvp": lambda f: lambda p: jvp(f, (p,), (p,))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "vmap": lambda f: lambda p: vmap(lambda c: f({k: c * v for k, v in p.items()}))(torch.arange(3.0).double()),
    "no_grad": lambda f: torch.no_grad()(f),
    "compile": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inside_of_transforms(transform):
    params = {"a": torch.tensor([1.0, 2.0, 3.0]).double(), "b": torch.tensor(0.5).double()}
    function = lambda p: (p["a"].sin() * p["a"] * p["b"].exp()).sum()
    apply = TRANSFORMS[transform]
    torch.compiler.reset()
    assert_close(apply(vf.grad(function))(params), apply(torch.func.grad(function))(params))
    swapped = lambda p: grad_and_value(function)(p)[::-1]
    if transform not in ("grad", "vf.grad"):
        assert_close(apply(vf.value_and_grad(function))(params), apply(swapped)(params))


def test_transforms_inside():
    x = torch.tensor([1.0, 2.0, 3.0])
    function = lambda x: (x.sin() * x).sum()
    for inner in (
        torch.func.grad(function),
        vf.grad(function),
        jacrev(function),
        lambda x: jvp(function, (x,), (x,))[1],
        lambda x: vmap(torch.func.grad(torch.sin))(x),
        lambda x: vmap(vf.grad(torch.sin))(x),
    ):
        loss = lambda x, inner=inner: inner(x).square().sum()
        assert_close(vf.grad(loss)(x), torch.func.grad(loss)(x))
    third = lambda grad: grad(lambda x: grad(lambda x: grad(lambda x: x.exp() * x**3)(x))(x))(torch.tensor(2.0))
    assert_close(third(vf.grad), third(torch.func.grad))


def test_forward_mode_without_torch_func():
    x, tangent = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 2.0])
    function = lambda x: (x.sin() * x).sum()
    with forward_ad.dual_level():
        dual = vf.value_and_grad(function)(forward_ad.make_dual(x, tangent))
        found = tree_map(lambda leaf: forward_ad.unpack_dual(leaf).tangent, dual)
    assert_close(found, jvp(vf.value_and_grad(function), (x,), (tangent,))[1])


def test_a_dual_tensor_that_is_closed_over():
    x, tangent = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    found = jvp(lambda c: vf.grad(lambda x: (x * c).square().sum())(x), (x,), (tangent,))[1]
    assert_close(found, 4 * x * x * tangent)
    found = vmap(lambda c: vf.grad(lambda x: (x * c).sum())(x))(torch.eye(2))
    assert_close(found, torch.eye(2))


class Pair(NamedTuple):
    left: torch.Tensor
    right: list[torch.Tensor]


def loss_of_trees(tree, x, *, scale):
    return scale * (tree["pair"].left * x["x"]).sum() * tree["pair"].right[0].exp() + x["x"].square().sum()


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0), (-2, 1)])
@pytest.mark.parametrize("has_aux", [False, True])
def test_arguments_and_results_are_those_of_torch(argnums, has_aux):
    tree = {"pair": Pair(torch.tensor([1.0, 2.0]), [torch.tensor(0.5)]), "unused": (torch.ones(3),)}
    args = tree, {"x": torch.tensor([3.0, -1.0])}
    function = lambda *args, **kwargs: (loss_of_trees(*args, **kwargs), {"aux": args[0]}) if has_aux else (
        loss_of_trees(*args, **kwargs)
    )  # fmt: skip
    expected, value = grad_and_value(function, argnums, has_aux)(*args, scale=2.0)
    found = vf.value_and_grad(function, argnums, has_aux)(*args, scale=2.0)
    same(found, (value, expected))
    assert isinstance(found[1], tuple) == isinstance(argnums, tuple)
    same(vf.grad(function, argnums, has_aux)(*args, scale=2.0),
         torch.func.grad(function, argnums, has_aux)(*args, scale=2.0))  # fmt: skip


def test_what_does_not_depend_on_the_argument_has_zeros():
    x = torch.ones(3, dtype=torch.bfloat16)
    weight = torch.ones(3, requires_grad=True)
    for function in (lambda x: torch.ones(()), lambda x: weight.sum(), lambda x: x.detach().sum()):
        same(vf.grad(function)(x), torch.zeros_like(x))
    assert vf.grad(lambda tree: torch.ones(()))({}) == {}
    same(vf.value_and_grad(lambda x: x)(torch.tensor(2.0)), (torch.tensor(2.0), torch.tensor(1.0)))


def test_the_same_tensor_twice():
    x = torch.tensor([1.0, 2.0])
    same(vf.grad(lambda a, b: (a * b.square() * x).sum(), (0, 1))(x, x), (x**3, 2 * x**3))


# Whose gradient and value can be differentiated by plain autograd: where something outside requires grad.
class Outside:
    def __init__(self, argument):
        self.weight = torch.tensor([2.0, -1.0, 3.0], requires_grad=True)
        self.x = torch.tensor([1.0, 2.0, 3.0], requires_grad=argument)
        self.made = self.weight.exp()  # no leaf

    functions = {  # noqa: RUF012
        "nothing": lambda self, x: x.square().sum(),
        "closed over": lambda self, x: (x.square() * self.weight).sum(),
        "closed over, no leaf": lambda self, x: (x.square() * self.made).sum(),
        "closed over, linear": lambda self, x: (x * self.weight).sum(),
        "closed over, beside": lambda self, x: x.square().sum() + self.weight.sum(),
        "closed over, without the argument": lambda self, x: self.weight.square().sum(),
        "closed over, the argument itself": lambda self, x: (x.square() * self.x).sum(),
    }


@pytest.mark.parametrize("outer", [True, False], ids=["grad mode", "no_grad"])
@pytest.mark.parametrize("argument", [True, False], ids=["argument requires grad", "plain argument"])
@pytest.mark.parametrize("name", Outside.functions)
def test_stays_differentiable_where_something_outside_requires_grad(name, argument, outer):
    def results(transform):
        outside = Outside(argument)
        function = lambda x: (
            Outside.functions[name](outside, x),
            (x.exp(), outside.weight.exp(), x.exp() * outside.weight),
        )
        with torch.set_grad_enabled(outer):
            found = transform(function)(outside.x)
        leaves = tree_leaves(found)
        second = None
        if any(leaf.requires_grad for leaf in leaves):
            total = sum((leaf * leaf.detach().sin()).sum() for leaf in leaves)
            sources = [outside.weight, outside.x][: 1 + argument]
            second = torch.autograd.grad(total, sources, materialize_grads=True, allow_unused=True)
        return [leaf.requires_grad for leaf in leaves], tree_map(lambda leaf: leaf.detach(), found), second

    found = results(lambda f: vf.value_and_grad(f, has_aux=True))
    expected = results(lambda f: lambda x: grad_and_value(f, has_aux=True)(x)[::-1])
    assert_close(found, expected)
    assert outer or not any(found[0])


def test_another_argument_that_requires_grad():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0], requires_grad=True)
    value, found = vf.value_and_grad(lambda x, y: (x.square() * y).sum())(x, y)
    assert value.requires_grad
    assert_close(torch.autograd.grad(found.sum(), y)[0], 2 * x)


def test_an_aux_that_stays_differentiable_keeps_what_it_shares_with_the_value():
    x, weight = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0], requires_grad=True)

    def function(x):
        shared = x.exp()
        return shared.sum(), shared * weight

    found, aux = vf.grad(function, has_aux=True)(x)
    assert not found.requires_grad
    aux.sum().backward()
    assert_close(weight.grad, x.exp())


class Marked(torch.autograd.Function):
    """x^2, whose node holds an object that can be watched."""

    @staticmethod
    def forward(ctx, x, mark):
        ctx.save_for_backward(x)
        ctx.mark = mark
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad, None


class Mark:
    pass


def test_no_graph_is_kept():
    marks = []

    def function(x):
        mark = Mark()
        marks.append(weakref.ref(mark))
        y = Marked.apply(x, mark)
        return y.sum(), y

    kept = vf.value_and_grad(function, has_aux=True)(torch.ones(3))
    assert len(tree_leaves(kept)) == 3
    assert marks[0]() is None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_no_graph_of_the_backward_is_made(mode):
    params, loss, _ = two_layers("nf4")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        plain(loss, params)
        expected, packed = packed, []
        with mode():
            vf.grad(loss)(params)
    assert packed == expected


@pytest.mark.parametrize("times", [1, 2])
def test_activation_checkpointing(times):
    params, loss, _ = two_layers("nf4", dtype=torch.float64)
    calls = []

    def recomputed(params):
        calls.append(0)
        return checkpoint(lambda p: calls.append(1) or loss(p), params, use_reentrant=False)

    def norm(grad):
        return lambda f: lambda p: sum(leaf.square().sum() for leaf in grad(f)(p).values())

    if times == 1:
        same(vf.grad(recomputed)(params), plain(loss, params)[1])
    else:
        assert_close(vf.grad(norm(vf.grad)(recomputed))(params), torch.func.grad(norm(torch.func.grad)(loss))(params))
    assert sum(calls) > len(calls) - sum(calls)


def test_nothing_is_changed():
    params, loss, _ = two_layers("nf4")
    before = {key: value.clone() for key, value in params.items()}
    parameter = torch.nn.Parameter(torch.ones(3))
    vf.grad(loss)(params)
    vf.grad(lambda p: p.square().sum())(parameter)
    same(params, before)
    assert parameter.grad is None
    assert all(value.is_leaf and value.grad is None for value in params.values())


def test_a_module_through_functional_call():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    x = torch.linspace(-1, 1, 10).reshape(2, 5)
    loss = lambda params: functional_call(model, params, (x,)).square().mean()
    params = {key: value.detach() for key, value in model.named_parameters()}
    same(vf.value_and_grad(loss)(params), plain(loss, params))
    with_graph = vf.grad(loss)(dict(model.named_parameters()))
    assert all(leaf.requires_grad for leaf in list(with_graph.values())[:3])
    assert_close(tree_map(lambda leaf: leaf.detach(), with_graph), plain(loss, params)[1])


def test_in_inference_mode():
    """Plain autograd records nothing there: the gradient would be zeros."""
    x = torch.tensor([1.0, 2.0])
    with torch.inference_mode():
        inside = x.clone()
        for argument in (x, inside):
            assert_close(vf.grad(lambda x: x.square().sum())(argument), 2 * x)
            assert_close(vmap(vf.grad(torch.square))(argument), 2 * x)
    assert_close(vf.grad(lambda x: x.square().sum())(inside), 2 * x)


# What is refused

bad = Refused()
X = torch.ones(3)

total = lambda *args: args[0].sum()

for name in ("grad", "value_and_grad"):
    f = getattr(vf, name)
    bad(
        name,
        "a vector for the value",
        lambda _, f=f: f(lambda x: x)(X),
        r"shape \(\), got \(3,\) torch.float32: return the sum",
    )
    bad(name, "a float for the value", lambda _, f=f: f(lambda x: 1.0)(X), "a tensor of shape .*got float")
    bad(name, "a pair for the value", lambda _, f=f: f(lambda x: (x.sum(), x))(X), "got tuple.*has_aux=True")
    bad(name, "no pair", lambda _, f=f: f(total, has_aux=True)(X), r"must return a pair \(value, aux\), got Tensor")
    bad(name, "text in aux", lambda _, f=f: f(lambda x: (x.sum(), {"a": "b"}), has_aux=True)(X), "aux .* type str")
    bad(
        name,
        "integers",
        lambda _, f=f: f(total)(X.long()),
        "must be a pytree of floating-point tensors, got .* torch.int64",
    )
    bad(name, "a number", lambda _, f=f: f(total)({"a": 1.0}), "floating-point tensors, got a leaf float")
    bad(
        name,
        "integers under vmap",
        lambda _, f=f: vmap(f(total))(torch.ones(2, 3).long()),
        r"got a leaf \(.*\) torch.int64",
    )
    for argnums in (1, -2, 0.0, "0", (), (0, 5), [0], None):
        bad(
            name,
            f"argnums={argnums!r}",
            lambda _, f=f, a=argnums: f(total, a)(X),
            "argnums must be positions among the 1",
        )
    bad(name, "a position twice", lambda _, f=f: f(total, (0, -2))(X, X), r"different positions, got \(0, -2\)")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

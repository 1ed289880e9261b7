"""The contract: every transform, on every base, against the dense formula."""

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf

from helpers import BASES, TOLERANCE, TRANSFORMS, dense_forward, make_base, make_layer, row, squared


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("base", BASES)
def test_equals_dense(base, transform):
    params, frozen, weight, x = make_layer()
    base_fn, dense = make_base(base, weight)
    apply = TRANSFORMS[transform]
    actual = apply(lambda p: vf.vera_forward(p, frozen, x, base_fn))(params)
    expected = apply(lambda p: dense_forward(p, frozen, x, dense))(params)
    assert_close(actual, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("base", BASES)
def test_equals_dense_in_x(base, transform):
    params, frozen, weight, x = make_layer()
    base_fn, dense = make_base(base, weight, bias=weight[:, 0])
    apply = TRANSFORMS[transform]
    actual = apply(lambda x: vf.vera_forward(params, frozen, x, base_fn))(x[0])
    expected = apply(lambda x: dense_forward(params, frozen, x, dense, weight[:, 0]))(x[0])
    assert_close(actual, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("rows", [0, slice(3)], ids=["one row", "rows"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_dense_in_the_projections(transform, rows):
    params, frozen, weight, x = make_layer(out=5, in_=7, r=3)
    apply = TRANSFORMS[transform]
    actual = apply(lambda f: vf.vera_forward(params, f, x[rows], lambda x: x @ weight.T))(frozen)
    expected = apply(lambda f: dense_forward(params, f, x[rows], weight))(frozen)
    assert_close(actual, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("transform", ["forward", "grad", "jvp", "hessian"])
def test_float32(transform):
    params, frozen, weight, x = make_layer(dtype=torch.float32)
    base_fn, dense = make_base("nf4", weight)
    apply = TRANSFORMS[transform]
    actual = apply(lambda p: vf.vera_forward(p, frozen, x, base_fn))(params)
    expected = apply(lambda p: dense_forward(p, frozen, x, dense))(params)
    assert_close(actual, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("transform", ["forward", "grad", "vjp", "jacrev", "jvp", "hessian"])
@pytest.mark.parametrize("base", BASES)
def test_vmap_over_params(base, transform):
    params, frozen, weight, x = make_layer(4)
    base_fn, dense = make_base(base, weight)
    apply = TRANSFORMS[transform]
    batched = vmap(apply(lambda p: vf.vera_forward(p, frozen, x, base_fn)))(params)
    for i in range(4):
        expected = apply(lambda p: dense_forward(p, frozen, x, dense))(row(params, i))
        assert_close(row(batched, i), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, 1), (1, 2), (None, 1), (1, None)])
@pytest.mark.parametrize("base", BASES)
def test_vmap_over_params_and_x(base, dims):
    params, frozen, weight, _ = make_layer(4)
    base_fn, dense = make_base(base, weight, bias=weight[:, 0])
    x = torch.randn(4, 3, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    params_dim, x_dim = dims
    inputs = [row(params, 0) if params_dim is None else params, x[0] if x_dim is None else x]
    moved = [
        {k: v.movedim(0, params_dim) for k, v in params.items()} if params_dim else inputs[0],
        x.movedim(0, x_dim) if x_dim else inputs[1],
    ]
    actual = vmap(lambda p, x: vf.vera_forward(p, frozen, x, base_fn), dims)(*moved)
    for i in range(4):
        p = inputs[0] if params_dim is None else row(params, i)
        expected = dense_forward(p, frozen, inputs[1] if x_dim is None else x[i], dense, weight[:, 0])
        assert_close(actual[i], expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("base", BASES)
def test_per_example_gradients(base):
    params, frozen, weight, x = make_layer()
    base_fn, dense = make_base(base, weight)
    loss = squared(lambda p, x: vf.vera_forward(p, frozen, x, base_fn))
    actual = vmap(grad(loss), (None, 0))(params, x)
    for i, example in enumerate(x):
        expected = grad(squared(lambda p, x: dense_forward(p, frozen, x, dense)))(params, example)
        assert_close(row(actual, i), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("base", BASES)
def test_grad_of_vmap(base):
    params, frozen, weight, x = make_layer(4)
    base_fn, dense = make_base(base, weight)
    actual = grad(lambda p: vmap(lambda p: vf.vera_forward(p, frozen, x, base_fn))(p).square().sum())(params)
    for i in range(4):
        expected = grad(squared(lambda p: dense_forward(p, frozen, x, dense)))(row(params, i))
        assert_close(row(actual, i), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("base", BASES)
def test_backward(base):
    params, frozen, weight, x = make_layer()
    base_fn, dense = make_base(base, weight)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    vf.vera_forward(leaves, frozen, x, base_fn).square().sum().backward()
    expected = grad(squared(lambda p: dense_forward(p, frozen, x, dense)))(params)
    assert_close({k: v.grad for k, v in leaves.items()}, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("base", BASES)
def test_gradcheck(base):
    params, frozen, weight, x = make_layer(out=5, in_=7, r=3)
    base_fn, _ = make_base(base, weight)

    def forward(b, d, x):
        return vf.vera_forward({"lambda_b": b, "lambda_d": d}, frozen, x, base_fn)

    inputs = [t.clone().requires_grad_() for t in (*params.values(), x)]
    assert torch.autograd.gradcheck(
        forward, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(forward, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("transform", ["forward", "vmap(grad)"])
@pytest.mark.parametrize("base", BASES)
def test_compiles(base, transform):
    # Two layers, so that the input of the second needs a gradient, too.
    params, frozen, weight, x = make_layer(4, out=IN_AND_OUT, in_=IN_AND_OUT, dtype=torch.float32)
    base_fn, _ = make_base(base, weight)

    def forward(p):
        return vf.vera_forward(p, frozen, vf.vera_forward(p, frozen, x, base_fn).tanh(), base_fn)

    one = {k: v[0] for k, v in params.items()}
    f, p = (forward, one) if transform == "forward" else (vmap(grad(squared(forward))), params)
    # Without the code generator: what is tested is what Dynamo and AOTAutograd can trace.
    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(p), f(p), rtol=1e-3, atol=1e-3)


IN_AND_OUT = 32


def test_compiles_with_inductor():
    params, frozen, weight, x = make_layer(2, out=IN_AND_OUT, in_=IN_AND_OUT, dtype=torch.float32)
    base_fn, _ = make_base("nested", weight)
    f = vmap(grad(squared(lambda p: vf.vera_forward(p, frozen, x, base_fn))))
    assert_close(torch.compile(f, fullgraph=True)(params), f(params), rtol=1e-3, atol=1e-3)

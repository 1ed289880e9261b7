"""Products with the projections in 16 bits: every transform on every base, and the errors that the docstring states."""

import peft
import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf

from helpers import BASES, TRANSFORMS, dense_forward, make_base, make_layer, row, squared


SIXTEEN = [torch.bfloat16, torch.float16]
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def near(actual, expected, bound=0.05):
    """Within a few roundings to bfloat16 of the largest value of each tensor; a missing term would be far outside."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            near(actual[key], expected[key], bound)
        return
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("base", BASES)
def test_near_dense(base, transform):
    params, frozen, weight, x = make_layer()
    base_fn, dense = make_base(base, weight)
    apply = TRANSFORMS[transform]
    actual = apply(lambda p: vf.vera_forward(p, frozen, x, base_fn, product_dtype=torch.bfloat16))(params)
    near(actual, apply(lambda p: dense_forward(p, frozen, x, dense))(params))
    actual = apply(lambda x: vf.vera_forward(params, frozen, x, base_fn, product_dtype=torch.bfloat16))(x[0])
    near(actual, apply(lambda x: dense_forward(params, frozen, x, dense))(x[0]))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_near_dense_in_the_projections(transform):
    params, frozen, weight, x = make_layer(out=5, in_=7, r=3)
    apply = TRANSFORMS[transform]
    actual = apply(lambda f: vf.vera_forward(params, f, x, lambda x: x @ weight.T, product_dtype=torch.bfloat16))(
        frozen
    )
    near(actual, apply(lambda f: dense_forward(params, f, x, weight))(frozen))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_small_integers_are_exact(transform, dtype):
    # All factors, sums, cotangents and tangents are integers that 16 bits represent: nothing is rounded.
    generator = torch.Generator().manual_seed(0)

    def signs(*shape):
        return torch.randint(-1, 2, shape, generator=generator).double()

    params = {"lambda_b": signs(5), "lambda_d": signs(3)}
    frozen = {"vera_A": signs(3, 7), "vera_B": signs(5, 3)}
    weight, x = signs(5, 7), signs(2, 7)
    apply = TRANSFORMS[transform]
    actual = apply(lambda p: vf.vera_forward(p, frozen, x, lambda x: x @ weight.T, product_dtype=dtype))(params)
    expected = apply(lambda p: dense_forward(p, frozen, x, weight))(params)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("transform", ["forward", "grad", "vjp", "jacrev", "jvp", "hessian"])
@pytest.mark.parametrize("base", BASES)
def test_vmap(base, transform):
    params, frozen, weight, x = make_layer(4)
    base_fn, dense = make_base(base, weight)
    apply = TRANSFORMS[transform]
    forward = lambda p, x: vf.vera_forward(p, frozen, x, base_fn, product_dtype=torch.bfloat16)
    batched = vmap(apply(lambda p: forward(p, x)))(params)
    for i in range(4):
        near(row(batched, i), apply(lambda p: dense_forward(p, frozen, x, dense))(row(params, i)))
    one = row(params, 0)
    per_example = vmap(grad(squared(forward)), (None, 0))(one, x)
    near(row(per_example, 1), grad(squared(lambda p: dense_forward(p, frozen, x[1], dense)))(one))


@pytest.mark.parametrize("base", BASES)
def test_autograd_equals_transforms(base):
    params, frozen, weight, x = make_layer(dtype=torch.float32)
    base_fn, _ = make_base(base, weight)
    loss = squared(lambda p: vf.vera_forward(p, frozen, x, base_fn, product_dtype=torch.bfloat16))
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss(leaves).backward()
    assert_close({k: v.grad for k, v in leaves.items()}, grad(loss)(params))


@pytest.mark.parametrize("transform", ["forward", "vmap(grad)"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiles(base, transform):
    params, frozen, weight, x = make_layer(4, dtype=torch.float32)
    base_fn, _ = make_base(base, weight)
    forward = lambda p: vf.vera_forward(p, frozen, x, base_fn, product_dtype=torch.bfloat16)
    f, p = (forward, row(params, 0)) if transform == "forward" else (vmap(grad(squared(forward))), params)
    near(torch.compile(f, fullgraph=True, backend="aot_eager")(p), f(p), 0.02)


def wide(dtype, *, rounded, r=64, in_=1024, out=512):
    """A layer of a model's size in float32, whose A, B and x are values of `dtype` if `rounded`."""
    params, frozen, _, x = make_layer(out=out, in_=in_, r=r, dtype=torch.float32)
    given = {**frozen, "x": x}
    if rounded:
        given = {name: value.to(dtype).float() for name, value in given.items()}
    return params, {name: given[name] for name in frozen}, given["x"]


def update(params, frozen, x, **options):
    return vf.vera_forward(params, frozen, x, lambda x: x.new_zeros(*x.shape[:-1], 512), **options)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("rounded", "roundings", "of_norm"), [(True, 3, 0.7), (False, 6, 1.0)])
def test_errors_are_those_of_the_docstring(dtype, rounded, roundings, of_norm):
    params, frozen, x = wide(dtype, rounded=rounded)
    u = ROUNDOFF[dtype]
    exact = update(*[{k: v.double() for k, v in d.items()} for d in (params, frozen)], x.double())
    error = update(params, frozen, x, product_dtype=dtype).double() - exact
    absolute = [{k: v.abs().double() for k, v in d.items()} for d in (params, frozen)]
    M = update(*absolute, x.abs().double())
    bound = (1 + u) ** roundings - 1 + (1024 + 64) * 2**-24
    assert (error.abs() <= bound * M).all()
    # Near the stated size: more roundings would be larger, and a product in float32 much smaller.
    assert 0.7 * of_norm < error.norm() / exact.norm() / u < 1.2 * of_norm
    plain = update(params, frozen, x).double() - exact
    assert (plain.abs() <= (1024 + 64) * 2**-24 * M).all()


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_gradients_have_the_same_errors(dtype):
    params, frozen, x = wide(dtype, rounded=True)
    cotangent = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    loss = lambda p, frozen, x, c, **options: (update(p, frozen, x, **options) * c).sum()
    double = lambda d: {k: v.double() for k, v in d.items()}
    exact = grad(loss)(double(params), double(frozen), x.double(), cotangent.double())
    absolute = lambda d: {k: v.abs().double() for k, v in d.items()}
    M = grad(loss)(absolute(params), absolute(frozen), x.abs().double(), cotangent.abs().double())
    found = grad(loss)(params, frozen, x, cotangent, product_dtype=dtype)
    bound = (1 + ROUNDOFF[dtype]) ** 3 - 1 + (1024 + 512 + 64) * 2**-24
    for key in params:
        error = (found[key].double() - exact[key]).abs()
        assert found[key].dtype == torch.float32
        assert (error <= bound * M[key]).all()
        assert error.max() > 0


@pytest.mark.parametrize("dropout", [False, True])
def test_equals_peft_under_autocast(dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16)
    x = torch.randn(5, 64).to(torch.bfloat16)
    adapted = vf.adapt(model, vf.VeraConfig(r=16, target_modules=["0"]), product_dtype=torch.bfloat16)
    params = {k: torch.randn_like(v) for k, v in adapted.params.items()}
    theirs = peft.get_peft_model(model, peft.VeraConfig(r=16, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.vera_lambda_b["default"].data, layer.vera_lambda_d["default"].data = (
        params["0.lambda_b"],
        params["0.lambda_d"],
    )
    apply, loss = adapted.apply, lambda y: y.float().square().sum()
    if dropout:
        mask = vf.dropout_mask(0.5, (5, 64), generator=torch.Generator().manual_seed(3))
        layer.vera_dropout["default"] = Times(mask)
        forward = lambda p: vf.vera_forward(
            {key[2:]: value for key, value in p.items()}, adapted.frozen, x, layer.base_layer,
            dropout_mask=mask, product_dtype=torch.bfloat16,
        )  # fmt: skip
    else:
        forward = lambda p: apply(p, adapted.frozen, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(x)
    loss(expected).backward()
    assert torch.equal(forward(params), expected)
    gradient = vf.grad(lambda p: loss(forward(p)))(params)
    assert_close(gradient["0.lambda_b"], layer.vera_lambda_b["default"].grad, rtol=1e-5, atol=1e-6)
    assert_close(gradient["0.lambda_d"], layer.vera_lambda_d["default"].grad, rtol=1e-5, atol=1e-6)


class Times(nn.Module):
    """A dropout with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, "bfloat16", 16])
def test_other_dtypes_are_refused(dtype):
    params, frozen, weight, x = make_layer()
    with pytest.raises(ValueError, match=r"product_dtype must be torch.bfloat16, torch.float16, or None"):
        vf.vera_forward(params, frozen, x, lambda x: x @ weight.T, product_dtype=dtype)

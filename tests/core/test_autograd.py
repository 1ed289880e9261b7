"""The product `A x` that several layers share, and what a layer keeps for its backward."""

import contextlib

import pytest
import torch
from torch.func import grad
from torch.testing import assert_close

import vera_func as vf
from vera_func.core import autograd
from vera_func.core.autograd import SharedProduct, project


class TestSharedProduct:
    """`A x` for several layers with the same x: a value computed once, differentiated by each layer."""

    A = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    @pytest.fixture(autouse=True)
    def _share_small_ones_too(self, monkeypatch):
        monkeypatch.setattr(autograd, "WORTH_SHARING", 0)

    @staticmethod
    def thrice(x, A):
        shared = SharedProduct()
        first, second, third = (shared(x, A) for _ in range(3))
        return first.sin() * second * third.cos()

    @staticmethod
    def plain(x, A):
        return (x @ A.mT).sin() * (x @ A.mT) * (x @ A.mT).cos()

    def test_the_product_is_computed_once(self, monkeypatch):
        calls = []
        monkeypatch.setattr(autograd, "project", lambda x, A: calls.append(x) or x @ A.mT)
        shared = SharedProduct()
        shared(self.x, self.A), shared(self.x, self.A)
        assert len(calls) == 1
        shared(self.x.clone(), self.A)
        assert len(calls) == 2

    def test_cheap_products_are_computed_each_time(self, monkeypatch):
        monkeypatch.setattr(autograd, "WORTH_SHARING", self.x.numel() * 5 + 1)
        shared = SharedProduct()
        assert shared(self.x, self.A).data_ptr() != shared(self.x, self.A).data_ptr()
        assert shared(self.x, self.A.repeat(2, 1)).data_ptr() == shared(self.x, self.A.repeat(2, 1)).data_ptr()

    def test_a_changed_input_is_another_one(self):
        shared, x = SharedProduct(), self.x.clone()
        shared(x, self.A)
        x += 1
        assert_close(shared(x, self.A), x @ self.A.mT)
        with torch.inference_mode():
            x = self.x.clone()
            shared(x, self.A)
            x += 1
            assert_close(shared(x, self.A), x @ self.A.mT)

    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("width", [7, 8])
    def test_a_write_that_nothing_counts_is_seen(self, width, dtype, inference):
        with torch.inference_mode(inference):
            x = torch.randn(3, width, generator=torch.Generator().manual_seed(3)).to(dtype)
            A = torch.ones(5, width)
            view = None if dtype == torch.bfloat16 else x.numpy()  # from before: it needs not ask again
            writes = {
                "x.data": lambda: x.data.mul_(2),
                "a part of x.data": lambda: x.data[1, -1:].add_(1),
                "an exchange, which keeps the sum": lambda: x.data.copy_(x.data.flip(0)),
                "the sign of a zero": lambda: x.data[0].copy_(-x.data[0]),
                "numpy": lambda: None if view is None else view.__imul__(2),
            }
            x[0] = 0
            for write in writes.values():
                shared = SharedProduct()
                shared(x, A)
                write()
                found, right = shared(x, A), project(x, A)
                assert torch.equal(found, right)
                assert torch.equal(found.signbit(), right.signbit())

    def test_a_view_of_a_wider_tensor(self):
        wide = torch.randn(3, 17, generator=torch.Generator().manual_seed(3))
        for x in (wide[:, 1:], wide[:, ::2], wide.T, wide[:1].expand(5, 17), wide[:0], wide[0, 1:9]):
            shared, A = SharedProduct(), torch.ones(5, x.shape[-1])
            shared(x, A)
            assert torch.equal(shared(x, A), project(x, A))
            wide.data += 1
            assert torch.equal(shared(x, A), project(x, A))

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f: torch.func.vmap(f),
            lambda f: torch.no_grad()(torch.func.vmap(f)),
            lambda f: lambda x: torch.func.grad_and_value(lambda x: f(x).sum())(x)[1],
            lambda f: lambda x: torch.func.grad_and_value(lambda x: torch.func.vmap(f)(x).sum())(x)[1],
            lambda f: torch.func.vmap(torch.func.grad_and_value(lambda x: f(x).sum())),
            lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[0],
        ],
        ids=["vmap", "no_grad", "grad", "grad(vmap)", "vmap(grad)", "jvp"],
    )
    @pytest.mark.parametrize("counted", [False, True])
    def test_a_changed_input_is_seen_in_a_transform(self, transform, counted):
        def difference(shared, x):
            x = x * 1
            first = shared(x, self.A)
            write = [lambda: x.add_(1)]
            if not counted:  # each transform refuses some of them
                write = [lambda: torch.func.debug_unwrap(x).numpy().__iadd__(1), lambda: x.data.add_(1), *write]
            for way in write:
                with contextlib.suppress(RuntimeError):
                    way()
                    break
            return shared(x, self.A) - first

        step = transform(lambda x: difference(SharedProduct(), x))(self.x)
        plain = transform(lambda x: difference(lambda x, A: x @ A.mT, x))(self.x)
        assert_close(step, plain)

    @pytest.mark.filterwarnings("ignore")  # of tracing
    def test_an_input_whose_bits_cannot_be_viewed(self):
        negated = torch._neg_view(self.x)  # such as the imaginary part of a conjugated tensor
        assert_close(self.thrice(negated, self.A), self.plain(-self.x, self.A))
        traced = torch.jit.trace(lambda x: self.thrice(x, self.A), (self.x,), check_trace=False)
        assert_close(traced(2 * self.x), self.plain(2 * self.x, self.A))

    def test_a_product_without_gradients_is_another_one(self):
        shared, x, A = SharedProduct(), self.x.clone().requires_grad_(), self.A.clone().requires_grad_()
        with torch.no_grad():
            shared(x, A)
        actual = torch.autograd.grad(shared(x, A).sin().sum(), (x, A))
        assert_close(actual, torch.autograd.grad((x @ A.mT).sin().sum(), (x, A)))

    def test_another_dtype_is_another_product(self):
        shared = SharedProduct()
        shared(self.x, self.A)
        assert shared(self.x, self.A.float()).dtype == torch.float32

    def test_derivatives(self):
        x, A = self.x.clone().requires_grad_(), self.A.clone().requires_grad_()
        assert torch.autograd.gradcheck(self.thrice, (x, A), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(self.thrice, (x, A), check_fwd_over_rev=True)

    def test_gradients_are_those_of_unshared_products_to_the_bit(self):
        x, A = self.x.float(), self.A.float()
        shared, plain = (grad(lambda x, f=f: f(x, A).sum())(x) for f in (self.thrice, self.plain))
        assert torch.equal(shared, plain)

    @pytest.mark.parametrize("argnums", [0, 1])
    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, a: torch.func.jacrev(f, a),
            lambda f, a: torch.func.jacfwd(f, a),
            lambda f, a: torch.func.hessian(lambda *args: f(*args).sum(), a),
            lambda f, a: torch.func.jacrev(torch.func.jacrev(lambda *args: f(*args).sum(), a), 1 - a),
            lambda f, a: torch.func.vmap(torch.func.grad(lambda *args: f(*args).sum(), a), (0, None)),
            lambda f, a: torch.func.functionalize(torch.func.grad(lambda *args: f(*args).sum(), a)),
        ],
        ids=["jacrev", "jacfwd", "hessian", "mixed", "vmap(grad)", "functionalize"],
    )
    def test_transforms(self, transform, argnums):
        assert_close(transform(self.thrice, argnums)(self.x, self.A), transform(self.plain, argnums)(self.x, self.A))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ((), ()),
        ((7,), ()),
        ((7,), (7,)),
        ((3, 5), ()),
        ((3, 5), (3,)),
        ((3, 5), (3, 5)),
        ((1, 9), (1,)),
        ((2, 3, 4), (2,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", [1, 6, 11, 40, 100])
def test_a_sum_in_parts_has_the_same_bits(monkeypatch, part, batch, rows, dtype):
    out, r = 11, 3
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    base, z, B = draw(*batch, out).to(dtype), draw(*batch, r), draw(out, r)
    ones = [1] * (len(batch) - len(rows)) if rows else []
    lambda_b, lambda_d = draw(*rows, *ones, out), draw(*rows, *ones, r)
    expected = (base + lambda_b * (lambda_d * z @ B.T)).to(dtype)
    monkeypatch.setattr(autograd, "PART", part)
    actual = autograd.add_update(base, z, lambda_b, lambda_d, B, dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_layers_that_read_the_same_input_share_its_product(monkeypatch):
    """q, k and v; gate and up: four products a layer for all seven."""
    from helpers import llama

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    apply, params, frozen, _ = vf.adapt(llama(), vf.VeraConfig(r=4, target_modules=linears))
    monkeypatch.setattr(autograd, "WORTH_SHARING", 0)
    calls, original = [], autograd.project
    monkeypatch.setattr(autograd, "project", lambda x, A: calls.append(x) or original(x, A))
    apply(params, frozen, input_ids=torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == len(params) // 2 // 7 * 4


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_nothing_is_recorded_where_nothing_is_differentiated(base, monkeypatch):
    from vera_func.quant import linear

    from helpers import llama, quantized, randomized

    def refuse(ctx, inputs, output):
        raise AssertionError("a custom Function was applied")

    monkeypatch.setattr(autograd, "WORTH_SHARING", 0)
    for function in (autograd._Known, autograd._Expand, linear._Product):
        monkeypatch.setattr(function, "setup_context", staticmethod(refuse))
    adapted = vf.adapt(quantized(llama(), base), vf.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    params, ids = randomized(adapted.params), torch.ones(1, 3, dtype=torch.long)
    assert torch.is_grad_enabled()
    adapted.apply(params, adapted.frozen, input_ids=ids)
    with pytest.raises(AssertionError, match="a custom Function was applied"):
        vf.grad(lambda p: adapted.apply(p, adapted.frozen, input_ids=ids).logits.sum())(params)

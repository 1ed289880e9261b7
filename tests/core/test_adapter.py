"""One layer: rows and their shapes, dtypes, sums, dropout."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn, ones
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf

from helpers import IN, OUT, TOLERANCE, R, dense_forward, make_layer, row
from refused import INF, LAYER, NAN, PAIR, Refused, X


EXACT = TOLERANCE[torch.float64]


def rows_of(*n, x=None, seed=0):
    """Stacked adapters of shape `n`, projections, a base and an input (*x, in)."""
    params, frozen, weight, _ = make_layer(*n, seed=seed)
    inputs = torch.randn(*(x or ()), IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return params, frozen, weight, inputs, lambda x: nn.functional.linear(x, weight)


class TestRows:
    @pytest.mark.parametrize("batch", [(), (4,), (4, 2), (4, 2, 3)], ids=str)
    def test_a_single_adapter_takes_any_batch(self, batch):
        params, frozen, weight, x, base_fn = rows_of(x=batch)
        actual = vf.vera_forward(params, frozen, x, base_fn)
        assert actual.shape == (*batch, OUT)
        assert_close(actual, dense_forward(params, frozen, x, weight), **EXACT)

    # (adapters, batch): the adapters' axes are the first of the batch.
    @pytest.mark.parametrize("batch", [(4,), (4, 2), (4, 4), (4, 2, 3), (4, 1)], ids=str)
    def test_row_i_goes_through_adapter_i(self, batch):
        params, frozen, weight, x, base_fn = rows_of(4, x=batch)
        actual = vf.vera_forward(params, frozen, x, base_fn)
        for i in range(4):
            assert_close(actual[i], dense_forward(row(params, i), frozen, x[i], weight), **EXACT)

    @pytest.mark.parametrize("batch", [(4, 2), (4, 2, 3)], ids=str)
    def test_several_axes_of_rows(self, batch):
        params, frozen, weight, x, base_fn = rows_of(4, 2, x=batch)
        actual = vf.vera_forward(params, frozen, x, base_fn)
        for i in range(4):
            for j in range(2):
                one = row(row(params, i), j)
                assert_close(actual[i, j], dense_forward(one, frozen, x[i, j], weight), **EXACT)

    def test_each_vector_is_matched_by_itself(self):
        many, frozen, weight, x, base_fn = rows_of(4, x=(4, 2))
        one = row(many, 0)
        for name in ("lambda_b", "lambda_d"):
            params = one | {name: many[name]}
            actual = vf.vera_forward(params, frozen, x, base_fn)
            for i in range(4):
                expected = dense_forward(one | {name: many[name][i]}, frozen, x[i], weight)
                assert_close(actual[i], expected, **EXACT)
        two, *_ = rows_of(4, 2)
        actual = vf.vera_forward({"lambda_b": two["lambda_b"], "lambda_d": many["lambda_d"]}, frozen, x, base_fn)
        for i in range(4):
            for j in range(2):
                mixed = {"lambda_b": two["lambda_b"][i, j], "lambda_d": many["lambda_d"][i]}
                assert_close(actual[i, j], dense_forward(mixed, frozen, x[i, j], weight), **EXACT)

    @pytest.mark.parametrize(
        ("n", "batch"), [((4,), b) for b in ((), (3,), (2, 4), (1, 4))] + [((1,), (4,)), ((4, 2), (4,))], ids=str
    )
    def test_others_raise_with_both_shapes(self, n, batch):
        params, frozen, _, x, base_fn = rows_of(*n, x=batch)
        for name in params:
            wrong = row(params, (0,) * len(n)) | {name: params[name]}
            with pytest.raises(ValueError, match=name) as error:
                vf.vera_forward(wrong, frozen, x, base_fn)
            assert str(tuple(params[name].shape)) in str(error.value)
            assert str(tuple(x.shape)) in str(error.value)

    def test_under_vmap_shapes_are_those_of_one(self):
        params, frozen, weight, x, base_fn = rows_of(5, 4, x=(5, 4, 2))
        actual = vmap(lambda p, x: vf.vera_forward(p, frozen, x, base_fn))(params, x)
        for i in range(5):
            for j in range(4):
                expected = dense_forward(row(row(params, i), j), frozen, x[i, j], weight)
                assert_close(actual[i, j], expected, **EXACT)
        with pytest.raises(ValueError, match=r"lambda_b \(4, 13\) .* x \(2, 37\)"):
            vmap(lambda p, x: vf.vera_forward(p, frozen, x, base_fn))(params, x[:, 0])

    @pytest.mark.parametrize("n", [(4,), (4, 2)], ids=str)
    def test_gradients_of_rows(self, n):
        params, frozen, weight, x, base_fn = rows_of(*n, x=(4, 2, 3))
        gradient = grad(lambda p: vf.vera_forward(p, frozen, x, base_fn).square().sum())(params)
        for i in range(4):
            for j in range(2) if len(n) > 1 else (slice(None),):
                index = (i, j) if len(n) > 1 else (i,)
                expected = grad(lambda p, i=i, j=j: dense_forward(p, frozen, x[i, j], weight).square().sum())(
                    {key: leaf[index] for key, leaf in params.items()}
                )
                assert_close({key: leaf[index] for key, leaf in gradient.items()}, expected, **EXACT)


class TestMixtures:
    def mixture(self, *rows, k=3):
        params, frozen, weight, x, base_fn = rows_of(*rows, k, x=(*rows, 2))
        weights = torch.linspace(-1, 2, params["lambda_b"][..., 0].numel()).double().reshape(*rows, k)
        return params | {"mixture": weights}, frozen, weight, x, base_fn

    @pytest.mark.parametrize("rows", [(), (4,), (4, 2)], ids=str)
    def test_is_the_sum_of_single_updates(self, rows):
        params, frozen, _, x, base_fn = self.mixture(*rows)
        base = base_fn(x)
        expected = base
        for j in range(3):
            single = {key: params[key][..., j, :] for key in ("lambda_b", "lambda_d")}
            update = vf.vera_forward(single, frozen, x, base_fn) - base
            expected = expected + params["mixture"][..., j].reshape(*rows, *[1] * (x.dim() - len(rows))) * update
        assert_close(vf.vera_forward(params, frozen, x, base_fn), expected, **EXACT)

    @pytest.mark.parametrize("rows", [(), (4,)], ids=str)
    def test_delta_weight_is_what_it_adds(self, rows):
        params, frozen, _, x, base_fn = self.mixture(*rows)
        added = vf.vera_forward(params, frozen, x, base_fn) - base_fn(x)
        delta = vf.delta_weight(params, frozen, IN)
        assert delta.shape == (*rows, OUT, IN)
        assert_close(added, x @ delta.mT, **EXACT)

    def test_dropout(self):
        params, frozen, _, x, base_fn = self.mixture(4)
        mask = vf.dropout_mask(0.5, x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        added = vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask) - base_fn(x)
        assert_close(added, (x * mask) @ vf.delta_weight(params, frozen, IN).mT, **EXACT)

    def test_shapes_that_do_not_fit_raise(self):
        params, frozen, _, x, base_fn = self.mixture(4)
        for change, message in (
            ({"mixture": params["mixture"][:, :2]}, r"leading axes \(4, 2\), the shape \(\*rows, k\) of mixture"),
            ({"mixture": params["mixture"][0]}, r"leading axes \(3,\), the shape"),
            ({"lambda_b": params["lambda_b"][:, 0]}, r"lambda_b \(4, 13\)"),
            ({"lambda_d": params["lambda_d"][0]}, r"lambda_d \(3, 5\)"),
        ):
            with pytest.raises(ValueError, match=message):
                vf.vera_forward(params | change, frozen, x, base_fn)
        with pytest.raises(ValueError, match=r"\(4, 3, 5\) .* \(3, 37\)"):
            vf.vera_forward(params, frozen, x[:3, 0], base_fn)


class TestErrors:
    BAD_PARAMS = pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lambda_d": None}, r"got \['lambda_b'\]"),
            ({"lambda_b": None}, r"got \['lambda_d'\]"),
            ({"vera_lambda_b": torch.ones(OUT)}, "vera_lambda_b"),
            ({"lambda_b": torch.ones(())}, r"lambda_b \(\)"),
            ({"lambda_d": torch.ones(R - 1)}, r"lambda_d \(4,\) implies rank 4, but vera_A \(5, 39\)"),
            ({"lambda_d": torch.ones(R + 1)}, "implies rank 6"),
            ({"lambda_b": torch.ones(OUT + 4)}, r"37 -> 17, but vera_A \(5, 39\) and vera_B \(16, 5\)"),
        ],
    )
    BAD_FROZEN = pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"vera_A": None}, r"frozen lacks \['vera_A'\]"),
            ({"vera_A": None, "vera_B": None}, r"frozen lacks \['vera_A', 'vera_B'\]; init_projections"),
            ({"vera_A": torch.ones(R + 1, IN)}, r"vera_A \(6, 37\) has rank 6 and .* has rank 5"),
            ({"vera_B": torch.ones(OUT, R - 1)}, r"has rank 5 and vera_B \(13, 4\) has rank 4"),
            ({"vera_A": torch.ones(R, IN - 1)}, r"37 -> 13, but vera_A \(5, 36\)"),
            ({"vera_B": torch.ones(OUT - 1, R)}, r"vera_B \(12, 5\) were drawn for at most 39 -> 12"),
        ],
    )

    def calls(self, params, frozen):
        x = torch.ones(3, IN)
        return [
            lambda: vf.vera_forward(params, frozen, x, lambda x: x.new_zeros(3, OUT)),
            lambda: vf.delta_weight(params, frozen, IN),
        ]

    @BAD_PARAMS
    def test_params(self, change, message):
        params, frozen, _, _ = make_layer(dtype=torch.float32)
        params = {key: value for key, value in (params | change).items() if value is not None}
        for call in self.calls(params, frozen):
            with pytest.raises(ValueError, match=message):
                call()

    @BAD_FROZEN
    def test_frozen(self, change, message):
        params, frozen, _, _ = make_layer(dtype=torch.float32)
        frozen = {key: value for key, value in (frozen | change).items() if value is not None}
        for call in self.calls(params, frozen):
            with pytest.raises(ValueError, match=message):
                call()

    def test_init_params(self):
        for sizes in ((0, 3), (3, 0), (-1, 3)):
            with pytest.raises(ValueError, match="must be a positive integer"):
                vf.init_params(*sizes)


class TestDropout:
    def test_mask(self):
        mask = vf.dropout_mask(0.25, (1000, 100), generator=torch.Generator().manual_seed(0))
        zeros = (mask == 0).float().mean().item()
        assert abs(zeros - 0.25) < 0.01
        assert_close(mask[mask != 0], torch.full(((mask != 0).sum(),), 4 / 3))
        # Five standard errors.
        assert abs(mask.mean() - 1) < 5 * (0.25 / 0.75) ** 0.5 / 100_000**0.5
        assert torch.equal(vf.dropout_mask(0.0, (3, 4), generator=torch.Generator()), torch.ones(3, 4))

    def test_is_the_generators(self):
        draw = lambda seed: vf.dropout_mask(0.5, (3, 40), generator=torch.Generator().manual_seed(seed))
        state = torch.get_rng_state()
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        assert torch.equal(torch.get_rng_state(), state)
        generator = torch.Generator().manual_seed(1)
        first, second = (vf.dropout_mask(0.5, (3, 40), generator=generator) for _ in range(2))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, dtype):
        mask = vf.dropout_mask(0.5, (3, 40), generator=torch.Generator().manual_seed(1), dtype=dtype)
        assert mask.dtype == dtype
        # Which entries are dropped does not depend on it.
        assert torch.equal(mask.float(), vf.dropout_mask(0.5, (3, 40), generator=torch.Generator().manual_seed(1)))

    @pytest.mark.parametrize("p", [1.0, -0.1, 1.5, float("nan")])
    def test_refuses(self, p):
        with pytest.raises(ValueError, match="p must be"):
            vf.dropout_mask(p, (3,), generator=torch.Generator())

    def test_drops_inputs_of_the_update_and_not_of_the_base(self):
        params, frozen, _, x, base_fn = rows_of(x=(3, 2))
        mask = vf.dropout_mask(0.5, x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        actual = vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask)
        assert_close(actual, base_fn(x) + (x * mask) @ vf.delta_weight(params, frozen, IN).T, **EXACT)
        assert torch.equal(vf.vera_forward(params, frozen, x, base_fn, dropout_mask=torch.zeros_like(x)), base_fn(x))

    @pytest.mark.parametrize("shape", [(IN,), (1, IN), (3, 1, 1), (3, 2, IN), ()], ids=str)
    def test_masks_broadcast_to_x(self, shape):
        params, frozen, _, x, base_fn = rows_of(x=(3, 2))
        mask = vf.dropout_mask(0.5, shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        actual = vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask)
        expected = vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask.expand(x.shape))
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("shape", [(IN - 1,), (2, 2, IN), (3, IN), (4, 3, 2, IN), (1, 3, 2, IN)], ids=str)
    def test_other_masks_raise(self, shape):
        params, frozen, _, x, base_fn = rows_of(x=(3, 2))
        with pytest.raises(ValueError, match="does not broadcast to x") as error:
            vf.vera_forward(params, frozen, x, base_fn, dropout_mask=torch.ones(shape, dtype=x.dtype))
        assert str(shape) in str(error.value)

    @pytest.mark.parametrize("randomness", ["different", "same"])
    def test_under_vmap(self, randomness):
        params, frozen, _, x, base_fn = rows_of(x=(3, 2))
        stacked = vf.stack_adapters([params] * 4)
        generator = torch.Generator().manual_seed(0)

        def f(params):
            mask = vf.dropout_mask(0.5, x.shape, generator=generator, dtype=x.dtype)
            return vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask), mask

        outputs, masks = vmap(f, randomness=randomness)(stacked)
        assert len(masks.unique(dim=0)) == {"different": 4, "same": 1}[randomness]
        for output, mask in zip(outputs, masks, strict=True):
            assert_close(output, vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask), **EXACT)
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(f)(stacked)


sizes = st.integers(1, 17)


class TestLaws:
    @settings(max_examples=40, deadline=None)
    @given(out=sizes, in_=sizes, r=sizes, seed=st.integers(0, 99))
    def test_delta_weight_is_what_forward_adds(self, out, in_, r, seed):
        params, frozen, weight, x = make_layer(out=out, in_=in_, r=r, seed=seed)
        base_fn = lambda x: x @ weight.T
        added = vf.vera_forward(params, frozen, x, base_fn) - base_fn(x)
        delta = vf.delta_weight(params, frozen, in_)
        assert delta.shape == (out, in_)
        assert_close(added, x @ delta.T, rtol=1e-8, atol=1e-9)
        # And the oracle says so, too.
        assert_close(base_fn(x) + x @ delta.T, dense_forward(params, frozen, x, weight), rtol=1e-8, atol=1e-9)

    @settings(max_examples=25, deadline=None)
    @given(out=sizes, in_=sizes, r=sizes, a=st.floats(-3, 3), b=st.floats(-3, 3))
    def test_the_update_is_linear_in_each_vector(self, out, in_, r, a, b):
        params, frozen, weight, x = make_layer(2, out=out, in_=in_, r=r)
        update = lambda p: vf.vera_forward(p, frozen, x, lambda x: x @ weight.T) - x @ weight.T
        for name in params:
            first, second = (row(params, 0) | {name: params[name][i]} for i in range(2))
            combined = first | {name: a * first[name] + b * second[name]}
            assert_close(update(combined), a * update(first) + b * update(second), rtol=1e-8, atol=1e-8)

    @settings(max_examples=25, deadline=None)
    @given(n=st.integers(1, 4), batch=st.integers(1, 4), seq=st.integers(0, 4), seed=st.integers(0, 9))
    def test_rows_are_one_adapter_each(self, n, batch, seq, seed):
        params, frozen, weight, _ = make_layer(n, seed=seed)
        x = torch.randn(n, *[batch] * bool(seq), *[seq] * (seq > 1), IN, dtype=torch.float64)
        base_fn = lambda x: x @ weight.T
        actual = vf.vera_forward(params, frozen, x, base_fn)
        for i in range(n):
            assert_close(actual[i], vf.vera_forward(row(params, i), frozen, x[i], base_fn), rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("dora", [None, "magnitude", "output_scale"])
    @pytest.mark.parametrize("axes", [(1, 2, 2), (2, 1, 1), (2, 2, 1), (1, 0, 2)], ids=str)
    def test_delta_weight_matches_rows_from_the_left(self, axes, dora):
        params, frozen, weight, _ = make_layer(2, 2, dora=True)
        if dora != "magnitude":
            scale = params.pop("magnitude")
            params |= {"output_scale": scale} if dora else {}
        for n, key in zip(axes, list(params), strict=False):
            params[key] = params[key][(slice(None),) * n + (0,) * (2 - n)]
        x = torch.randn(2, 2, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        update = vf.vera_forward(params, frozen, x, lambda x: x @ weight.T) - x @ weight.T
        delta = vf.delta_weight(params, frozen, IN, weight)
        delta = delta[:, None] if delta.dim() == 3 else delta
        assert_close((delta @ x[..., None])[..., 0], update, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("n", [(), (4,), (4, 2)], ids=str)
    def test_delta_weight_of_stacks(self, n):
        params, frozen, _, _ = make_layer(*n)
        delta = vf.delta_weight(params, frozen, IN)
        assert delta.shape == (*n, OUT, IN)
        index = (0,) * len(n)
        A, B = frozen["vera_A"][:, :IN], frozen["vera_B"][:OUT]
        one = {key: leaf[index] for key, leaf in params.items()}
        assert_close(delta[index], torch.diag(one["lambda_b"]) @ B @ torch.diag(one["lambda_d"]) @ A, **EXACT)

    def test_a_fresh_adapter_is_the_base(self):
        _, frozen, weight, x = make_layer(dtype=torch.float32)
        params = vf.init_params(R, OUT, 0.25)
        assert_close(params, {"lambda_b": torch.zeros(OUT), "lambda_d": torch.full((R,), 0.25)}, rtol=0, atol=0)
        base_fn = lambda x: x @ weight.T
        assert torch.equal(vf.vera_forward(params, frozen, x, base_fn), base_fn(x))
        assert not vf.delta_weight(params, frozen, IN).any()

    def test_a_fresh_adapter_is_where_and_what_was_asked_for(self):
        params = vf.init_params(R, OUT, dtype=torch.bfloat16, device="meta")
        assert {(leaf.dtype, leaf.device.type) for leaf in params.values()} == {(torch.bfloat16, "meta")}

    def test_inputs_are_not_modified(self):
        params, frozen, _, x, base_fn = rows_of(4, x=(4, 2))
        mask = torch.ones_like(x)
        mixed = {key: leaf[:, None] for key, leaf in params.items()} | {"mixture": torch.ones(4, 1).double()}
        inputs = (params, frozen, x, mask, mixed)
        before = copy.deepcopy(inputs)
        vf.vera_forward(params, frozen, x, base_fn, dropout_mask=mask)
        vf.vera_forward(mixed, frozen, x, base_fn)
        vf.delta_weight(params, frozen, IN)
        grad(lambda p: vf.vera_forward(p, frozen, x, base_fn).sum())(params)
        assert_close(inputs, before, rtol=0, atol=0)

    def test_backward_keeps_r_numbers_a_row(self):
        params, frozen, _, x, _ = rows_of(x=(4, 2))
        params, kept = {key: value.requires_grad_() for key, value in params.items()}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
            vf.vera_forward(params, frozen, x, lambda x: x.new_zeros(4, 2, OUT))
        assert {shape for shape in kept if len(shape) == 3} == {(4, 2, R)}

    def test_a_base_that_reuses_its_memory_is_not_written_to(self):
        params, frozen, _, x, base_fn = rows_of(x=(3,))
        kept = base_fn(x)
        before = kept.clone()
        vf.vera_forward(params, frozen, x, lambda x: kept)
        assert torch.equal(kept, before)


class TestDtypes:
    @pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_one_cast_at_the_end(self, x_dtype, base, vectors):
        params, frozen, weight, x = make_layer()
        params = {key: value.to(vectors) for key, value in params.items()}
        frozen = {key: value.float() for key, value in frozen.items()}
        x, weight = x.to(x_dtype), weight.to(base)
        base_fn = lambda x: x.to(base) @ weight.T
        actual = vf.vera_forward(params, frozen, x, base_fn)
        # PEFT's lines, letter by letter: products in the vectors' dtype, the sum promoted, then two casts.
        A, B = frozen["vera_A"][:, :IN].to(vectors), frozen["vera_B"][:OUT].to(vectors)
        update = params["lambda_b"] * nn.functional.linear(
            params["lambda_d"] * nn.functional.linear(x.to(vectors), A), B
        )
        assert torch.equal(actual, (base_fn(x) + update).to(base).to(x_dtype))
        assert actual.dtype == x_dtype

    def test_the_sum_is_rounded_once(self):
        # 1 + 2⁻⁸ and 2⁻⁸ add up to a bfloat16 number; were either sum rounded on the way, the result would be 1.
        params = {"lambda_b": torch.tensor([2.0**-8]), "lambda_d": torch.ones(1)}
        frozen = {"vera_A": torch.ones(1, 1), "vera_B": torch.ones(1, 1)}
        y = vf.vera_forward(params, frozen, torch.ones(1).bfloat16(), lambda x: x.float() + 2**-8)
        assert y.dtype == torch.bfloat16
        assert y.item() == 1 + 2**-7

    def test_delta_weight_is_in_the_vectors_dtype(self):
        params, frozen, _, _ = make_layer(dtype=torch.float32)
        for dtype in (torch.float64, torch.bfloat16):
            cast = {key: value.to(dtype) for key, value in params.items()}
            assert vf.delta_weight(cast, frozen, IN).dtype == dtype

    def test_float64_gradients_through_a_bfloat16_base(self):
        params, frozen, weight, x = make_layer(dtype=torch.float32)
        weight, x = weight.bfloat16(), x.bfloat16()
        gradient = grad(lambda p: vf.vera_forward(p, frozen, x, lambda x: x @ weight.T).float().sum())(params)
        assert {value.dtype for value in gradient.values()} == {torch.float32}
        # The cast at the end passes the gradient on unrounded, as it is one in every entry.
        expected = grad(lambda p: (x.float() @ vf.delta_weight(p, frozen, IN).T).sum())(params)
        assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


# What is refused

bad = Refused()


def forward(params=None, frozen=None, x=X, base=lambda x: x[..., :32], mask=None):
    return vf.vera_forward(LAYER | (params or {}), frozen or PAIR, x, base, dropout_mask=mask)


for r in (0, -1, 2.5, "4", None, True, INF):
    bad("init_params", f"r={r!r}", lambda _, r=r: vf.init_params(r, 3), f"r must be a positive integer, got {r!r}")

bad("init_params", "out=0", lambda _: vf.init_params(4, 0), "out_features must be a positive integer, got 0")
bad("init_params", "d of NaN", lambda _: vf.init_params(4, 3, NAN), "d_initial must be finite, got nan")
bad("init_params", "d of inf", lambda _: vf.init_params(4, 3, -INF), "d_initial must be finite, got -inf")

for dtype in (torch.int32, torch.bool, "float32"):
    bad(
        "init_params", f"dtype={dtype!r}", lambda _, dtype=dtype: vf.init_params(4, 3, dtype=dtype),
        f"dtype must be a floating-point dtype, got {dtype!r}",
    )  # fmt: skip

for p in (1.0, -0.5, NAN):
    bad(
        "dropout_mask", f"p={p}", lambda _, p=p: vf.dropout_mask(p, (2,), generator=torch.Generator()),
        f"p must be at least 0 and below 1, got {p}",
    )  # fmt: skip

bad("vera_forward", "a LoRA factor", lambda _: forward({"alpha": ones(())}), "keys 'lambda_b' and 'lambda_d'")
bad("vera_forward", "None for a vector", lambda _: forward({"lambda_d": None}), "lambda_d must be a floating")
bad("vera_forward", "a list", lambda _: forward({"lambda_d": [1.0] * 4}), "lambda_d must be a .*, got list")
bad("vera_forward", "integers", lambda _: forward({"lambda_d": ones(4).long()}), "lambda_d .*got .* torch.int64")
bad("vera_forward", "complex", lambda _: forward({"lambda_b": ones(32) + 0j}), "lambda_b .*got .* torch.complex64")
bad("vera_forward", "a scalar vector", lambda _: forward({"lambda_d": ones(())}), r"lambda_d \(\) must have")
bad("vera_forward", "another rank", lambda _: forward({"lambda_d": ones(5)}), r"implies rank 5, but vera_A \(4, 64\)")
bad("vera_forward", "one lambda_b for all", lambda _: forward({"lambda_b": ones(1)}), r"is for 1 outputs.*\(3, 32\)")
bad("vera_forward", "lambda_b too short", lambda _: forward({"lambda_b": ones(31)}), "is for 31 outputs")
bad("vera_forward", "a base of one output", lambda _: forward(base=lambda x: x[..., :1]), r"has shape \(3, 1\)")
bad("vera_forward", "half a mixture", lambda _: forward({"mixture": ones(2)}), r"leading axes \(2,\), the shape")
bad("vera_forward", "half the pair", lambda _: forward(frozen={"vera_A": ones(4, 64)}), r"frozen lacks \['vera_B'\]")
bad("vera_forward", "a flat A", lambda _: forward(frozen=PAIR | {"vera_A": ones(4)}), r"vera_A must have .*got \(4,\)")
bad("vera_forward", "a stack of A", lambda _: forward(frozen=PAIR | {"vera_A": ones(4, 64, 1)}), r"\(4, 64, 1\)")
bad("vera_forward", "a narrow A", lambda _: forward(frozen=vf.init_projections(4, 63, 32)), "layer is 64 -> 32, but")
bad(
    "vera_forward", "no data", lambda _: forward(frozen={k: v.to("meta") for k, v in PAIR.items()}),
    "vera_A is on meta, vera_B on meta, lambda_b on cpu and lambda_d on cpu",
)  # fmt: skip
bad("vera_forward", "a scalar x", lambda _: forward(x=ones(())), r"x must be a floating-point tensor .*got \(\)")
bad("vera_forward", "x of integers", lambda _: forward(x=X.long()), r"got \(3, 64\) torch.int64")
bad("vera_forward", "x as a list", lambda _: forward(x=[1.0] * 64), "got list")
bad("vera_forward", "x without features", lambda _: forward(x=ones(3, 0)), "got in = 0")
bad("vera_forward", "a mask for others", lambda _: forward(mask=ones(5)), r"dropout_mask \(5,\) does not broadcast")

for size in (0, -1):
    bad("delta_weight", f"in={size}", lambda _, n=size: vf.delta_weight(LAYER, PAIR, n), f"got in = {size}")

bad(
    "vera_forward",
    "a base of one row",
    lambda _: vf.vera_forward(LAYER, PAIR, ones(3, 64), lambda x: ones(1, 32)),
    r"base_fn\(x\) must have shape \(3, 32\) for an x of shape \(3, 64\), got \(1, 32\)",
)
bad(
    "vera_forward",
    "integer projections",
    lambda _: forward(frozen=PAIR | {"vera_A": PAIR["vera_A"].int()}),
    "must be floating-point tensors, got torch.int32 and torch.float32",
)
bad("delta_weight", "in of 65", lambda _: vf.delta_weight(LAYER, PAIR, 65), "were drawn for at most 64 -> 32")
bad(
    "delta_weight",
    "other rows",
    lambda _: vf.delta_weight({"lambda_b": ones(2, 32), "lambda_d": ones(3, 4)}, PAIR, 64),
    "leading axes of lambda_b .2, 32., lambda_d .3, 4. do not match",
)
bad("delta_weight", "no lambda_d", lambda _: vf.delta_weight({"lambda_b": ones(32)}, PAIR, 64), r"got \['lambda_b'\]")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

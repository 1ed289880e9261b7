"""`vmap_adapters` means `vmap`, and is one call with the adapter axis folded into the batch axis."""

from functools import partial

import pytest
import torch
from torch import nn, ones
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf

from helpers import (
    assert_near,
    assert_same,
    build,
    left_padded,
    normal,
    randomized,
    row,
    several,
    small,
    snapshot,
    tokens,
)
from refused import ADAPTED, FROZEN, STACK, Refused


R, N = 8, 4
# torch's vmap goes through fused attention in a loop, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
# in_dims, the positional and the keyword arguments; four adapters over a batch of three.
FOLDS = {
    "mapped": (0, (normal(N, 3, 7),), {}),
    "shared": (None, (normal(3, 7),), {}),
    "one row shared": (None, (normal(1, 7),), {}),
    "another axis": (1, (normal(3, N, 7),), {}),
    "the last axis": (2, (normal(3, 7, N),), {}),
    "a negative axis": (-1, (normal(3, 7, N),), {}),
    "a sequence": ((1, None), (normal(3, N, 7), normal(3, 7, seed=1)), {}),
    "a list": ([None, 0], (normal(3, 7), normal(N, 3, 7, seed=1)), {}),
    "one row for all, of one of them": ((0, None), (normal(N, 3, 7), normal(1, 7, seed=1)), {}),
    "keywords": (0, (), {"x": normal(N, 3, 7), "z": normal(N, 3, 7, seed=1)}),
    "keywords by name": ({"z": None}, (), {"x": normal(N, 3, 7), "z": normal(3, 7, seed=1)}),
    "a keyword on another axis": ({"x": 1}, (), {"x": normal(3, N, 7), "z": normal(N, 3, 7, seed=1)}),
    "both": (None, (normal(3, 7),), {"z": normal(3, 7, seed=1)}),
    "single inputs": (0, (normal(N, 7),), {}),
    "a single shared input": (None, (normal(7),), {}),
    "single inputs on another axis": (1, (normal(7, N),), {}),
    "more axes": (0, (normal(N, 3, 2, 7),), {}),
    "a batch as large as there are adapters": (0, (normal(N, N, 7),), {}),
    "a batch of one": (0, (normal(N, 1, 7),), {}),
    "no rows": (0, (normal(N, 0, 7),), {}),
}


class TestVmapAdapters:
    @pytest.mark.parametrize("chunk_size", [None, 1, 3, 4, 100])
    @pytest.mark.parametrize("case", FOLDS)
    def test_means_vmap(self, case, chunk_size):
        in_dims, args, kwargs = FOLDS[case]
        adapted = small()
        stacked, frozen = several(adapted), adapted.frozen
        f = lambda p, frozen, x, z=0.0: adapted.apply(p, frozen, x + z)
        before = snapshot(stacked, list(args), kwargs)
        actual = vf.vmap_adapters(f, in_dims, chunk_size=chunk_size)(stacked, frozen, *args, **kwargs)
        # torch.func.vmap maps keyword arguments over axis 0, always.
        names = list(kwargs)
        by_position = list(in_dims) if isinstance(in_dims, tuple | list) else [in_dims] * len(args)
        by_name = [in_dims.get(name, 0) if isinstance(in_dims, dict) else in_dims for name in names]
        call = lambda p, *rest: f(p, frozen, *rest[: len(args)], **dict(zip(names, rest[len(args) :], strict=True)))
        expected = vmap(call, (0, *by_position, *by_name))(stacked, *args, *kwargs.values())
        assert_close(actual, expected)
        assert_same(snapshot(stacked, list(args), kwargs), before)

    def test_nested_inputs_and_outputs(self):
        adapted = small()
        stacked = several(adapted)

        def f(params, frozen, batch, scale):
            y = adapted.apply(params, frozen, batch["x"][0] + batch["y"])
            return {"y": (y, [y.sum(-1)]), "scaled": y * scale, "name": "f", "none": None}

        batch = {"x": [normal(N, 3, 7)], "y": normal(N, 3, 7, seed=1)}
        for chunk_size in (None, 3):
            out = vf.vmap_adapters(f, chunk_size=chunk_size)(stacked, adapted.frozen, batch, 2.5)
            assert out["name"] == "f"
            assert out["none"] is None
            for i in range(N):
                expected = f(row(stacked, i), adapted.frozen, {"x": [batch["x"][0][i]], "y": batch["y"][i]}, 2.5)
                assert_close(out["y"][0][i], expected["y"][0])
                assert_close(out["y"][1][0][i], expected["y"][1][0])
                assert_close(out["scaled"][i], expected["scaled"])

    def test_model_outputs(self):
        apply, _, frozen, _ = adapted = build()
        stacked, ids = several(adapted), tokens(N, 2, 6)
        for chunk_size in (None, 3):
            out = vf.vmap_adapters(apply, chunk_size=chunk_size)(
                stacked, frozen, input_ids=ids, output_hidden_states=True
            )
            one = apply(row(stacked, 3), frozen, input_ids=ids[3], output_hidden_states=True)
            assert type(out) is type(one)
            assert len(out.hidden_states) == len(one.hidden_states) == 3
            for actual, expected in zip(out.hidden_states, one.hidden_states, strict=True):
                assert_near(actual[3], expected)

    def test_labels_and_losses(self):
        apply, _, frozen, _ = adapted = build("bert", task_type="SEQ_CLS")
        stacked, ids, labels = several(adapted), tokens(N, 2, 6), torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])

        def losses(params, frozen, ids, labels):
            logits = apply(params, frozen, input_ids=ids).logits
            return nn.functional.cross_entropy(logits, labels, reduction="none")

        actual = vf.vmap_adapters(losses)(stacked, frozen, ids, labels)
        assert actual.shape == (N, 2)
        mean = lambda p, i: losses(p, frozen, ids[i], labels[i]).mean()
        assert_near(actual.mean(1), torch.stack([mean(row(stacked, i), i) for i in range(N)]))
        gradient = grad(lambda s: vf.vmap_adapters(losses)(s, frozen, ids, labels).mean(1).sum())(stacked)
        for i in range(N):
            expected = grad(mean)(row(stacked, i), i)
            scale = max(value.abs().max() for value in expected.values())
            for key, value in expected.items():
                assert (gradient[key][i] - value).abs().max() <= 1e-5 * scale

    def test_a_mean_loss_raises(self):
        apply, _, frozen, _ = adapted = build()
        stacked, ids = several(adapted), tokens(N, 2, 6)
        with pytest.raises(
            ValueError, match=r"output.*loss.* of shape \(\) has no axis of 8 rows, so it mixes adapters"
        ):
            vf.vmap_adapters(apply)(stacked, frozen, input_ids=ids, labels=ids)
        with pytest.raises(ValueError, match="mixes adapters"):
            vf.vmap_adapters(lambda *a: small().apply(*a).mean(0))(several(small()), small().frozen, normal(N, 3, 7))
        # torch's own map gives each adapter its mean.
        losses = vmap(lambda p, ids: apply(p, frozen, input_ids=ids, labels=ids).loss)(stacked, ids)
        expected = torch.stack([apply(row(stacked, i), frozen, input_ids=ids[i], labels=ids[i]).loss for i in range(N)])
        assert_near(losses, expected)

    # transformers 5.24 calls it `cache`, which older ones do not know.
    @pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
    @pytest.mark.parametrize("base", ["dense", "nested"])
    def test_decodes_with_the_folded_cache(self, base):
        apply, _, frozen, _ = adapted = build(base=base)
        stacked, ids, mask = several(adapted), tokens(N, 2, 6), left_padded(N, 2, 6)
        f = vf.vmap_adapters(apply)
        whole = torch.stack(
            [apply(row(stacked, i), frozen, input_ids=ids[i], attention_mask=mask[i]).logits for i in range(N)]
        )
        out = f(stacked, frozen, input_ids=ids[..., :3], attention_mask=mask[..., :3], use_cache=True)
        # Positions are the mask's, as transformers' generate passes them; here, none is padded after the third token.
        assert mask[..., 3:].all()
        for step in range(3, 6):
            out = f(
                stacked, frozen, input_ids=ids[..., step : step + 1], attention_mask=mask[..., : step + 1],
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
            assert_near(out.logits[..., -1, :], whole[..., step, :])

    def test_generates(self):
        apply, _, frozen, _ = adapted = build()
        stacked, ids = several(adapted, scale=2.0), tokens(N, 2, 5)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = vf.vmap_adapters(apply.generate)(
            stacked, frozen, ids, attention_mask=torch.ones_like(ids), **options
        )
        for i in range(N):
            alone = apply.generate(row(stacked, i), frozen, ids[i], attention_mask=torch.ones_like(ids[i]), **options)
            assert torch.equal(together[i], alone)

    def test_is_one_call(self):
        adapted = small()
        calls = []

        def f(params, frozen, x):
            calls.append(x.shape)
            return adapted.apply(params, frozen, x)

        vf.vmap_adapters(f)(several(adapted), adapted.frozen, normal(N, 3, 7))
        vf.vmap_adapters(f, chunk_size=3)(several(adapted), adapted.frozen, normal(N, 3, 7))
        assert calls == [(12, 7), (9, 7), (3, 7)]

    @pytest.mark.parametrize(
        ("options", "args", "kwargs", "message"),
        [
            ({}, (normal(3, 2, 7),), {}, r"shape \(3, 2, 7\) must have size 4 .* along axis 0"),
            ({"in_dims": 1}, (normal(N, 2, 7),), {}, r"\(4, 2, 7\) must have size 4 .* along axis 1"),
            ({"in_dims": (0, 0)}, (normal(N, 2, 7),), {}, "2 entries for 1 positional"),
            ({"in_dims": {"y": 0}}, (), {"x": normal(N, 2, 7)}, r"in_dims names \['y'\]"),
            ({}, (normal(N, 3, 7), normal(N, 2, 7)), {}, "3 and 2 rows|2 and 3 rows"),
            ({}, (normal(N, 3, 7), torch.ones(N)), {}, "one number for each adapter"),
            ({}, (torch.ones(()),), {}, r"an input of shape \(\) must have size 4"),
            ({"in_dims": 3}, (normal(N, 3, 7),), {}, "along axis 3"),
        ],
    )  # fmt: skip
    def test_refuses(self, options, args, kwargs, message):
        adapted = small()
        f = lambda p, frozen, x, z=0.0: adapted.apply(p, frozen, x + z)
        with pytest.raises(ValueError, match=message):
            vf.vmap_adapters(f, **options)(several(adapted), adapted.frozen, *args, **kwargs)

    def test_refuses_chunks(self):
        adapted = small()
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"got {size}"):
                vf.vmap_adapters(adapted.apply, chunk_size=size)
        counter = iter(range(9))
        f = lambda p, frozen, x: (adapted.apply(p, frozen, x), next(counter))
        with pytest.raises(ValueError, match="type int can't be concatenated"):
            vf.vmap_adapters(f, chunk_size=2)(several(adapted), adapted.frozen, normal(N, 3, 7))

    def test_dropout_differs_by_adapter(self):
        adapted = small(vera_dropout=0.5)
        stacked = vf.stack_adapters([randomized(adapted.params)] * N)
        x = normal(3, 7)
        folded = vf.vmap_adapters(adapted.apply.with_dropout(torch.Generator().manual_seed(0)), None)
        assert len(folded(stacked, adapted.frozen, x).unique(dim=0)) == N
        exact = vf.vmap_adapters(adapted.apply, None)(stacked, adapted.frozen, x)
        assert_close(exact, exact[:1].expand(N, 3, 3))

    def test_under_transforms(self):
        adapted = small()
        stacked, x = several(adapted), normal(N, 3, 7)
        f = lambda s, x: vf.vmap_adapters(adapted.apply)(s, adapted.frozen, x)
        populations = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in stacked.items()}
        expected = torch.stack([f(row(populations, i), x) for i in range(2)])
        assert_close(vmap(f, (0, None))(populations, x), expected)
        compiled = torch.compile(partial(f, x=x), fullgraph=True, backend="aot_eager")
        assert_close(compiled(stacked), f(stacked, x))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_adapters(chunk_size):
    apply, params, frozen, _ = vf.adapt(nn.Linear(7, 5), vf.VeraConfig(r=R, target_modules=".*"))
    none = {key: leaf[:0] for key, leaf in vf.stack_adapters([params]).items()}
    f = vf.vmap_adapters(apply, None, chunk_size=chunk_size)
    assert f(none, frozen, normal(3, 7)).shape == (0, 3, 5)


# in_dims as torch.func.vmap takes it, over (params, frozen, *batch), the axis of the adapters in params, the batch.
TUPLES = {
    "params alone": ((0, None, None), 0, (normal(3, 7),)),
    "both": ((0, None, 0), 0, (normal(N, 3, 7),)),
    "other axes": ((1, None, 1), 1, (normal(3, N, 7),)),
    "the last axis": ((-1, None, -1), -1, (normal(3, 7, N),)),
    "two arguments": ((0, None, None, 0), 0, (normal(3, 7), normal(N, 3, 7, seed=1))),
    "a nested argument": ((0, None, {"x": None, "z": 0}), 0, ({"x": normal(3, 7), "z": normal(N, 3, 7, seed=1)},)),
}


@pytest.mark.parametrize("case", TUPLES)
def test_a_tuple_over_all_arguments_means_what_vmap_gives_it(case):
    in_dims, axis, batch = TUPLES[case]
    model = nn.Linear(7, 5)
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=R, target_modules=".*"))

    def f(params, frozen, x, z=0.0):
        x, z = (x["x"], x["z"]) if isinstance(x, dict) else (x, z)
        return apply(params, frozen, x + z)

    stacked = vf.stack_adapters([randomized(params, seed) for seed in range(N)])
    given = {key: leaf.movedim(0, axis).contiguous() for key, leaf in stacked.items()}
    expected = vmap(f, in_dims)(given, frozen, *batch)
    assert_close(vf.vmap_adapters(f, in_dims)(given, frozen, *batch), expected, rtol=1e-5, atol=1e-6)
    each = (dict.fromkeys(stacked, axis), *in_dims[1:])
    assert_close(vf.vmap_adapters(f, each)(given, frozen, *batch), expected, rtol=1e-5, atol=1e-6)


def test_a_tuple_that_maps_what_is_shared():
    apply, params, frozen, _ = vf.adapt(nn.Linear(7, 5), vf.VeraConfig(r=R, target_modules=".*"))
    stacked = vf.stack_adapters([params] * N)
    with pytest.raises(ValueError, match=r"in_dims\[1\] must be None, since all adapters share frozen, got 0"):
        vf.vmap_adapters(apply, (0, 0, None))(stacked, frozen, normal(3, 7))
    with pytest.raises(ValueError, match=r"in_dims\[0\] must be the axis of the adapters in params"):
        vf.vmap_adapters(apply, (None, None, 0))(params, frozen, normal(N, 3, 7))


# What is refused

bad = Refused()


for size in (0, -1, 1.5, "2"):
    bad(
        "vmap_adapters", f"chunks of {size!r}", lambda _, n=size: vf.vmap_adapters(ADAPTED.apply, chunk_size=n),
        f"chunk_size must be positive or None, got {size}",
    )  # fmt: skip

bad("vmap_adapters", "an Adapted", lambda _: vf.vmap_adapters(ADAPTED), "function of .params.*, got Adapted")

for dims in ("0", 1.5):
    bad(
        "vmap_adapters", f"in_dims={dims!r}", lambda _, d=dims: vf.vmap_adapters(ADAPTED.apply, d), "in_dims must be an"
    )

bad(
    "vmap_adapters",
    "an axis too far",
    lambda _: vf.vmap_adapters(ADAPTED.apply, 9)(STACK, FROZEN, ones(3, 2, 7)),
    "axis 9",
)
bad(
    "vmap_adapters",
    "two for three",
    lambda _: vf.vmap_adapters(ADAPTED.apply)(STACK, FROZEN, ones(2, 2, 7)),
    r"size 3 \(the number of adapters\)",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

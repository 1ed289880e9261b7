"""Per-example gradients are those of a loop over the examples, from one call of the loss."""

import pytest
import torch
from torch import nn, ones
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import vera_func as vf
from vera_func.train.per_example import per_example_norms

from helpers import (
    BASES,
    TARGETS,
    TOLERANCE,
    TRANSFORMS,
    build,
    dense_forward,
    gpt2,
    left_padded,
    llama,
    make_base,
    make_layer,
    randomized,
    relative_error,
    small,
    squared,
    tokens,
)
from refused import ADAPTED, FROZEN, NAN, PARAMS, STACK, Refused


ROWS, SEQ = 5, 9


def language_loss(adapted, batch):
    """The mean next-token loss of each row over its own tokens."""

    def loss_rows(rows, batch):
        logits = adapted.apply(rows, adapted.frozen, input_ids=batch["ids"], attention_mask=batch["mask"]).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        real = batch["mask"][:, :-1]
        return (losses * real).sum(1) / real.sum(1)

    return loss_rows


def loop(loss_rows, params, batch, n):
    """The oracle: the gradient of each example alone, its padding included."""
    one = [
        vf.grad(lambda p, i=i: loss_rows(p, {k: v[i : i + 1] for k, v in batch.items()}).sum())(params)
        for i in range(n)
    ]
    return {key: torch.stack([grads[key] for grads in one]) for key in params}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("base", ["dense", "nf4", "nested", "int8"])
def test_equals_a_loop_with_padding(base, name):
    adapted = build(name, base)
    params = randomized(adapted.params)
    batch = {"ids": tokens(ROWS, SEQ), "mask": left_padded(ROWS, SEQ)}
    loss_rows = language_loss(adapted, batch)
    found = vf.per_example_grads(loss_rows, params, batch)
    for key, expected in loop(loss_rows, params, batch, ROWS).items():
        assert found[key].shape == (ROWS, *params[key].shape)
        assert expected.abs().amax(tuple(range(1, expected.dim()))).min() > 0
        assert relative_error(found[key], expected) <= 1e-6, key


def test_padding_does_not_reach_the_gradients():
    adapted = build("llama")
    params = randomized(adapted.params)
    batch = {"ids": tokens(ROWS, SEQ), "mask": left_padded(ROWS, SEQ)}
    loss_rows = language_loss(adapted, batch)
    found = vf.per_example_grads(loss_rows, params, batch)
    for i in range(ROWS):
        real = int(batch["mask"][i].sum())
        short = {"ids": batch["ids"][i : i + 1, -real:], "mask": ones(1, real, dtype=torch.long)}
        alone = vf.grad(lambda p, short=short: loss_rows(p, short).sum())(params)
        for key, expected in alone.items():
            assert relative_error(found[key][i], expected) <= 1e-5, key


@pytest.mark.parametrize("model", [llama, gpt2])
def test_equals_a_loop_in_float64(model):
    name = model.__name__
    adapted = vf.adapt(model(torch.float64), vf.VeraConfig(r=4, target_modules=TARGETS[name]))
    params = {key: p.double() for key, p in randomized(adapted.params).items()}
    batch = {"ids": tokens(ROWS, SEQ), "mask": left_padded(ROWS, SEQ)}
    loss_rows = language_loss(adapted, batch)
    expected = loop(loss_rows, params, batch, ROWS)
    assert_close(vf.per_example_grads(loss_rows, params, batch), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_heads_and_biases(base):
    adapted = build("bert", base, modules_to_save=["classifier"], bias="all")
    params = randomized(adapted.params)
    assert {"classifier.weight", "bert.encoder.layer.0.output.LayerNorm.bias"} <= params.keys()
    batch = {"ids": tokens(ROWS, SEQ), "mask": ones(ROWS, SEQ, dtype=torch.long), "label": tokens(ROWS) % 3}
    batch["mask"][1::2, 6:] = 0

    def loss_rows(rows, batch):
        out = adapted.apply(rows, adapted.frozen, input_ids=batch["ids"], attention_mask=batch["mask"])
        return cross_entropy(out.logits, batch["label"], reduction="none")

    found, expected = vf.per_example_grads(loss_rows, params, batch), loop(loss_rows, params, batch, ROWS)
    assert found.keys() == params.keys()
    scale = max(leaf.abs().max() for leaf in expected.values())
    for key in params:
        # The bias of keys has no effect in attention, so that its gradient is nothing but rounding.
        assert (found[key] - expected[key]).abs().max() <= 1e-6 * max(expected[key].abs().max(), 1e-2 * scale), key


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("base", BASES)
def test_composes_with_transforms(base, transform):
    params, frozen, weight, x = make_layer(out=5, in_=7, r=3)
    base_fn, dense = make_base(base, weight)
    loss_rows = lambda rows, x: vf.vera_forward(rows, frozen, x, base_fn).square().sum(1)
    dense_loss = squared(lambda p, x: dense_forward(p, frozen, x, dense))

    def flat(grads):
        return torch.cat([leaf.flatten() for leaf in grads.values()])

    apply = TRANSFORMS[transform]
    found = apply(lambda p: flat(vf.per_example_grads(loss_rows, p, x)))(params)
    expected = apply(lambda p: flat(torch.func.vmap(torch.func.grad(dense_loss), (None, 0))(p, x)))(params)
    assert_close(found, expected, **TOLERANCE[torch.float64])


def test_vmap_over_adapters():
    stacked, frozen, weight, x = make_layer(4)
    loss_rows = lambda rows, x: vf.vera_forward(rows, frozen, x, lambda x: x @ weight.T).square().sum(1)
    found = torch.func.vmap(lambda p: vf.per_example_grads(loss_rows, p, x))(stacked)
    for i, params in enumerate(vf.unstack_adapters(stacked)):
        assert_close({k: v[i] for k, v in found.items()}, vf.per_example_grads(loss_rows, params, x))


def test_compiles():
    params, frozen, weight, x = make_layer(dtype=torch.float32)
    loss_rows = lambda rows, x: vf.vera_forward(rows, frozen, x, lambda x: x @ weight.T).square().sum(1)
    call = lambda p, x: vf.per_example_grads(loss_rows, p, x)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, x), call(params, x), rtol=1e-4, atol=1e-4)


def test_the_model_runs_once_and_copies_are_views():
    adapted, seen = small(), []

    def loss_rows(rows, x):
        seen.append({key: leaf.untyped_storage().nbytes() for key, leaf in rows.items()})
        return adapted.apply(rows, adapted.frozen, x).square().mean(1)

    params = {key: p.clone() for key, p in randomized(adapted.params).items()}
    found = vf.per_example_grads(loss_rows, params, torch.ones(6, 7))
    assert seen == [{key: p.untyped_storage().nbytes() for key, p in params.items()}]
    assert not any(leaf.requires_grad for leaf in found.values())
    with torch.no_grad():
        again = vf.per_example_grads(loss_rows, params, torch.ones(6, 7))
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_the_number_of_rows():
    adapted = small()
    texts = [torch.ones(7), torch.zeros(7)]
    by_index = lambda rows, indices: (
        adapted.apply(rows, adapted.frozen, torch.stack([texts[i] for i in indices])).square().mean(1)
    )
    found = vf.per_example_grads(by_index, adapted.params, [0, 1, 0], num_rows=3)
    assert_close(found["0.lambda_b"][0], found["0.lambda_b"][2])
    assert not torch.allclose(found["0.lambda_b"][0], found["0.lambda_b"][1])
    one = vf.per_example_grads(by_index, adapted.params, torch.tensor([0]))
    assert_close(one["0.lambda_b"], found["0.lambda_b"][:1])
    empty = vf.per_example_grads(lambda rows, batch: 1 / 0, adapted.params, {"x": torch.ones(0, 7)})
    assert {key: leaf.shape for key, leaf in empty.items()} == {k: (0, *p.shape) for k, p in adapted.params.items()}


def test_norms():
    grads = {"a": torch.full((3, 2, 4), 1e25), "b": torch.tensor([0.0, 1e30, NAN])}
    norms = per_example_norms(grads)
    expected = torch.tensor([8**0.5 * 1e25, 1e30, NAN], dtype=torch.float64)
    assert_close(norms, expected, rtol=1e-6, atol=0, equal_nan=True)


bad = Refused()


def losses(rows, x):
    return vf.vera_forward({k[2:]: v for k, v in rows.items() if k[0] == "0"}, FROZEN, x, nn.Identity()).sum(1)


def refused(what, loss_rows, message, *, params=PARAMS, batch=None, **options):
    batch = ones(3, 5) if batch is None else batch
    bad("per_example_grads", what, lambda _: vf.per_example_grads(loss_rows, params, batch, **options), message)


refused("no function", None, r"loss_rows must be a function of \(rows, batch\), got NoneType")
refused("params of no dict", losses, r"params must be a dict of tensors, got list", params=[ones(3)])
refused("what adapt returns", losses, "got Adapted: pass its attribute params", params=ADAPTED)
refused("losses of integers", lambda rows, x: losses(rows, x).long(), r"floating-point loss .*, got \(3,\) torch.int64")
refused("True as a number", losses, "must be an integer, at least 0, got True", num_rows=True)
refused("no params", losses, "params is empty", params={})
refused("integers", losses, "only floating-point tensors can be trained", params={"0.p": ones(3, dtype=torch.long)})
refused("a number in params", losses, "must be a tensor, got float", params={"0.p": 1.0})
refused(
    "a mean",
    lambda rows, x: losses(rows, x).mean(),
    r"one floating-point loss per row, \(3,\), got \(\).*reduction='none'",
)
refused("a loss per token", lambda rows, x: x, r"\(3,\), got \(3, 5\)")
refused("a number", lambda rows, x: 1.0, r"\(3,\), got float")
refused("rows not used", lambda rows, x: losses(PARAMS, x), "do not depend on rows: pass rows to apply")
refused("no tensors", losses, "contains no tensors: pass num_rows", batch=[1, 2])
refused(
    "different rows", losses, r"tensors of shapes \[\(2, 5\), \(3, 5\)\]: pass num_rows", batch=(ones(3, 5), ones(2, 5))
)
refused("a scalar", losses, r"\[\(\)\]: pass num_rows", batch=ones(()))
refused("negative rows", losses, "at least 0, got -1", num_rows=-1)
refused("half a row", losses, "must be an integer, at least 0, got 1.5", num_rows=1.5)
refused("stacked params", losses, "do not match the leading axes", params=STACK, batch=ones(4, 5))
for what, grads, message in (
    ("nothing", {}, "must be a dict of gradients from per_example_grads, got an empty dict"),
    ("a list", [ones(3)], "must be a dict of gradients from per_example_grads, got list"),
    ("integers", {"a": ones(3, 2).long()}, r"grads\['a'\] must be a floating-point tensor .*, got .* torch.int64"),
    ("a number", {"a": 1.0}, r"grads\['a'\] must be a floating-point tensor .*, got float"),
):
    bad("per_example_norms", what, lambda _, g=grads: per_example_norms(g), message)
bad("per_example_norms", "different rows", lambda _: per_example_norms({"a": ones(2, 3), "b": ones(3)}), "leading axis")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

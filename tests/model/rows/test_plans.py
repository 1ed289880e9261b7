"""Each row gets its own adapter wherever a layer has the rows, or there is an error that names the layer."""

import itertools
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.rows import plans, rehearse

from helpers import assert_near, build, normal, randomized, relative_error, row, several, tokens


R = 8


class Model(nn.Module):
    """A model of one or two adapted layers, `first` and `second`, between which something happens to the rows."""

    def __init__(self, forward, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(3, width))
        self.function = forward

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def model_of(forward, targets=("first", "second"), **fields):
    return vf.adapt(
        Model(forward).double(), vf.VeraConfig(r=R, target_modules=list(targets), **fields), dtype=torch.float64
    )


def doubles(*shape, seed=0):
    return normal(*shape, seed=seed).double()


def alone(apply, stacked, frozen, x, dim=0, **shared):
    """What each adapter gives for its row alone."""
    n = x.shape[dim]
    outs = [apply(row(stacked, i), frozen, x.narrow(dim, i, 1), **shared) for i in range(n)]
    return torch.cat(outs, dim)


def experts(m, x):
    """Tokens are routed to one of two experts, which are layers."""
    flat = x.flatten(0, 1)
    out, choice = torch.zeros_like(flat), (flat[:, 0] > 0).long()
    for i, expert in enumerate((m.first, m.second)):
        (where,) = torch.where(choice == i)
        out.index_add_(0, where, expert(flat[where]))
    return out.view(x.shape)


def after_experts(m, x):
    flat = x.flatten(0, 1)
    out, choice = torch.zeros_like(flat), (flat[:, 0] > 0).long()
    for i in range(2):
        (where,) = torch.where(choice == i)
        out.index_add_(0, where, flat[where] * (i + 1))
    return m.second(m.first(x) + out.view(x.shape))


def sorted_and_back(m, x):
    order = x[:, 0, 0].argsort()
    return m.second(m.first(x)[order].tanh()[order.argsort()])


def marked_positions(m, x):
    """One position of each row, found by a mask, as transformers' BART does for its classifier."""
    mask = torch.zeros(x.shape[:2], dtype=torch.bool).index_fill(1, torch.tensor([1]), True) & (x[..., 0] < 1e9)
    return m.second(m.first(x)[mask, :].view(x.shape[0], -1, x.shape[-1])[:, -1])


# What happens to (rows, seq, features) between two layers. All give each row its own result.
SERVED = {
    "nothing": lambda m, x: m.second(m.first(x).relu()),
    "turned round": lambda m, x: m.second(m.first(x.transpose(0, 1)).tanh()).transpose(0, 1),
    "turned round in between": lambda m, x: m.second(m.first(x).transpose(0, 1)).transpose(0, 1),
    "flattened": lambda m, x: m.second(m.first(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2]),
    "windows": lambda m, x: m.second(m.first(x).reshape(-1, 2, x.shape[-1])).view(x.shape),
    "features split": lambda m, x: m.second(m.first(x).unflatten(-1, (2, 3)).flatten(-2)),
    "a mean": lambda m, x: m.second(m.first(x).mean(1)),
    "one position": lambda m, x: m.second(m.first(x)[:, 0]),
    "the last position": lambda m, x: m.second(m.first(x)[torch.arange(len(x)), x.argmax(1)[:, 0]]),
    "a loop over rows": lambda m, x: m.second(torch.stack([m.first(x)[i] for i in range(len(x))])),
    "learned queries": lambda m, x: m.second(m.table.expand(len(x), -1, -1)) @ m.first(x).mT,
    "after experts": after_experts,
    "sorted and back": sorted_and_back,
    "marked positions": marked_positions,
    "a layer of tokens and rows": lambda m, x: m.first(m.second(m.first(x)).mean(1)),
    "layers used twice": lambda m, x: m.first(m.second(m.first(x))),
}
REFUSED = {
    "experts": (experts, "first"),
    "a table": (lambda m, x: m.first(x) + m.second(m.table).mean(0), "second"),
    "a table in front": (lambda m, x: m.first(x) + m.second(m.table[None]).mean(1, keepdim=True), "second"),
    "one row": (lambda m, x: m.first(x) + m.second(x[0]), "second"),
    "flipped": (lambda m, x: m.first(m.second(x).flip(0)), "first"),
    "rolled": (lambda m, x: m.first(m.second(x).roll(1, 0)), "first"),
    "rolled by hand": (lambda m, x: m.first(torch.cat([x[1:], x[:1]])), "first"),
    "sorted": (lambda m, x: m.second(m.first(x)[x[:, 0, 0].argsort()]), "second"),
    "flattened, seq first": (lambda m, x: m.first(x.transpose(0, 1).flatten(0, 1)), "first"),
    "rows as features": (lambda m, x: m.first(x.flatten(1).T[:, :1].expand(-1, 6)) + m.second(x).sum(), "first"),
    "another axis the second time": (lambda m, x: m.first(m.first(x).transpose(0, 1)).transpose(0, 1), "first"),
}


@pytest.mark.parametrize(("n", "length"), [(4, 6), (4, 4), (6, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("case", SERVED)
def test_every_row_has_its_adapter(case, n, length):
    apply, _, frozen, _ = adapted = model_of(SERVED[case])
    stacked, x = several(adapted, n, scale=1.0), doubles(n, length, 6)
    expected = alone(apply, stacked, frozen, x)
    assert_close(apply(stacked, frozen, x), expected)
    assert relative_error(apply(row(stacked, 0), frozen, x), expected) > 1e-3
    # Two adapters over half of the rows each.
    if n % 2 == 0 and case != "learned queries":
        f = vf.vmap_adapters(apply, None)
        two = {key: leaf[:2] for key, leaf in stacked.items()}
        assert_close(f(two, frozen, x), torch.stack([apply(row(two, i), frozen, x) for i in range(2)]))


@pytest.mark.parametrize(("n", "length"), [(4, 6), (4, 4), (3, 4)], ids=str)
@pytest.mark.parametrize("case", REFUSED)
def test_or_there_is_an_error_that_names_the_layer(case, n, length):
    forward, layer = REFUSED[case]
    apply, params, frozen, _ = adapted = model_of(forward)
    x = doubles(n, length, 6)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"layer '{layer}' .* Run one adapter at a time, or .*torch\.func\.vmap"):
            apply(several(adapted, n), frozen, x)
    assert apply(params, frozen, x).shape  # a single adapter works
    # Where the layer itself is not adapted row by row, nothing is in the way.
    other = {"first": "second", "second": "first"}[layer]
    single = params | {key: leaf for key, leaf in several(adapted, n).items() if key.startswith(other)}
    if case not in ("experts", "rows as features"):
        assert apply(single, frozen, x).shape


def test_sizes_of_routed_tokens_do_not_decide():
    # Exactly as many tokens go to the first expert as there are rows.
    apply, _, frozen, _ = adapted = model_of(experts, ["first"])
    x = doubles(4, 2, 6)
    x[..., 0] = torch.tensor([[1.0, -1], [-1, -1], [1, 1], [-1, 1]])
    assert ((x[..., 0] > 0).sum(), (x[..., 0] <= 0).sum()) == (4, 4)
    with pytest.raises(ValueError, match=r"layer 'first' has its rows in an order that is not known in advance"):
        apply(several(adapted, 4), frozen, x)


def test_sums_and_heads_of_rows_elsewhere():
    apply, _, frozen, _ = adapted = model_of(SERVED["turned round"], ["first"], modules_to_save=["second"])
    stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 6)
    assert_close(apply(stacked, frozen, x), alone(apply, stacked, frozen, x))
    adapted = model_of(SERVED["turned round"])
    stacked = several(adapted, 4, scale=1.0)
    ids = torch.tensor([[0, 1], [2, -1], [3, 3], [-1, -1]])
    expected = [
        adapted.apply(vf.select_adapters(stacked, ids[i : i + 1]), adapted.frozen, x[i : i + 1]) for i in range(4)
    ]
    assert_close(adapted.apply(vf.select_adapters(stacked, ids), adapted.frozen, x), torch.cat(expected))


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_biases_of_quantized_layers_elsewhere(bias):
    model = Model(SERVED["turned round"], 32)
    for name in ("first", "second"):
        layer = getattr(model, name)
        setattr(model, name, vf.to_bnb(vf.quantize_8bit(layer.weight.data), layer.bias.data))
    apply, _, frozen, _ = adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["first"], bias=bias))
    stacked, x = several(adapted, 4, scale=1.0), normal(4, 4, 32)
    assert_near(apply(stacked, frozen, x), alone(apply, stacked, frozen, x))


class TestInputs:
    def test_that_have_no_rows(self):
        forward = lambda m, x, positions, scale=None, name="": m.second(m.first(x) + m.table[positions]) * (scale or 1)
        apply, _, frozen, _ = adapted = model_of(forward)
        for n, length in ((4, 3), (3, 3)):
            stacked, x = several(adapted, n, scale=1.0), doubles(n, length, 6)
            for positions in (torch.arange(length), torch.arange(length)[None]):
                expected = alone(apply, stacked, frozen, x, positions=positions, scale=2.0)
                assert_close(apply(stacked, frozen, x, positions=positions, scale=2.0, name="x"), expected)

    def test_a_mask_as_long_as_there_are_rows(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0).double().eval()
        config = vf.VeraConfig(r=R, target_modules=["linear1", "linear2"])
        apply, _, frozen, _ = adapted = vf.adapt(layer, config, dtype=torch.float64)
        stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 8)
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        assert_close(apply(stacked, frozen, x, src_mask=mask), alone(apply, stacked, frozen, x, src_mask=mask))

    @pytest.mark.parametrize("axes", [1, -2, [1], (1,), {"x": 1}], ids=str)
    @pytest.mark.parametrize("shape", [(6, 4), (4, 4), (4, 6)], ids=str)
    def test_whose_rows_are_declared(self, axes, shape):
        apply, _, frozen, _ = adapted = model_of(lambda m, x: m.second(m.first(x).tanh()))
        n = shape[1]
        stacked, x = several(adapted, n, scale=1.0), doubles(*shape, 6)
        f = apply.with_row_axes(axes)
        args, kwargs = ((), {"x": x}) if isinstance(axes, dict) else ((x,), {})
        assert_close(f(stacked, frozen, *args, **kwargs), alone(apply, stacked, frozen, x, 1))
        assert_close(
            f.with_row_axes(0)(stacked, frozen, x.transpose(0, 1)),
            alone(apply, stacked, frozen, x, 1).mT.mT.transpose(0, 1),
        )
        if shape[0] != n:
            with pytest.raises(
                ValueError, match=rf"has leading axes \({n},\), which do not match .*apply\.with_row_axes"
            ):
                apply(stacked, frozen, x)

    def test_declared_to_be_shared(self):
        # As many entries as rows in the table, too: what the model would do with other numbers of rows decides.
        apply, _, frozen, _ = adapted = model_of(lambda m, x, table: m.second(m.first(x)) + (table @ table.T).mean())
        stacked, x, table = several(adapted, 4, scale=1.0), doubles(4, 5, 6), doubles(4, 6, seed=1)
        expected = alone(apply, stacked, frozen, x, table=table)
        assert_close(apply.with_row_axes({"table": None})(stacked, frozen, x, table=table), expected)
        assert_close(apply.with_row_axes([0, None])(stacked, frozen, x, table), expected)

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_torchs_own_layers(self, batch_first):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2).double().eval()
        config = vf.VeraConfig(r=R, target_modules=["linear1", "linear2"])
        apply, _, frozen, _ = adapted = vf.adapt(model, config, dtype=torch.float64)
        stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 8)
        axis = 0 if batch_first else 1
        f = apply.with_row_axes({} if batch_first else {"src": 1})
        assert_close(f(stacked, frozen, src=x), alone(apply, stacked, frozen, x, axis))
        padded = torch.zeros(4, 4, dtype=torch.bool)
        padded[1, 2:] = True
        out = f(stacked, frozen, src=x, src_key_padding_mask=padded)
        own = lambda i: {"src": x.narrow(axis, i, 1), "src_key_padding_mask": padded[i : i + 1]}
        expected = torch.cat([apply(row(stacked, i), frozen, **own(i)) for i in range(4)], axis)
        kept = ~(padded if batch_first else padded.T)
        assert_close(out[kept], expected[kept])
        if not batch_first:
            with pytest.raises(ValueError, match=r"vmap_adapters folds the adapters into axis 0 .*row_axes="):
                vf.vmap_adapters(f)

    def test_a_model_on_the_meta_device(self):
        model = Model(SERVED["a loop over rows"]).to("meta")
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["first"]))
        rows = {key: leaf.expand(4, *leaf.shape).to("meta") for key, leaf in adapted.params.items()}
        frozen = {key: leaf.to("meta") for key, leaf in adapted.frozen.items()}
        assert adapted.apply(rows, frozen, torch.ones(4, 3, 6, device="meta")).shape == (4, 3, 6)

    @pytest.mark.parametrize("targets", [["first"], ["first", "second"]])
    def test_parts_of_rows_one_after_another(self, targets):
        # As the patches of images, in models that see text and images.
        def forward(m, x, where, parts):
            mask = where[..., None].expand_as(x)
            if int(mask.sum()) != parts.numel():
                raise ValueError("as many parts as places")
            return m.first(x.masked_scatter(mask, m.second(parts))).tanh()

        apply, _, frozen, _ = adapted = model_of(forward, targets)
        stacked, x, parts = several(adapted, 4, scale=1.0), doubles(4, 5, 6), doubles(8, 6, seed=1)
        where = torch.zeros(4, 5, dtype=torch.bool)
        where[:, 1:3] = True
        if "second" in targets:
            with pytest.raises(ValueError, match=r"layer 'second' has an input of shape \(.*, 6\) without an axis"):
                apply(stacked, frozen, x, where, parts)
            return
        own = lambda i: (x[i : i + 1], where[i : i + 1], parts[2 * i : 2 * i + 2])
        expected = torch.cat([apply(row(stacked, i), frozen, *own(i)) for i in range(4)])
        assert_close(apply(stacked, frozen, x, where, parts), expected)

    def test_in_containers_and_objects(self):
        class Batch:
            def __init__(self, x):
                self.x = x

        forward = lambda m, batch: m.second(m.first(batch["x"][0].x.transpose(0, 1))).transpose(0, 1)
        apply, _, frozen, _ = adapted = model_of(forward)
        stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 6)
        one = lambda x: {"x": [Batch(x)], "lock": threading.Lock()}
        expected = [apply(row(stacked, i), frozen, one(x[i : i + 1])) for i in range(4)]
        assert_close(apply(stacked, frozen, one(x)), torch.cat(expected))

    def test_a_parameter(self):
        apply, _, frozen, _ = adapted = model_of(SERVED["turned round"])
        stacked, x = several(adapted, 4, scale=1.0), nn.Parameter(doubles(4, 4, 6))
        assert_close(apply(stacked, frozen, x), alone(apply, stacked, frozen, x))

    @pytest.mark.parametrize("case", ["turned round", "flattened", "a mean"])
    def test_one_row(self, case):
        apply, _, frozen, _ = adapted = model_of(SERVED[case])
        stacked = several(adapted, 1, scale=1.0)
        x = doubles(1, 3, 6)
        assert torch.equal(apply(stacked, frozen, x), apply(row(stacked, 0), frozen, x))
        with pytest.raises(ValueError, match=r"leading axes \(1,\), which do not match"):
            apply(stacked, frozen, doubles(3, 3, 6))
        table, _ = REFUSED["a table"]
        apply, _, frozen, _ = adapted = model_of(table)
        stacked = several(adapted, 1, scale=1.0)
        assert torch.equal(apply(stacked, frozen, x), apply(row(stacked, 0), frozen, x))

    def test_several_axes_of_rows(self):
        apply, _, frozen, _ = adapted = model_of(SERVED["nothing"])
        stacked = several(adapted, 6, scale=1.0)
        grid = {key: leaf.unflatten(0, (2, 3)) for key, leaf in stacked.items()}
        x = doubles(2, 3, 5, 6)
        assert_close(apply(grid, frozen, x).flatten(0, 1), alone(apply, stacked, frozen, x.flatten(0, 1)))
        apply, _, frozen, _ = model_of(lambda m, x: m.second(m.first(x).transpose(0, 1)))
        with pytest.raises(ValueError, match=r"the leading axes \(2, 3\), .* layer 'second'"):
            apply(grid, frozen, x)

    def test_rows_of_unequal_params(self):
        apply, params, frozen, _ = adapted = model_of(SERVED["nothing"])
        stacked = several(adapted, 4)
        x = doubles(4, 3, 6)
        mixed = stacked | {key: params[key] for key in params if key.startswith("second")}
        assert_close(
            apply(mixed, frozen, x),
            apply(mixed | {k: torch.stack([params[k]] * 4) for k in params if k[0] == "s"}, frozen, x),
        )
        with pytest.raises(ValueError, match=r"has the leading axes \(4,\), but '.*' has \(3,\)"):
            apply(stacked | {"second.lambda_b": stacked["second.lambda_b"][:3]}, frozen, x)


class TestRehearsal:
    @pytest.fixture
    def count(self, monkeypatch):
        calls = []
        real = plans.rehearse
        monkeypatch.setattr(plans, "rehearse", lambda *args: calls.append(args[1]) or real(*args))
        return calls

    def test_is_once_for_each_kind_of_call(self, count):
        apply, _, frozen, _ = adapted = model_of(lambda m, x, flag=False, scale=1.0: m.second(m.first(x)) * scale)
        call = lambda n, length, **options: apply(several(adapted, n), frozen, doubles(n, length, 6), **options)
        for n, length in ((4, 3), (4, 7), (5, 3), (3, 9)):
            call(n, length)
        assert len(count) == 1
        call(4, 4)  # as long as there are rows
        call(4, 4)
        assert len(count) == 2
        call(4, 1)
        call(4, 3, flag=True)
        assert len(count) == 4
        call(4, 3, scale=2.0)
        call(4, 3, scale=3.0)
        assert len(count) == 5
        apply.with_dropout(torch.Generator())(several(adapted, 4), frozen, doubles(4, 3, 6))
        assert len(count) == 5
        for _ in range(2):
            apply.method(lambda m, x: m(x), several(adapted, 4), frozen, doubles(4, 3, 6))
        assert len(count) == 6

    def test_as_many_positions_as_rows_before_the_first_rows(self):
        apply, _, frozen, _ = adapted = model_of(lambda m, positions, x: m.second(m.first(x + positions[:, None])))
        stacked, x, positions = several(adapted, 4), doubles(4, 4, 6), doubles(4)
        together = apply(stacked, frozen, positions, x)
        for i in range(4):
            assert_close(together[i], apply(row(stacked, i), frozen, positions, x[i]), rtol=1e-9, atol=1e-9)

    def test_plans_are_no_part_of_a_pickle(self):
        adapted = vf.adapt(nn.Sequential(nn.Linear(6, 6)), vf.VeraConfig(r=R, target_modules=["0"]))
        stacked, x = several(adapted, 4), normal(4, 6)
        expected = adapted.apply.method(lambda m, x: m(x), stacked, adapted.frozen, x)
        again = pickle.loads(pickle.dumps(adapted.apply))
        assert torch.equal(again(stacked, adapted.frozen, x), expected)

    def test_many_kinds_do_not_fill_the_memory(self, count, monkeypatch):
        monkeypatch.setattr(plans, "MOST_PLANS", 3)
        apply, _, frozen, _ = adapted = model_of(lambda m, x, step: m.second(m.first(x)))
        for step in range(8):
            apply(several(adapted, 4), frozen, doubles(4, 3, 6), step=step)
        assert len(count) == 8
        assert len(apply.plans.found) <= 3

    def test_leaves_no_trace(self):
        seen = []

        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
                self.longest = 0

            def forward(self, x):
                self.longest = max(self.longest, len(x))
                return self.norm(self.layer(x)) + 0 * torch.rand_like(x) + self.longest

        model = Noisy().eval()
        model.layer.register_forward_hook(lambda *args: seen.append(args))
        model.register_forward_pre_hook(lambda *args: seen.append(args))
        apply, _, frozen, _ = adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["layer"]))
        stacked, x = several(adapted, 4), normal(4, 6)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        apply(stacked, frozen, x)
        drawn = torch.get_rng_state()
        before = len(seen)
        torch.set_rng_state(state)
        first = apply(stacked, frozen, x)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert len(seen) == 2 * before
        assert torch.equal(apply(stacked, frozen, x), first)
        assert model.longest == 0
        assert model.norm.num_batches_tracked == 0

    @pytest.mark.parametrize("training", [False, True])
    def test_training_mode(self, training):
        def forward(m, x):
            if m.training and torch.rand(()) < 0.9:  # layers that are left out at random
                return m.second(x)
            return m.second(m.first(x))

        model = Model(forward).double().train(training)
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["first", "second"]), dtype=torch.float64)
        for _ in range(5):
            assert adapted.apply(several(adapted, 4), adapted.frozen, doubles(4, 4, 6)).shape == (4, 4, 6)

    def test_a_layer_that_it_did_not_call(self):
        forward = lambda m, x, flag: m.first(x) if (x > 9).any() else m.second(x)
        apply, _, frozen, _ = adapted = model_of(forward)
        stacked, x = several(adapted, 4), doubles(4, 3, 6)
        apply(stacked, frozen, x, flag=0)
        with pytest.raises(ValueError, match="layer 'first' was not called when the model ran to find"):
            apply(stacked, frozen, x + 10, flag=0)
        assert_close(apply(stacked, frozen, x + 10, flag=1), alone(apply, stacked, frozen, x + 10, flag=1))

    def test_data_that_changes_what_the_model_does(self):
        # Padding is taken out where there is some; as many tokens may be left as there are rows.
        def unpad(m, x, mask):
            return m.second(x[mask] if not mask.all() else x)

        apply, _, frozen, _ = adapted = model_of(unpad, ["second"])
        stacked, x = several(adapted, 4), doubles(4, 3, 6)
        full, few = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
        few[0], few[1, 0] = True, True
        assert_close(apply(stacked, frozen, x, full), alone(apply, stacked, frozen, x, mask=full))
        with pytest.raises(ValueError, match=r"'second' got .* \(4, 6\)\. In an earlier call .* had 3 axes"):
            apply(stacked, frozen, x, few)

        def flat(m, x):
            tokens = x.flatten(0, 1)
            where = (tokens[:, 0] > 9).nonzero()[:, 0]
            return m.second(tokens[where] if len(where) else tokens)

        apply, _, frozen, _ = adapted = model_of(flat, ["second"])
        with pytest.raises(ValueError, match=r"layer 'second' has .* whose rows depend on the data"):
            apply(several(adapted, 4), frozen, x)

    def test_of_a_model_that_takes_no_other_number_of_rows(self):
        apply, params, frozen, _ = adapted = model_of(lambda m, x: m.second(m.first(x.view(4, 3, 6))))
        with pytest.raises(ValueError, match=r"other numbers of rows, which failed: RuntimeError: .*with_row_axes"):
            apply(several(adapted, 4), frozen, doubles(4, 3, 6))
        assert apply(params, frozen, doubles(4, 3, 6)).shape == (4, 3, 6)

    @pytest.mark.parametrize("case", SERVED)
    def test_without_values(self, case, monkeypatch):
        monkeypatch.setattr(rehearse, "LARGE", 0)
        test_every_row_has_its_adapter(case, 4, 4)

    @pytest.mark.parametrize("case", REFUSED)
    def test_refuses_without_values(self, case, monkeypatch):
        monkeypatch.setattr(rehearse, "LARGE", 0)
        test_or_there_is_an_error_that_names_the_layer(case, 4, 4)

    def test_batch_norm_mixes_rows(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        config = vf.VeraConfig(r=R, target_modules=["0", "2"])
        apply, params, frozen, _ = adapted = vf.adapt(model, config)
        x, stacked = normal(4, 6), several(adapted, 4)
        with pytest.raises(ValueError, match="a BatchNorm1d in training mode computes its statistics over all rows"):
            apply(stacked, frozen, x)
        with pytest.raises(ValueError, match="affect each other"):
            vf.vmap_adapters(apply, None)(stacked, frozen, x)
        assert apply(params, frozen, x).shape == (4, 2)
        apply, _, frozen, _ = vf.adapt(model.eval(), config)
        assert_near(apply(stacked, frozen, x), alone(apply, stacked, frozen, x))

    def test_under_autocast(self):
        apply, _, frozen, _ = adapted = vf.adapt(
            Model(SERVED["turned round"]).bfloat16(), vf.VeraConfig(r=R, target_modules=["first", "second"])
        )
        stacked, x = several(adapted, 4), normal(4, 4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(apply(stacked, frozen, x), alone(apply, stacked, frozen, x), 2e-2)

    def test_threads(self):
        apply, _, frozen, _ = adapted = model_of(SERVED["turned round"])
        stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 6)
        expected, found = alone(apply, stacked, frozen, x), []
        work = [threading.Thread(target=lambda: found.append(apply(stacked, frozen, x))) for _ in range(4)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert all(torch.equal(out, found[0]) for out in found)
        assert_close(found[0], expected)


class TestTransforms:
    @pytest.mark.parametrize("case", ["turned round", "flattened"])
    def test_of_rows_elsewhere(self, case):
        apply, _, frozen, _ = adapted = model_of(SERVED[case])
        stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 6)
        together = lambda s: apply(s, frozen, x).square().sum()
        apart = lambda s: alone(apply, s, frozen, x).square().sum()
        assert_close(grad(together)(stacked), grad(apart)(stacked))
        fresh = model_of(SERVED[case]).apply
        assert_close(grad(lambda s: fresh(s, frozen, x).square().sum())(stacked), grad(apart)(stacked))
        assert_close(jvp(together, (stacked,), (stacked,)), jvp(apart, (stacked,), (stacked,)))
        fresh = model_of(SERVED[case]).apply
        populations = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in stacked.items()}
        mapped = vmap(lambda s: fresh(s, frozen, x))(populations)
        assert_close(mapped, torch.stack([alone(apply, row(populations, i), frozen, x) for i in range(2)]))

    def test_mapped_inputs(self):
        apply, _, frozen, _ = adapted = model_of(SERVED["turned round"])
        stacked, xs = several(adapted, 4, scale=1.0), doubles(3, 4, 4, 6)
        mapped = vmap(lambda x: apply(stacked, frozen, x))(xs)
        assert_close(mapped, torch.stack([alone(apply, stacked, frozen, x) for x in xs]))

    @pytest.mark.parametrize("case", ["nothing", "turned round", "flattened"])
    def test_compiled(self, case):
        apply, _, frozen, _ = adapted = model_of(SERVED[case])
        f = torch.compile(lambda s, x: apply(s, frozen, x), fullgraph=True, backend="aot_eager")
        for n, length in ((4, 4), (5, 3), (3, 7)):
            stacked, x = several(adapted, n, scale=1.0), doubles(n, length, 6)
            assert_close(f(stacked, x), alone(apply, stacked, frozen, x))

    def test_compiled_with_an_error(self):
        apply, _, frozen, _ = adapted = model_of(REFUSED["a table"][0])
        f = torch.compile(lambda s, x: apply(s, frozen, x), backend="aot_eager")
        with pytest.raises(Exception, match="layer 'second' has"):
            f(several(adapted, 4), doubles(4, 3, 6))

    def test_functional_call_inside(self):
        # `apply` inside of a module that is called functionally, as one does to generate.
        apply, _, frozen, _ = adapted = model_of(SERVED["turned round"])
        stacked, x = several(adapted, 4, scale=1.0), doubles(4, 4, 6)

        class Outer(nn.Module):
            def forward(self, x):
                return apply(stacked, frozen, x)

        assert_close(functional_call(Outer(), {}, (x,)), alone(apply, stacked, frozen, x))


SIZES = {"vocab_size": 67, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
SIZES |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BERT = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LED = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
FSMT = {"langs": ["en", "de"], "src_vocab_size": 67, "tgt_vocab_size": 67, "max_position_embeddings": 64}
T5 = {"vocab_size": 67, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, **TOKENS}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
SWITCH = {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 3}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True}
# Class, options, targets.
MODELS = {
    "xlnet": ("XLNetModel", {"vocab_size": 67, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}, ["layer_1"]),
    "longformer": ("LongformerModel", {**BERT, "attention_window": 4, "pad_token_id": 1}, ["query", "value", "dense"]),
    "led": ("LEDForConditionalGeneration", SIZES | TOKENS | LED, ["query", "q_proj", "fc1"]),
    "fsmt": ("FSMTForConditionalGeneration", SIZES | TOKENS | FSMT, ["q_proj", "v_proj", "fc1"]),
    "opt": ("OPTForCausalLM", BERT | TOKENS | OPT, ["q_proj", "fc1", "fc2"]),
    "switch": ("SwitchTransformersForConditionalGeneration", SWITCH | {"decoder_start_token_id": 0}, ["q", "v"]),
    "bart classifier": ("BartForSequenceClassification", SIZES | TOKENS | {"num_labels": 3}, ["q_proj", "dense"]),
}


def transformer(name):
    class_name, options, targets = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    return vf.adapt(model, vf.VeraConfig(r=R, target_modules=targets))


@pytest.mark.parametrize("length", [4, 7])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, length):
    apply, _, frozen, _ = adapted = transformer(name)
    stacked, ids = several(adapted, 4, scale=1.0), tokens(4, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bart classifier":
        inputs["input_ids"] = torch.cat([ids[:, 1:], torch.full((4, 1), 2)], 1)
    elif apply.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(4, 4, seed=1)
    with torch.no_grad():
        own = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(4)]
        expected = torch.cat([apply(row(stacked, i), frozen, **own[i])[0] for i in range(4)])
        assert_near(apply(stacked, frozen, **inputs)[0], expected)
        folded = vf.vmap_adapters(apply, None)(stacked, frozen, **own[0])[0]
        assert_near(folded, torch.stack([apply(row(stacked, i), frozen, **own[0])[0] for i in range(4)]))


def test_a_table_of_positions():
    torch.manual_seed(0)
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**BERT, **DEBERTA)).eval()
    apply, _, frozen, _ = adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["query_proj"]))
    stacked, ids = several(adapted, 4, scale=1.0), tokens(4, 6)
    with pytest.raises(
        ValueError, match=r"layer '.*query_proj' has an input of shape \(1, 16, 32\) .*torch\.func\.vmap"
    ):
        apply(stacked, frozen, input_ids=ids)
    # What the error advises works.
    f = lambda p, ids: apply(p, frozen, input_ids=ids[None], attention_mask=torch.ones(1, 6)).last_hidden_state[0]
    expected = torch.stack([f(row(stacked, i), ids[i]) for i in range(4)])
    assert_near(vmap(f)(stacked, ids), expected)


def test_experts_of_switch():
    model = transformer("switch").apply.model
    apply, params, frozen, _ = adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q", "wi"]))
    inputs = {"input_ids": tokens(4, 6), "decoder_input_ids": tokens(4, 5, seed=1)}
    with pytest.raises(ValueError, match=r"layer 'encoder.*expert_\d.wi' has its rows in an order that is not known"):
        apply(several(adapted, 4), frozen, **inputs)
    assert apply(randomized(params), frozen, **inputs).logits.shape == (4, 5, 67)


class TestGenerate:
    OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}  # noqa: RUF012
    MODELS = {  # noqa: RUF012
        "t5": ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, ["q", "v"]),
        "bart": (
            "BartForConditionalGeneration",
            SIZES | TOKENS | {"decoder_start_token_id": 2, "init_std": 0.3},
            ["q_proj", "v_proj"],
        ),
        "fsmt": (
            "FSMTForConditionalGeneration",
            SIZES | TOKENS | FSMT | {"decoder_start_token_id": 2},
            ["q_proj", "fc1"],
        ),
        "opt": ("OPTForCausalLM", BERT | TOKENS | OPT, ["q_proj", "fc1"]),
    }

    def make(self, name):
        if name == "llama":
            adapted = build("llama")
        else:
            class_name, options, targets = self.MODELS[name]
            model_class = getattr(transformers, class_name)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**options)).eval()
            adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=targets))
        return adapted, several(adapted, 3, scale=2.0), tokens(3, 6)

    def alone(self, adapted, stacked, ids, **options):
        calls = [
            adapted.apply.generate(
                row(stacked, i), adapted.frozen, input_ids=ids[i : i + 1], attention_mask=torch.ones(1, 6), **options
            )
            for i in range(3)
        ]
        return calls

    @pytest.mark.parametrize("beams", [1, 2, 3])
    @pytest.mark.parametrize("name", ["llama", *MODELS])
    def test_beams(self, name, beams):
        adapted, stacked, ids = self.make(name)
        options = self.OPTIONS | {"num_beams": beams}
        together = adapted.apply.generate(
            stacked, adapted.frozen, input_ids=ids, attention_mask=torch.ones_like(ids), **options
        )
        expected = self.alone(adapted, stacked, ids, **options)
        for out, one in zip(together, expected, strict=True):
            assert torch.equal(out, one[0])
        assert len({tuple(one[0].tolist()) for one in expected}) == 3

    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_several_sequences(self, name):
        adapted, stacked, ids = self.make(name)
        config = adapted.apply.model.generation_config
        for options in ({"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3, "num_beams": 3}):
            together = adapted.apply.generate(
                stacked, adapted.frozen, input_ids=ids, attention_mask=torch.ones_like(ids), **self.OPTIONS | options
            )
            assert torch.equal(together, torch.cat(self.alone(adapted, stacked, ids, **self.OPTIONS | options)))
        # Sampled: of each row several, which its adapter finds likely.
        sampled = {"do_sample": True, "num_return_sequences": 4, "top_k": 1}
        together = adapted.apply.generate(
            stacked, adapted.frozen, input_ids=ids, attention_mask=torch.ones_like(ids), **self.OPTIONS | sampled
        )
        assert torch.equal(together, torch.cat(self.alone(adapted, stacked, ids, **self.OPTIONS | sampled)))
        assert config == adapted.apply.model.generation_config

    def test_beams_of_a_config(self):
        adapted, stacked, ids = self.make("t5")
        config = transformers.GenerationConfig(**self.OPTIONS, num_beams=2, decoder_start_token_id=0, eos_token_id=2)
        together = adapted.apply.generate(
            stacked, adapted.frozen, ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        assert torch.equal(together, torch.cat(self.alone(adapted, stacked, ids, generation_config=config)))

    def test_none_and_sums(self):
        adapted, stacked, ids = self.make("t5")
        options = self.OPTIONS | {"num_beams": 2, "attention_mask": torch.ones_like(ids)}
        rows = vf.select_adapters(stacked, [[0, 1], [-1, -1], [2, -1]])
        together = adapted.apply.generate(rows, adapted.frozen, ids, **options)
        single = vf.select_adapters(stacked, [0, 0, 2])
        assert torch.equal(together[2], adapted.apply.generate(single, adapted.frozen, ids, **options)[2])
        assert torch.equal(together[1], adapted.apply.model.generate(ids, **options)[1])

    def test_rows_that_do_not_match(self):
        adapted, stacked, _ = self.make("t5")
        ids = tokens(2, 6)
        with pytest.raises(ValueError, match=r"leading axes \(3,\), which do not match"):
            adapted.apply.generate(stacked, adapted.frozen, ids, attention_mask=torch.ones_like(ids), **self.OPTIONS)
        repeated = {key: leaf.repeat_interleave(2, 0) for key, leaf in stacked.items()}
        with pytest.raises(ValueError, match=r"leading axes \(6,\), which do not match"):
            adapted.apply.generate(
                repeated, adapted.frozen, tokens(3, 6), attention_mask=torch.ones(3, 6), num_beams=2, **self.OPTIONS
            )

    def test_few_rehearsals(self, monkeypatch):
        calls = []
        real = plans.rehearse
        monkeypatch.setattr(plans, "rehearse", lambda *args: calls.append(args[1][0]) or real(*args))
        adapted, stacked, ids = self.make("t5")
        for length in (6, 5):
            adapted.apply.generate(stacked, adapted.frozen, ids[:, :length], **self.OPTIONS, max_length=None)
        assert sorted(set(calls)) == ["", "encoder"]
        assert len(calls) <= 6

    def test_a_module_that_generate_calls_by_itself(self):
        class Talker(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)

            def generate(self, x, direct=False):
                for _ in range(2):
                    x = self.body(x)
                return self.head(x) if direct else x

        adapted = vf.adapt(Talker(), vf.VeraConfig(r=R, target_modules=["body.0", "head"]))
        stacked, x = several(adapted, 3), normal(3, 6)
        generate = lambda p, x: adapted.apply.generate(p, adapted.frozen, x)
        assert_near(generate(stacked, x), torch.cat([generate(row(stacked, i), x[i : i + 1]) for i in range(3)]))
        with pytest.raises(ValueError, match="layer 'head' is called by generate itself"):
            adapted.apply.generate(stacked, adapted.frozen, x, direct=True)
        # Any other method is rehearsed as a whole.
        adapted.apply.model.__class__.other = Talker.generate
        direct = lambda p, x: adapted.apply.method("other", p, adapted.frozen, x, direct=True)
        assert_near(direct(stacked, x), torch.cat([direct(row(stacked, i), x[i : i + 1]) for i in range(3)]))


def test_long_lists_of_sizes():
    # Whatever the sizes are, there is a number of rows to rehearse with, or a refusal.
    apply, _, frozen, _ = adapted = model_of(SERVED["turned round"])
    for n in itertools.chain(range(2, 8), (11, 13)):
        stacked, x = several(adapted, n, scale=1.0), doubles(n, 7 * 11 * 13 * 17, 6)
        assert_close(apply(stacked, frozen, x)[-1, -1], apply(row(stacked, n - 1), frozen, x[-1:, -1:])[0, 0])

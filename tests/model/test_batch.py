"""Many adapters: stacks, an adapter for each row, sums, and that folding, `vmap` and a loop agree."""

import copy

import peft
import pytest
import torch
from torch import nn, ones
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.batch import num_adapters

from helpers import (
    TARGETS,
    assert_near,
    assert_same,
    build,
    left_padded,
    llama,
    normal,
    quantized,
    randomized,
    relative_error,
    row,
    several,
    small,
    snapshot,
    tokens,
)
from refused import PARAMS, STACK, Refused


R, N = 8, 4
# torch's vmap goes through fused attention in a loop, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
CASES = [
    *(("llama", base, attention) for base in ("dense", "nested", "int8") for attention in ("sdpa", "eager")),
    *(("bert", base, "sdpa") for base in ("dense", "nested", "int8")),
    *(("bert", "dense", "eager"), ("gpt2", "dense", "sdpa"), ("gpt2", "dense", "eager")),
]


class TestStacking:
    def test_is_undone(self):
        adapters = [randomized(small().params, seed) for seed in range(3)]
        stacked = vf.stack_adapters(adapters)
        assert num_adapters(stacked) == 3
        for one, other in zip(vf.unstack_adapters(stacked), adapters, strict=True):
            assert_same(one, other)
            assert list(one) == list(other)
        assert_same(vf.stack_adapters(vf.unstack_adapters(stacked)), stacked)

    def test_keeps_dtypes_and_inputs(self):
        adapters = [{"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, 5)} for _ in range(2)]
        before = copy.deepcopy(adapters)
        stacked = vf.stack_adapters(adapters)
        assert {key: (leaf.shape, leaf.dtype) for key, leaf in stacked.items()} == {
            "a": ((2, 3), torch.bfloat16),
            "b": ((2, 2, 5), torch.float32),
        }
        stacked["a"].zero_()
        assert_same(adapters, before)

    def test_unstacking_makes_views(self):
        stacked = vf.stack_adapters([small().params] * 3)
        for i, one in enumerate(vf.unstack_adapters(stacked)):
            assert all(one[key].data_ptr() == leaf[i].data_ptr() for key, leaf in stacked.items())

    def test_is_differentiable(self):
        one = small().params
        gradient = grad(lambda p: vf.stack_adapters([p, {k: 2 * v for k, v in p.items()}])["0.lambda_d"].sum())(one)
        assert_same(gradient["0.lambda_d"], torch.full((R,), 3.0))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda p: vf.stack_adapters([]), "nothing to stack"),
            (lambda p: vf.stack_adapters([p, {}]), r"adapters 1 and 0 differ in 4 keys, first '0\.lambda_b'"),
            (lambda p: vf.stack_adapters([p, p | {"0.lambda_d": torch.ones(3)}]), r"\(3,\) in adapter 1 and \(8,\)"),
            (lambda p: vf.unstack_adapters({}), "empty"),
            (lambda p: vf.unstack_adapters(p), "common leading axis"),
            (
                lambda p: num_adapters({"a": torch.ones(2), "b": torch.ones(3)}),
                r"'a' has shape \(2,\) and 'b' .*\(3,\)",
            ),
            (lambda p: num_adapters({"a": torch.ones(()), "b": torch.ones(3)}), r"'a' has shape \(\)"),
        ],
    )
    def test_refuses(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(small().params)


class TestSelecting:
    def test_is_a_gather(self):
        stacked = several(small())
        before = snapshot(stacked)
        ids = [2, 0, 3, 3]
        for form in (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
            rows = vf.select_adapters(stacked, form)
            assert_same(rows, {key: leaf[ids] for key, leaf in stacked.items()})
        assert_same([stacked], before)

    def test_none_is_exactly_the_base(self):
        for name, base in (("llama", "dense"), ("llama", "nested"), ("gpt2", "dense")):
            adapted = build(name, base)
            rows = vf.select_adapters(several(adapted), [1, -1, 0, -1])
            output = adapted.apply(rows, adapted.frozen, input_ids=tokens(4, 6)).logits
            nothing = adapted.apply(adapted.params, adapted.frozen, input_ids=tokens(4, 6)).logits
            assert_same(output[[1, 3]], nothing[[1, 3]])
            assert relative_error(output[[0, 2]], nothing[[0, 2]]) > 1e-3

    @pytest.mark.parametrize("ids", [[-1], [[-1, -1]]], ids=str)
    def test_none_is_the_base_whatever_the_others_hold(self, ids):
        adapted = small()
        broken = {key: torch.full_like(leaf, torch.nan) for key, leaf in several(adapted).items()}
        rows = vf.select_adapters(broken, ids)
        assert_same(adapted.apply(rows, adapted.frozen, normal(1, 7)), adapted.apply.model(normal(1, 7)))
        gradient = grad(lambda s: adapted.apply(vf.select_adapters(s, ids), adapted.frozen, normal(1, 7)).sum())(broken)
        assert_same(gradient, {key: torch.zeros_like(leaf) for key, leaf in broken.items()})

    def test_permutations_commute(self):
        adapted = build()
        stacked, ids, order = several(adapted), torch.tensor([3, -1, 0, 0, 2]), torch.tensor([4, 2, 0, 1, 3])
        forward = lambda ids, x: adapted.apply(vf.select_adapters(stacked, ids), adapted.frozen, input_ids=x).logits
        assert_near(forward(ids[order], tokens(5, 6)[order]), forward(ids, tokens(5, 6))[order], 1e-6)
        # Renaming the adapters changes nothing either.
        shuffled = {key: leaf[[2, 0, 3, 1]] for key, leaf in stacked.items()}
        renamed = torch.tensor([1, 3, 0, 2, -1])[ids]
        output = adapted.apply(vf.select_adapters(shuffled, renamed), adapted.frozen, input_ids=tokens(5, 6)).logits
        assert_same(output, forward(ids, tokens(5, 6)))

    def test_gradients_reach_the_adapters(self):
        adapted = small()
        stacked, ids = several(adapted), [2, 0, 2]
        forward = lambda p, x: adapted.apply(p, adapted.frozen, x).square().sum()
        gradient = grad(lambda s: forward(vf.select_adapters(s, ids), normal(3, 7)))(stacked)
        for i in range(N):
            rows = [j for j, chosen in enumerate(ids) if chosen == i]
            expected = grad(forward)(row(stacked, i), normal(3, 7)[rows])
            assert_close(row(gradient, i), expected, rtol=1e-5, atol=1e-6)

    def test_compiles(self):
        adapted = small()
        stacked, x, ids = several(adapted), normal(3, 7), torch.tensor([2, -1, 0])
        f = lambda s, ids: adapted.apply(vf.select_adapters(s, ids), adapted.frozen, x)
        assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(stacked, ids), f(stacked, ids))

    @pytest.mark.parametrize(
        ("ids", "weights", "message"),
        [
            ([0, 4], None, "adapter id 4 is out of range: there are 4 adapters"),
            ([-2], None, "adapter id -2 is out of range"),
            ([[0, 1], [7, 0]], None, "adapter id 7"),
            ([0.0], None, "must be integers, got torch.float32"),
            ([True], None, "must be integers, got torch.bool"),
            (1, None, r"got \(\)"),
            ([[[0]]], None, r"got \(1, 1, 1\)"),
            ([0, 1], [1.0, 1.0], r"\(rows, k\)"),
            ([[0, 1]], [1.0, 1.0], r"weights must .* \(1, 2\) .* got \(2,\)"),
        ],
    )
    def test_refuses(self, ids, weights, message):
        with pytest.raises(ValueError, match=message):
            vf.select_adapters(several(small()), ids, weights)

    def test_refuses_sums_of_sums(self):
        stacked = several(small())
        with pytest.raises(ValueError, match="already contains weighted sums"):
            vf.select_adapters(vf.select_adapters(stacked, [[0, 1], [1, 2]]), [[0, 1]])
        stacked = several(small(targets=["0"], modules_to_save=["2"]))
        with pytest.raises(ValueError, match="rows of the base model: pass the result of stack_adapters"):
            vf.select_adapters(vf.select_adapters(stacked, [0, -1]), [[0, 1]])


# Name, base, fields of the config, and a key of what is trained beside the vectors.
OWN = [
    ("bert", "dense", {"task_type": "SEQ_CLS"}, "classifier.weight"),
    ("bert", "nested", {"bias": "vera_only"}, "bert.encoder.layer.0.attention.self.query.bias"),
    ("bert", "int8", {"bias": "all", "task_type": "SEQ_CLS"}, "bert.encoder.layer.0.output.dense.bias"),
    ("bert", "dense", {"modules_to_save": ["LayerNorm"]}, "bert.embeddings.LayerNorm.weight"),
    ("gpt2", "dense", {"modules_to_save": ["c_proj"]}, "transformer.h.1.mlp.c_proj.weight"),
    ("llama", "nested", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
]


class TestOwnOfTheBase:
    """Where adapters have heads or biases, a row of the base has the base's, and sums add changes to them."""

    @pytest.fixture(params=OWN, ids=lambda case: f"{case[0]}-{case[3]}")
    def case(self, request):
        name, base, fields, own = request.param
        adapted = build(name, base, **fields)
        return adapted, several(adapted, 3), own, tokens(4, 6)

    def run(self, adapted, params, ids):
        return adapted.apply(params, adapted.frozen, input_ids=ids).logits

    def test_rows_of_the_base(self, case):
        adapted, stacked, own, ids = case
        stacked = stacked | {own: stacked[own] + 1}  # the base's own value is another
        rows = vf.select_adapters(stacked, [1, -1, 0, -1])
        assert f"{own}.base_share" in rows
        out = self.run(adapted, rows, ids)
        assert_near(out[[1, 3]], self.run(adapted, adapted.params, ids)[[1, 3]])
        for i, chosen in ((0, 1), (2, 0)):
            assert_near(out[i : i + 1], self.run(adapted, row(stacked, chosen), ids[i : i + 1]))
        assert relative_error(out[[0, 2]], self.run(adapted, adapted.params, ids)[[0, 2]]) > 1e-3
        assert not any(key.endswith("base_share") for key in vf.select_adapters(stacked, [1, 0, 0, 2]))

    def test_sums(self, case):
        adapted, stacked, _, ids = case
        model, params = adapted.apply.model, adapted.params
        chosen, weights = [[0, 1], [2, -1], [-1, -1], [1, 1]], [[0.5, -2.0], [3.0, 7.0], [1.0, 1.0], [0.25, 0.75]]
        out = self.run(adapted, vf.select_adapters(stacked, chosen, weights), ids)
        for i in range(4):
            one = vf.select_adapters(
                {k: stacked[k] for k in stacked if "lambda" in k}, chosen[i : i + 1], weights[i : i + 1]
            )
            for key in stacked:
                if "lambda" not in key:
                    base = model.get_parameter(key).detach()
                    terms = [w * (stacked[key][j] - base) for j, w in zip(chosen[i], weights[i], strict=True) if j >= 0]
                    one[key] = base + sum(terms, torch.zeros_like(base))
            assert one.keys() >= params.keys()
            assert_near(out[i : i + 1], self.run(adapted, one, ids[i : i + 1]))
        assert_near(out[2:3], self.run(adapted, params, ids[2:3]))

    def test_of_one_is_that_one(self, case):
        adapted, stacked, _, ids = case
        out = self.run(adapted, vf.select_adapters(stacked, [[2], [0], [-1], [1]]), ids)
        assert_near(out, self.run(adapted, vf.select_adapters(stacked, [2, 0, -1, 1]), ids))

    def test_whatever_the_others_hold(self):
        adapted = small(targets=["0"], modules_to_save=["2"])
        broken = {key: torch.full_like(leaf, torch.nan) for key, leaf in several(adapted).items()}
        x = normal(2, 7)
        for ids in ([-1, -1], [[-1, -1], [-1, -1]]):
            rows = vf.select_adapters(broken, ids)
            assert_same(adapted.apply(rows, adapted.frozen, x), adapted.apply.model(x))

    def test_gradients_and_transforms(self):
        adapted = small(targets=["0"], modules_to_save=["2"], bias="all")
        stacked, x, ids = several(adapted), normal(4, 7), torch.tensor([2, -1, 0, 2])
        loss = lambda s: adapted.apply(vf.select_adapters(s, ids), adapted.frozen, x).square().sum()
        gradient = grad(loss)(stacked)
        single = lambda p, rows: adapted.apply(p, adapted.frozen, x[rows]).square().sum()
        for i, rows in ((2, [0, 3]), (0, [2]), (1, []), (3, [])):
            expected = grad(single)(row(stacked, i), rows)
            assert_close(row(gradient, i), expected, rtol=1e-5, atol=1e-6)
        f = lambda s, ids: adapted.apply(vf.select_adapters(s, ids), adapted.frozen, x)
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert_close(compiled(stacked, ids), f(stacked, ids))
        w = torch.tensor([[0.5, 2.0]] * 4)
        g = lambda w: adapted.apply(vf.select_adapters(stacked, [[0, 1]] * 4, w), adapted.frozen, x)
        assert_close(vmap(g)(torch.stack([w, -w])), torch.stack([g(w), g(-w)]))

    def test_rows_can_be_selected_again_and_unstacked(self):
        adapted = small(targets=["0"], modules_to_save=["2"])
        stacked, x = several(adapted), normal(3, 7)
        rows = vf.select_adapters(stacked, [1, -1, 0])
        again = vf.select_adapters(rows, [2, 1, -1])
        expected = vf.select_adapters(stacked, [0, -1, -1])
        assert_close(adapted.apply(again, adapted.frozen, x), adapted.apply(expected, adapted.frozen, x))
        for i, one in enumerate(vf.unstack_adapters(rows)):
            out = adapted.apply(one, adapted.frozen, x[i : i + 1])
            assert_close(out, adapted.apply(rows, adapted.frozen, x)[i : i + 1])

    def test_generates(self):
        adapted = build("llama", "nested", modules_to_save=["lm_head"])
        stacked, ids = several(adapted, 2, scale=2.0), tokens(3, 5)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 2}
        options["attention_mask"] = torch.ones_like(ids)
        rows = vf.select_adapters(stacked, [1, -1, 0])
        out = adapted.apply.generate(rows, adapted.frozen, ids, **options)
        assert torch.equal(out[1], adapted.apply.generate(adapted.params, adapted.frozen, ids, **options)[1])
        assert torch.equal(out[0], adapted.apply.generate(row(stacked, 1), adapted.frozen, ids, **options)[0])

    def test_a_share_of_nothing_is_refused(self):
        adapted = small(targets=["0"], modules_to_save=["2"])
        rows = vf.select_adapters(several(adapted), [1, -1])
        del rows["2.weight"]
        with pytest.raises(ValueError, match=r"lacks 1 of its .* keys, first '2\.weight'"):
            adapted.apply(rows, adapted.frozen, normal(2, 7))

    def test_is_no_adapter_to_be_saved(self, tmp_path):
        adapted = small(targets=["0"], modules_to_save=["2"])
        one = vf.unstack_adapters(vf.select_adapters(several(adapted), [1, -1]))[0]
        with pytest.raises(ValueError, match=r"'2\..*\.base_share' belongs to a sum of adapters"):
            vf.save_adapter(tmp_path, one, adapted.frozen, adapted.config)
        with pytest.raises(ValueError, match=r"base_share"):
            vf.merge(adapted.apply.model, one, adapted.frozen)


class TestSums:
    def test_add_single_updates(self):
        adapted = small(targets=["0"])
        apply, frozen, stacked, x = adapted.apply, adapted.frozen, several(adapted), normal(3, 7)
        layer = vf.adapt(apply.model[0], vf.VeraConfig(r=R, target_modules=".*")).apply
        ids, weights = [[0, 1, 3], [2, -1, 2], [-1, -1, -1]], [[1.0, -0.5, 2.0], [0.25, 9.0, 0.5], [1.0, 1.0, 1.0]]
        summed = vf.select_adapters(stacked, ids, weights)
        bare = lambda p: {key.removeprefix("0."): leaf for key, leaf in p.items()}
        actual = layer(bare(summed), frozen, x)
        for i in range(3):
            expected = base = apply.model[0](x[i])
            for chosen, weight in zip(ids[i], weights[i], strict=True):
                if chosen >= 0:
                    expected = expected + weight * (layer(bare(row(stacked, chosen)), frozen, x[i]) - base)
            assert_close(actual[i], expected, rtol=1e-5, atol=1e-5)
        assert_same(actual[2], apply.model[0](x)[2])

    def test_of_one_is_that_one(self):
        adapted = build()
        stacked, ids = several(adapted), torch.tensor([2, 0, -1])
        for chosen in (ids, ids[:, None]):
            rows = vf.select_adapters(stacked, chosen)
            assert ("model.layers.0.self_attn.q_proj.mixture" in rows) == (chosen.dim() == 2)
        expected = adapted.apply(vf.select_adapters(stacked, ids), adapted.frozen, input_ids=tokens(3, 6)).logits
        assert_near(adapted.apply(rows, adapted.frozen, input_ids=tokens(3, 6)).logits, expected, 1e-6)

    def test_their_axis_is_none_of_the_batch(self):
        # k is the number of rows, or of tokens: nothing may take one for another.
        adapted = build()
        stacked = several(adapted)
        for rows, length, k in ((2, 2, 2), (3, 2, 3), (2, 3, 3)):
            ids = torch.arange(rows * k).reshape(rows, k) % N
            x = tokens(rows, length)
            output = adapted.apply(vf.select_adapters(stacked, ids), adapted.frozen, input_ids=x).logits
            for i in range(rows):
                one = vf.select_adapters(stacked, ids[i : i + 1])
                assert_near(output[i : i + 1], adapted.apply(one, adapted.frozen, input_ids=x[i : i + 1]).logits, 2e-6)

    def test_under_transforms(self):
        adapted = small()
        stacked, x, ids = several(adapted), normal(2, 7), torch.tensor([[0, 1], [3, 2]])
        f = lambda w: adapted.apply(vf.select_adapters(stacked, ids, w), adapted.frozen, x).square().sum()
        w, eps = torch.tensor([[1.0, -0.5], [2.0, 0.3]]), 1e-2
        slope = grad(f)(w)
        for i, j in ((0, 0), (1, 1)):
            step = torch.zeros(2, 2)
            step[i, j] = eps
            assert_close(slope[i, j], (f(w + step) - f(w - step)) / (2 * eps), rtol=1e-2, atol=1e-3)
        ws = torch.stack([w, 2 * w, -w])
        assert_close(vmap(f)(ws), torch.stack([f(w) for w in ws]), rtol=1e-5, atol=1e-5)
        assert_close(vmap(grad(f))(ws), torch.stack([grad(f)(w) for w in ws]), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("base", ["dense", "nested", "int8"])
    def test_equal_several_active_adapters_in_peft(self, base):
        adapted = build(base=base)
        stacked = several(adapted, 3)
        fields = {"r": R, "target_modules": TARGETS["llama"]}
        names = ["first", "second", "third"]
        theirs = peft.get_peft_model(quantized(llama(), base), peft.VeraConfig(**fields), adapter_name=names[0])
        for name in names[1:]:
            theirs.add_adapter(name, peft.VeraConfig(**fields))
        with torch.no_grad():
            for key, leaf in stacked.items():
                layer, _, vector = key.rpartition(".")
                parameters = getattr(theirs.base_model.model.get_submodule(layer), f"vera_{vector}")
                for i, name in enumerate(names):
                    parameters[name].copy_(leaf[i])
        # In training mode, as bitsandbytes rewrites 4-bit weights in the other; there is no dropout.
        theirs.train()
        x = tokens(3, 6)
        for active in ([0, 1], [0, 1, 2], [2]):
            rows = vf.select_adapters(stacked, [active] * 3)
            actual = adapted.apply(rows, adapted.frozen, input_ids=x).logits
            theirs.base_model.set_adapter([names[i] for i in active])
            assert_near(actual, theirs(input_ids=x).logits.detach(), 2e-6)


class TestAgreement:
    @pytest.mark.parametrize(("name", "base", "attention"), CASES)
    def test_outputs_and_gradients(self, name, base, attention):
        apply, params, frozen, _ = build(name, base, attention)
        stacked = several(build(name, base, attention))
        ids, mask = tokens(N, 2, 6), left_padded(N, 2, 6)
        # What a padded position holds is nobody's business; BERT's logits have no positions.
        kept = torch.ones(N, 1, 1) if name == "bert" else mask[..., None]

        def one(params, i):
            return apply(params, frozen, input_ids=ids[i], attention_mask=mask[i]).logits * kept[i]

        def mixed(stacked):
            rows = vf.select_adapters(stacked, torch.arange(N).repeat_interleave(2))
            out = apply(rows, frozen, input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1)).logits
            return out.unflatten(0, (N, 2)) * kept

        def folded(stacked):
            return vf.vmap_adapters(apply)(stacked, frozen, input_ids=ids, attention_mask=mask).logits * kept

        def chunked(stacked):
            f = vf.vmap_adapters(apply, chunk_size=3)
            return f(stacked, frozen, input_ids=ids, attention_mask=mask).logits * kept

        def mapped(stacked):
            f = lambda p, ids, mask: apply(p, frozen, input_ids=ids, attention_mask=mask).logits
            return vmap(f)(stacked, ids, mask) * kept

        ways = [mixed, folded, chunked]
        if attention == "eager" and name != "bert":
            ways.append(mapped)  # transformers branches on a mask's values elsewhere
        outputs = torch.stack([one(row(stacked, i), i) for i in range(N)])
        gradients = [grad(lambda p, i=i: one(p, i).square().sum())(row(stacked, i)) for i in range(N)]
        assert relative_error(one(params, 0), outputs[0]) > 1e-3
        for way in ways:
            assert_near(way(stacked), outputs)
            gradient = grad(lambda s, way=way: way(s).square().sum())(stacked)
            for i, expected in enumerate(gradients):
                for key, value in expected.items():
                    assert_near(gradient[key][i], value)

    @pytest.mark.parametrize(("name", "base", "attention"), CASES)
    def test_vmap_without_masks(self, name, base, attention):
        apply, _, frozen, _ = adapted = build(name, base, attention)
        stacked, ids = several(adapted), tokens(N, 2, 6)
        f = lambda p, ids: apply(p, frozen, input_ids=ids).logits
        outputs = torch.stack([f(row(stacked, i), ids[i]) for i in range(N)])
        assert_near(vf.vmap_adapters(apply)(stacked, frozen, input_ids=ids).logits, outputs)
        # All adapters over the same inputs.
        shared = torch.stack([f(row(stacked, i), ids[0]) for i in range(N)])
        assert_near(vmap(f, (0, None))(stacked, ids[0]), shared)
        assert_near(vf.vmap_adapters(apply, None)(stacked, frozen, input_ids=ids[0]).logits, shared)
        if name == "gpt2":  # it looks for padding among mapped tokens
            return
        assert_near(vmap(f)(stacked, ids), outputs)
        loss = lambda p, ids: f(p, ids).square().sum()
        gradients = vmap(grad(loss))(stacked, ids)
        for i in range(N):
            for key, value in grad(loss)(row(stacked, i), ids[i]).items():
                assert_near(gradients[key][i], value)

    def test_compiled_vmap_of_grad(self):
        model = quantized(llama(), "nested")
        model.model.layers = model.model.layers[:1]
        apply, _, frozen, _ = adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj", "down_proj"]))
        stacked, ids = several(adapted), tokens(2, 6)
        f = vmap(grad(lambda p: apply(p, frozen, input_ids=ids).logits.square().sum()))
        expected = f(stacked)
        for key, value in torch.compile(f, fullgraph=True, backend="aot_eager")(stacked).items():
            assert_near(value, expected[key], 1e-4)

    def test_rows_that_do_not_match_raise(self):
        apply, _, frozen, _ = adapted = build()
        stacked = several(adapted)
        for ids in (tokens(3, 6), tokens(5, 6), tokens(1, 6)):
            with pytest.raises(ValueError, match=r"lambda_b \(4, 64\) has leading axes \(4,\), .* of the first input"):
                apply(stacked, frozen, input_ids=ids)
        # As many tokens as adapters are no rows.
        with pytest.raises(ValueError, match="leading axes"):
            apply(stacked, frozen, input_ids=tokens(2, 4))

    def test_a_model_that_flattens(self):
        class Flattens(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(7, 7)

            def forward(self, x):
                return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        apply, _, frozen, _ = adapted = vf.adapt(Flattens(), vf.VeraConfig(r=R, target_modules=["layer"]))
        stacked, x = several(adapted), normal(N, 3, 7)
        expected = torch.stack([apply(row(stacked, i), frozen, x) for i in range(N)])
        assert_close(apply(stacked, frozen, x), expected[range(N), range(N)])
        assert_close(vf.vmap_adapters(apply, None)(stacked, frozen, x), expected)
        assert_close(vmap(apply, (0, None, None))(stacked, frozen, x), expected)


class TestOwnParameters:
    @pytest.mark.parametrize(
        ("name", "base", "fields", "own"),
        [
            ("bert", "dense", {"task_type": "SEQ_CLS"}, "classifier.weight"),
            ("bert", "nested", {"bias": "vera_only"}, "bert.encoder.layer.0.attention.self.query.bias"),
            ("bert", "int8", {"bias": "all", "task_type": "SEQ_CLS"}, "bert.encoder.layer.0.output.LayerNorm.bias"),
            ("bert", "dense", {"modules_to_save": ["LayerNorm"]}, "bert.embeddings.LayerNorm.weight"),
            ("gpt2", "dense", {"bias": "all"}, "transformer.h.1.mlp.c_proj.bias"),
            ("gpt2", "dense", {"modules_to_save": ["c_proj", "ln_f"]}, "transformer.h.1.mlp.c_proj.weight"),
            ("llama", "nested", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ],
    )
    def test_one_for_each_row(self, name, base, fields, own):
        apply, params, frozen, _ = adapted = build(name, base, **fields)
        assert own in params
        stacked, ids, mask = several(adapted), tokens(3, 6), left_padded(3, 6)
        chosen = [2, 0, 3]
        kept = mask.bool() if name != "bert" else slice(None)
        forward = lambda p, ids, mask: apply(p, frozen, input_ids=ids, attention_mask=mask).logits
        actual = forward(vf.select_adapters(stacked, chosen), ids, mask)
        pieces = [forward(row(stacked, i), ids[j : j + 1], mask[j : j + 1]) for j, i in enumerate(chosen)]
        assert_near(actual[kept], torch.cat(pieces)[kept])
        # It is its own one that a row gets.
        for j, i in enumerate(chosen):
            other = row(stacked, i) | {own: params[own]}
            assert relative_error(forward(other, ids[j : j + 1], mask[j : j + 1]), pieces[j]) > 1e-4
        folded = vf.vmap_adapters(apply, None)(stacked, frozen, input_ids=ids, attention_mask=mask).logits
        assert_near(folded[2][kept], forward(row(stacked, 2), ids, mask)[kept])
        last = slice(None) if name == "bert" else (slice(None), -1)
        loss = lambda p, ids, mask: forward(p, ids, mask)[last].square().sum()
        gradient = grad(lambda s: loss(vf.select_adapters(s, chosen), ids, mask))(stacked)
        expected = grad(loss)(row(stacked, 3), ids[2:], mask[2:])
        scale = max(value.abs().max() for value in expected.values())
        for key, value in expected.items():
            assert (gradient[key][3] - value).abs().max() <= 1e-5 * scale, key
            assert not gradient[key][1].any()

    def test_what_has_no_rows_raises(self):
        apply, _, frozen, _ = adapted = build(modules_to_save=["norm"])
        with pytest.raises(ValueError, match=r"'model\.norm\.weight' must .* \(64,\), got \(4, 64\)"):
            apply(several(adapted), frozen, input_ids=tokens(4, 6))


class TestGenerate:
    @pytest.mark.parametrize("base", ["dense", "nested", "int8"])
    def test_sixteen_prompts_with_sixteen_adapters(self, base):
        apply, params, frozen, _ = adapted = build(base=base, target_modules=["q_proj", "v_proj", "down_proj"])
        stacked = several(adapted, 16, scale=2.0)
        prompts = [tokens(1, 3 + i % 5, seed=i) for i in range(16)]
        ids = torch.cat([nn.functional.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        rows = vf.select_adapters(stacked, torch.arange(16))
        together = apply.generate(rows, frozen, ids, attention_mask=(ids > 0).long(), **options)
        answers = []
        for i, prompt in enumerate(prompts):
            alone = apply.generate(row(stacked, i), frozen, prompt, attention_mask=torch.ones_like(prompt), **options)
            assert torch.equal(together[i, 7:], alone[0, prompt.shape[1] :]), i
            answers.append(tuple(alone[0, prompt.shape[1] :].tolist()))
        none = apply.generate(params, frozen, ids, attention_mask=(ids > 0).long(), **options)
        assert sum(torch.equal(a, b) for a, b in zip(none, together, strict=True)) < 4
        assert len(set(answers)) > 8

    def test_rows_are_repeated_by_hand(self):
        apply, _, frozen, _ = adapted = build()
        stacked, ids = several(adapted, scale=2.0), tokens(2, 5)
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        # They need not be (see `test_plans`), but may be in a model without an encoder.
        for rows in ([3, 3, 1, 1], [3, 1]):
            selected = vf.select_adapters(stacked, rows)
            together = apply.generate(selected, frozen, ids, attention_mask=mask, **options)
            for i, chosen in enumerate([3, 1]):
                alone = apply.generate(row(stacked, chosen), frozen, ids[i : i + 1], attention_mask=mask[:1], **options)
                assert torch.equal(together[i], alone[0])

    def test_sums_and_none(self):
        apply, params, frozen, _ = adapted = build()
        stacked, ids = several(adapted, scale=2.0), tokens(3, 5)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        chosen = [[0, 1], [-1, -1], [2, -1]]
        together = apply.generate(vf.select_adapters(stacked, chosen), frozen, ids, **options)
        assert torch.equal(together[1], apply.generate(params, frozen, ids, **options)[1])
        assert torch.equal(together[2], apply.generate(row(stacked, 2), frozen, ids, **options)[2])


# What is refused

bad = Refused()

bad("stack_adapters", "one, not in a list", lambda _: vf.stack_adapters(PARAMS), r"pass \[params, ...\]")
bad("stack_adapters", "none", lambda _: vf.stack_adapters([]), "nothing to stack")
bad("stack_adapters", "dtypes", lambda _: vf.stack_adapters([{"a": ones(3)}, {"a": ones(3).half()}]), "one dtype and")
bad("stack_adapters", "devices", lambda _: vf.stack_adapters([{"a": ones(3)}, {"a": ones(3).to("meta")}]), "on meta in")
bad("stack_adapters", "None", lambda _: vf.stack_adapters([{"a": ones(3)}, {"a": None}]), "adapter 1 must be a tensor")
bad("unstack_adapters", "nothing", lambda _: vf.unstack_adapters({}), "stacked params are empty")
bad("unstack_adapters", "a scalar", lambda _: vf.unstack_adapters({"a": ones(())}), r"common leading axis.*\(\)")
bad(
    "unstack_adapters",
    "two sizes",
    lambda _: vf.unstack_adapters({"a": ones(2, 3), "b": ones(3, 3)}),
    r"'b' has shape \(3, 3\)",
)
bad("num_adapters", "a list", lambda _: num_adapters({"a": [1, 2]}), "'a' must be a tensor .*got list")
bad("num_adapters", "nothing", lambda _: num_adapters({}), "stacked params are empty")

for ids, message in (
    ([3], "adapter id 3 is out of range: there are 3 adapters"),
    ([-2], "adapter id -2 is out of range"),
    ([0.5], "must be integers, got torch.float32"),
    ([True], "must be integers, got torch.bool"),
    (0, r"have shape \(rows,\), or \(rows, k\) for sums, got \(\)"),
    ([[[0]]], r"got \(1, 1, 1\)"),
):
    bad("select_adapters", f"ids {ids}", lambda _, ids=ids: vf.select_adapters(STACK, ids), message)

bad("select_adapters", "weights of no sum", lambda _: vf.select_adapters(STACK, [0], [1.0]), "weights are for sums")
bad(
    "select_adapters",
    "too few weights",
    lambda _: vf.select_adapters(STACK, [[0, 1]], [1.0]),
    r"have the shape \(1, 2\)",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

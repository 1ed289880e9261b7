"""Many adapters at once: a mixed batch, the folded axis, torch's vmap and one at a time are the same function."""

import copy
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.batch import num_adapters

from helpers import MODELS, TARGETS, bert, gpt2, llama, quantized, randomized, relative_error, row, snapshot


R, N = 8, 4
# torch's vmap goes through fused attention in a loop, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
CASES = [
    *(("llama", base, attention) for base in ("dense", "nested", "int8") for attention in ("sdpa", "eager")),
    *(("bert", base, "sdpa") for base in ("dense", "nested", "int8")),
    *(("bert", "dense", "eager"), ("gpt2", "dense", "sdpa"), ("gpt2", "dense", "eager")),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=0):
    return torch.randint(3, 67, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(*shape):
    """A mask of rows that begin with 0, 1 or 2 tokens of padding."""
    rows, padding = torch.Size(shape[:-1]).numel(), torch.arange(shape[-1])
    return (padding >= torch.arange(rows)[:, None] % 3).long().reshape(shape)


def build(name="llama", base="dense", attention="sdpa", **fields):
    model = quantized(MODELS[name](attention=attention), base)
    return vf.adapt(model, vf.VeraConfig(r=R, **({"target_modules": TARGETS[name]} | fields)))


def several(adapted, n=N, scale=0.3):
    return vf.stack_adapters([randomized(adapted.params, seed, scale) for seed in range(n)])


def small(*, bias=True, targets=("0", "2"), **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3))
    return vf.adapt(model, vf.VeraConfig(r=R, target_modules=list(targets), **fields))


def assert_near(actual, expected, bound=1e-5):
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= bound


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


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
            (lambda p: vf.stack_adapters([p, p | {"0.lambda_d": torch.ones(3)}]), r"is \(3,\) in adapter 1 and \(8,\)"),
            (lambda p: vf.unstack_adapters({}), "empty"),
            (lambda p: vf.unstack_adapters(p), "common leading axis"),
            (lambda p: num_adapters({"a": torch.ones(2), "b": torch.ones(3)}), r"'a' is \(2,\) and 'b' is \(3,\)"),
            (lambda p: num_adapters({"a": torch.ones(()), "b": torch.ones(3)}), r"'a' is \(\)"),
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
            ([[0, 1]], [1.0, 1.0], r"weights must be \(1, 2\) .* got \(2,\)"),
        ],
    )
    def test_refuses(self, ids, weights, message):
        with pytest.raises(ValueError, match=message):
            vf.select_adapters(several(small()), ids, weights)

    def test_refuses_sums_of_sums_and_of_own_parameters(self):
        stacked = several(small())
        with pytest.raises(ValueError, match="sums already"):
            vf.select_adapters(vf.select_adapters(stacked, [[0, 1], [1, 2]]), [[0, 1]])
        adapted = small(targets=["0"], modules_to_save=["2"])
        stacked = several(adapted)
        assert vf.select_adapters(stacked, [1, 0])["2.weight"].shape == (2, 3, 5)
        with pytest.raises(ValueError, match=r"'2\.weight' is a parameter of the model itself and can't be left out"):
            vf.select_adapters(stacked, [1, -1])
        with pytest.raises(ValueError, match="can't be summed"):
            vf.select_adapters(stacked, [[0, 1]])


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
            with pytest.raises(ValueError, match=r"lambda_b \(4, 64\) has leading axes \(4,\), .* of x"):
                apply(stacked, frozen, input_ids=ids)
        # As many tokens as adapters are no rows.
        with pytest.raises(ValueError, match="leading axes"):
            apply(stacked, frozen, input_ids=tokens(2, 4))

    def test_a_model_that_flattens_raises(self):
        class Flattens(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(7, 7)

            def forward(self, x):
                return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        apply, _, frozen, _ = adapted = vf.adapt(Flattens(), vf.VeraConfig(r=R, target_modules=["layer"]))
        stacked, x = several(adapted), normal(N, 3, 7)
        with pytest.raises(ValueError, match=r"which do not match the leading axes \(12,\) of x \(12, 7\)"):
            apply(stacked, frozen, x)
        with pytest.raises(ValueError, match=r"\(12,\)"):
            vf.vmap_adapters(apply, None)(stacked, frozen, x[:1].expand(1, 3, 7))
        # torch's vmap does not ask for rows.
        expected = torch.stack([apply(row(stacked, i), frozen, x) for i in range(N)])
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
        with pytest.raises(ValueError, match=r"'model\.norm\.weight' must be \(64,\), got \(4, 64\)"):
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
        with pytest.raises(ValueError, match="leading axes"):
            apply.generate(vf.select_adapters(stacked, [3, 1]), frozen, ids, attention_mask=mask, **options)
        rows = vf.select_adapters(stacked, [3, 3, 1, 1])
        together = apply.generate(rows, frozen, ids, attention_mask=mask, **options)
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
        with pytest.raises(ValueError, match=r"output.*loss.* \(\) has no axis of 8 rows, so it mixes adapters"):
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
            ({}, (normal(3, 2, 7),), {}, r"an input \(3, 2, 7\) must have 4 adapters along axis 0"),
            ({"in_dims": 1}, (normal(N, 2, 7),), {}, r"\(4, 2, 7\) must have 4 adapters along axis 1"),
            ({"in_dims": (0, 0)}, (normal(N, 2, 7),), {}, "2 entries for 1 positional"),
            ({"in_dims": {"y": 0}}, (), {"x": normal(N, 2, 7)}, r"in_dims names \['y'\]"),
            ({}, (normal(N, 3, 7), normal(N, 2, 7)), {}, "3 and 2 rows|2 and 3 rows"),
            ({}, (normal(N, 3, 7), torch.ones(N)), {}, "one number for each adapter"),
            ({}, (torch.ones(()),), {}, r"an input \(\) must have 4"),
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
        with pytest.raises(ValueError, match="a int can't be joined"):
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


def directories(base, tmp_path):
    """Four unlike adapters over one model, saved as PEFT directories, and how PEFT reads them."""
    model = quantized(llama(), base)
    configs = [
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "save_projection": False},
        {"r": 8, "target_modules": ["down_proj", "q_proj"], "projection_prng_key": 3, "save_projection": False},
        {"r": 8, "target_modules": ["v_proj"], "projection_prng_key": 5},
        {"r": 16, "target_modules": r".*layers\.1\..*(gate|o)_proj"},
    ]
    for i, fields in enumerate(configs):
        _, params, frozen, config = vf.adapt(model, vf.VeraConfig(**fields))
        if config.save_projection:
            frozen = randomized(frozen, seed=9)  # no draw: the file's are to be read
        vf.save_adapter(tmp_path / str(i), randomized(params, seed=i, scale=0.5), frozen, config)
    return model, [tmp_path / str(i) for i in range(len(configs))]


class TestPools:
    @pytest.mark.parametrize("base", ["dense", "nested", "int8"])
    def test_give_each_row_what_peft_gives(self, base, tmp_path):
        model, folders = directories(base, tmp_path)
        pool = vf.pool_adapters([vf.load_adapter(folder, model) for folder in folders])
        assert pool.config.r == pool.frozen["vera_A"].shape[0] == 4 + 8 + 8 + 16
        x = tokens(4, 6)
        rows = pool.apply(vf.select_adapters(pool.params, [3, 2, 1, 0]), pool.frozen, input_ids=x).logits
        none = pool.apply(vf.select_adapters(pool.params, [-1] * 4), pool.frozen, input_ids=x).logits
        for i, chosen in enumerate([3, 2, 1, 0]):
            theirs = peft.PeftModel.from_pretrained(quantized(llama(), base), folders[chosen]).train()
            expected = theirs(input_ids=x[i : i + 1]).logits.detach()
            assert_near(rows[i : i + 1], expected, 5e-6)
            assert relative_error(none[i : i + 1], expected) > 1e-3
            # Over the whole batch, and summed with another one.
            assert_near(
                pool.apply(row(pool.params, chosen), pool.frozen, input_ids=x).logits[i : i + 1], expected, 5e-6
            )

    def test_gradients_are_each_adapters_own(self, tmp_path):
        model, folders = directories("dense", tmp_path)
        adapters = [vf.load_adapter(folder, model) for folder in folders]
        pool, x = vf.pool_adapters(adapters), tokens(2, 6)
        f = vf.vmap_adapters(pool.apply, None)
        gradient = grad(lambda s: f(s, pool.frozen, input_ids=x).logits.square().sum())(pool.params)
        start = 0
        for i, adapted in enumerate(adapters):
            own = grad(lambda p, a=adapted: a.apply(p, a.frozen, input_ids=x).logits.square().sum())(adapted.params)
            for key, value in own.items():
                part = gradient[key][i]
                part = part[start : start + len(value)] if key.endswith("lambda_d") else part
                assert_near(part, value)
            start += adapted.config.r

    def test_equal_projections_are_held_once(self):
        model = small().apply.model
        a = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0", "2"]))
        b = a._replace(params=randomized(a.params))
        c = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0", "2"], projection_prng_key=1))
        pool = vf.pool_adapters([a, c._replace(params=randomized(c.params, 2)), b])
        assert pool.config.r == 8
        for i, adapted in enumerate((a, c._replace(params=randomized(c.params, 2)), b)):
            expected = adapted.apply(adapted.params, adapted.frozen, normal(3, 7))
            assert_close(pool.apply(row(pool.params, i), pool.frozen, normal(3, 7)), expected)

    def test_inputs_are_left_alone(self):
        model = small().apply.model
        adapters = [vf.adapt(model, vf.VeraConfig(r=r, target_modules=[t])) for r, t in ((4, "0"), (8, "2"))]
        before = snapshot(*(tree for a in adapters for tree in (a.params, a.frozen)), model)
        pool = vf.pool_adapters(adapters)
        for leaf in (*pool.params.values(), *pool.frozen.values()):
            leaf.fill_(7.0)
        assert_same(snapshot(*(tree for a in adapters for tree in (a.params, a.frozen)), model), before)

    def test_of_one_is_that_one(self):
        adapted = small()
        pool = vf.pool_adapters([adapted])
        assert_same(row(pool.params, 0), adapted.params)
        assert_same(pool.frozen, adapted.frozen)

    def test_heads_and_biases(self):
        model = bert()
        configs = [
            {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"},
            {"r": 8, "target_modules": ["value"], "bias": "vera_only"},
            {"r": 4, "target_modules": ["key", "query"]},
        ]
        adapters = [vf.adapt(model, vf.VeraConfig(**fields)) for fields in configs]
        adapters = [a._replace(params=randomized(a.params, i)) for i, a in enumerate(adapters)]
        pool, x = vf.pool_adapters(adapters), tokens(3, 6)
        rows = pool.apply(pool.params, pool.frozen, input_ids=x).logits
        for i, a in enumerate(adapters):
            assert_near(rows[i : i + 1], a.apply(a.params, a.frozen, input_ids=x[i : i + 1]).logits)

    @pytest.mark.parametrize("own", [False, True])
    def test_a_row_can_be_saved(self, own, tmp_path):
        model = bert()
        more = {"modules_to_save": ["classifier"]} if own else {}
        configs = [{"r": 4, "target_modules": ["query"], **more}, {"r": 8, "target_modules": ["value"]}]
        adapters = [vf.adapt(model, vf.VeraConfig(**fields)) for fields in configs]
        adapters = [a._replace(params=randomized(a.params, i)) for i, a in enumerate(adapters)]
        pool, x = vf.pool_adapters(adapters), tokens(3, 6)
        for i, a in enumerate(adapters):
            vf.save_adapter(tmp_path, row(pool.params, i), pool.frozen, pool.config, adapter_name=str(i))
            expected = a.apply(a.params, a.frozen, input_ids=x).logits
            loaded = vf.load_adapter(tmp_path, model, adapter_name=str(i))
            assert_near(loaded.apply(loaded.params, loaded.frozen, input_ids=x).logits, expected)
            theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / str(i)).eval()
            assert_near(theirs(input_ids=x).logits.detach(), expected)

    def test_dropout_of_one_rate(self):
        model = small().apply.model
        rates = [(0.5, 0.5), (0.5, 0.0)]
        for pair in rates:
            adapters = [vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"], vera_dropout=rate)) for rate in pair]
            pool = vf.pool_adapters([a._replace(params=randomized(a.params)) for a in adapters])
            dropped = pool.apply.with_dropout(torch.Generator().manual_seed(0))
            exact = pool.apply(row(pool.params, 0), pool.frozen, normal(3, 7))
            assert torch.equal(dropped(row(pool.params, 0), pool.frozen, normal(3, 7)), exact) == (pair[0] != pair[1])

    def test_targets_are_in_the_models_order(self):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)))
        adapters = [vf.adapt(model, vf.VeraConfig(r=4, target_modules=[name])) for name in ("10", "2")]
        assert list(vf.pool_adapters(adapters).apply.targets) == ["2", "10"]

    def test_keep_int8_activations(self):
        model = nn.Sequential(vf.to_bnb(vf.quantize_8bit(normal(13, 32))))
        adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"]), int8_activations=True)
        pool, x = vf.pool_adapters([adapted, adapted]), normal(3, 32)
        rows = pool.apply(row(pool.params, 1), pool.frozen, x)
        assert_near(rows, vf.quantized_linear(vf.from_bnb(model[0])[0], x, int8_activations=True))
        assert relative_error(rows, vf.quantized_linear(vf.from_bnb(model[0])[0], x)) > 1e-4

    def test_refuses(self):
        adapted = small()
        other = small()
        int8 = vf.adapt(adapted.apply.model, adapted.config, int8_activations=True)
        with pytest.raises(ValueError, match="nothing to pool"):
            vf.pool_adapters([])
        with pytest.raises(ValueError, match="adapter 1 belongs to another model object"):
            vf.pool_adapters([adapted, other])
        with pytest.raises(ValueError, match="int8_activations"):
            vf.pool_adapters([adapted, int8])
        with pytest.raises(ValueError, match=r"'0\.lambda_b' of adapter 1 is stacked"):
            vf.pool_adapters([adapted, adapted._replace(params=several(adapted))])


def test_gpt2_pools_conv1d():
    model = gpt2()
    adapters = [
        vf.adapt(model, vf.VeraConfig(r=r, target_modules=[target], projection_prng_key=r))
        for r, target in ((4, "c_attn"), (8, "c_fc"))
    ]
    adapters = [a._replace(params=randomized(a.params, i)) for i, a in enumerate(adapters)]
    pool, x = vf.pool_adapters(adapters), tokens(2, 6)
    rows = pool.apply(pool.params, pool.frozen, input_ids=x).logits
    for i, a in enumerate(adapters):
        assert_near(rows[i : i + 1], a.apply(a.params, a.frozen, input_ids=x[i : i + 1]).logits)

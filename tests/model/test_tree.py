"""Bases in other states: wrapped, offloaded, computed weights; what a copy shares and what it replaces."""

import copy
import dataclasses
from collections import OrderedDict

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import vera_func as vf

from helpers import llama, quantized, randomized, relative_error, snapshot


IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIG = vf.VeraConfig(r=5, target_modules=["q_proj", "v_proj"])


def logits(adapted, params=None):
    with torch.no_grad():
        return adapted.apply(adapted.params if params is None else params, adapted.frozen, input_ids=IDS).logits


# ------------------------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


def compiled_twice_inside(model):
    layer = model.model.layers[1]
    layer.self_attn.q_proj = compiled(layer.self_attn.q_proj)
    model.model.layers[1] = compiled(nn.DataParallel(layer))
    return model


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled inside": compiled_inside,
    "wrapped inside a wrapper": lambda model: compiled(compiled_twice_inside(model)),
}


class TestWrappers:
    @pytest.mark.parametrize("quant", [None, "nf4"])
    @pytest.mark.parametrize("how", WRAPPERS)
    def test_are_taken_off(self, how, quant, tmp_path):
        plain = llama() if quant is None else vf.quantize_model(llama(), quant)
        adapted = vf.adapt(plain, CONFIG)
        params = randomized(adapted.params)
        expected = logits(adapted, params)
        wrapped = WRAPPERS[how](copy.deepcopy(plain))
        names = [name for name, _ in wrapped.named_modules()]
        again = vf.adapt(wrapped, CONFIG)
        assert again.params.keys() == adapted.params.keys()
        assert torch.equal(logits(again, params), expected)
        assert [name for name, _ in wrapped.named_modules()] == names

        vf.save_adapter(tmp_path, params, *again[2:])
        for base in (plain, wrapped):
            loaded = vf.load_adapter(tmp_path, base)
            assert torch.equal(logits(loaded), expected)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).train()
        assert relative_error(theirs(input_ids=IDS).logits, expected) < 1e-5

    @pytest.mark.parametrize("how", WRAPPERS)
    def test_of_models_that_are_merged_or_converted(self, how, tmp_path):
        adapted = vf.adapt(llama(), CONFIG)
        params = randomized(adapted.params)
        merged = vf.merge(WRAPPERS[how](llama()), params, adapted.frozen)
        assert type(merged) is type(llama())
        assert relative_error(merged(input_ids=IDS).logits, logits(adapted, params)) < 1e-5
        wrapped = WRAPPERS[how](llama())
        assert vf.export_lora(tmp_path, params, *adapted[2:], wrapped).error.keys() == {
            key.removesuffix(".lambda_b") for key in params if key.endswith("lambda_b")
        }
        reports = vf.model_merge_report(vf.adapt(wrapped, CONFIG)._replace(params=params), torch.float32)
        assert all(report.kept > 0.999 for report in reports.values())
        names = {name for name, _ in llama().named_modules()}
        quantized = vf.quantize_model(wrapped, "int8")
        assert {name for name, _ in quantized.named_modules()} == names
        assert {name for name, _ in vf.dequantize_model(WRAPPERS[how](quantized)).named_modules()} == names

    def test_distributed(self, process_group):
        adapted = vf.adapt(nn.parallel.DistributedDataParallel(llama()), CONFIG)
        assert adapted.params.keys() == vf.adapt(llama(), CONFIG).params.keys()

    def test_memory_is_shared(self):
        model = compiled_twice_inside(llama())
        kept = vf.adapt(model, CONFIG).apply.model
        pointers = {p.data_ptr() for p in kept.parameters()}
        assert pointers == {p.data_ptr() for p in model.parameters()}


TUNERS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
}
NESTED = {
    "bare": lambda model: model,
    "compiled": compiled,
    "DataParallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "a part": lambda model: nn.ModuleDict({"q_proj": nn.Linear(3, 3), "v_proj": nn.Linear(3, 3), "part": model}),
    "its tuner": lambda model: model.base_model,
}


class TestPeft:
    @pytest.mark.parametrize("how", NESTED)
    @pytest.mark.parametrize("kind", TUNERS)
    def test_wrapped_models_are_refused(self, kind, how):
        model = peft.get_peft_model(llama(), TUNERS[kind]())
        adapted = vf.adapt(llama(), CONFIG)
        wrapped = NESTED[how](model)
        for call in (
            lambda: vf.adapt(wrapped, CONFIG),
            lambda: vf.merge(wrapped, adapted.params, adapted.frozen),
            lambda: vf.quantize_model(wrapped, "nf4"),
            lambda: vf.dequantize_model(wrapped),
        ):
            with pytest.raises(ValueError, match=r"PEFT.*unload\(\)"):
                call()
        # The way out.
        assert torch.equal(logits(vf.adapt(model.unload(), CONFIG)), logits(adapted))

    def test_layers_that_transformers_put_in(self):
        # What model.add_adapter does; transformers 5.24 refuses every release of PEFT there.
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), llama())
        with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj'.*PEFT.*Load the base model"):
            vf.adapt(model, CONFIG)


# ------------------------------------------------------------------------------------------------------ offloading


def offloaded(model, how, folder):
    model = copy.deepcopy(model)
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


class TestOffloading:
    @pytest.mark.parametrize("how", ["cpu", "disk"])
    def test_a_dense_base_is_computed_through_the_hooks(self, how, tmp_path):
        plain = vf.adapt(llama(), CONFIG)
        params = randomized(plain.params)
        model = offloaded(llama(), how, tmp_path)
        adapted = vf.adapt(model, CONFIG)
        assert all(value.device.type == "cpu" for value in (*adapted.params.values(), *adapted.frozen.values()))
        assert torch.equal(logits(adapted), logits(plain))
        assert torch.equal(logits(adapted, params), logits(plain, params))
        assert all(p.is_meta for p in model.parameters())
        if how == "cpu":
            loss = lambda p, a: a.apply(p, a.frozen, input_ids=IDS).logits.square().mean()
            assert_close(torch.func.grad(loss)(params, adapted), torch.func.grad(loss)(params, plain))

    @pytest.mark.parametrize("quant", ["nf4", "nested", "int8"])
    def test_a_quantized_base_is_refused(self, quant):
        adapted = vf.adapt(offloaded(quantized(llama(), quant), "cpu", None), CONFIG)
        with pytest.raises(ValueError, match="offload"):
            logits(adapted)

    @pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "norm"])
    def test_what_is_trained_has_to_be_there(self, saved):
        model = offloaded(llama(), "cpu", None)
        with pytest.raises(ValueError, match=f"{saved}.weight'.*offload"):
            vf.adapt(model, vf.VeraConfig(r=5, target_modules=["q_proj"], modules_to_save=[saved]))
        adapted = vf.adapt(model, CONFIG)
        with pytest.raises(ValueError, match=r"model.norm.weight.*offload"):
            logits(adapted, adapted.params | {"model.norm.weight": torch.ones(64)})

    @pytest.mark.parametrize("quant", [None, "nf4", "int8"])
    def test_nothing_is_merged_or_converted(self, quant, tmp_path):
        plain = llama() if quant is None else vf.quantize_model(llama(), quant)
        adapted = vf.adapt(plain, CONFIG)
        model = offloaded(plain, "cpu", None)
        for call in (
            lambda: vf.merge(model, adapted.params, adapted.frozen),
            lambda: vf.merge(model, adapted.params, adapted.frozen, torch.float32),
            lambda: vf.model_merge_report(vf.adapt(model, CONFIG), torch.float32),
            lambda: vf.dequantize_model(model),
            lambda: vf.quantize_model(model, "nf4"),
        ):
            with pytest.raises(ValueError, match="offload"):
                call()

    def test_a_part_on_meta(self):
        """Without hooks nothing brings the weights back: torch multiplies by memory that nobody wrote."""
        model = llama()
        model.model.layers[1].mlp.to("meta")
        adapted = vf.adapt(model, CONFIG)
        with pytest.raises(ValueError, match=r"'model.layers.1.mlp.gate_proj.weight'.*meta.*offload"):
            logits(adapted)
        with pytest.raises(ValueError, match="offload"):
            vf.merge(model, adapted.params, adapted.frozen)

    def test_shapes_alone(self):
        """All on meta is no mistake: it says which shapes come out, and costs nothing."""
        model = nn.Sequential(OrderedDict(q_proj=nn.Linear(64, 32), v_proj=nn.Linear(32, 5))).to("meta")
        apply, params, frozen, _ = vf.adapt(model, CONFIG)
        assert apply(params, frozen, torch.ones(7, 64, device="meta")).shape == (7, 5)
        here = {key: torch.ones_like(value, device="cpu") for key, value in params.items()}
        for vectors in (params, here):
            with pytest.raises(ValueError, match=r"meta.*offload"):
                apply(vectors, frozen, torch.ones(7, 64))
        with torch.device("meta"):
            assert vf.quantize_model(nn.Linear(64, 32), "nf4").weight.is_meta

    @pytest.mark.parametrize("quantize", [vf.quantize_4bit, vf.quantize_8bit])
    def test_a_quantized_weight_without_data(self, quantize):
        q = quantize(torch.ones(32, 64))
        away = tree_map(lambda leaf: leaf.to("meta"), q)
        params, frozen = vf.init_params(4, 32), vf.init_projections(4, 64, 32)
        for call in (
            lambda: vf.quantized_linear(away, torch.ones(3, 64)),
            lambda: vf.quantized_linear(away, torch.ones(3, 64, requires_grad=True)),
            lambda: vf.quantized_linear(away, torch.ones(3, 64), int8_activations=quantize is vf.quantize_8bit),
            lambda: torch.func.vmap(lambda x: vf.quantized_linear(away, x))(torch.ones(3, 64)),
            lambda: torch.compile(lambda x: vf.quantized_linear(away, x), backend="eager")(torch.ones(3, 64)),
            lambda: vf.merge_quantized(away, params, frozen),
            lambda: vf.merge_dense(away, params, frozen),
            lambda: vf.merge_report(away, params, frozen),
        ):
            with pytest.raises(Exception, match="offload"):
                call()
        assert vf.quantized_linear(away, torch.ones(3, 64, device="meta")).shape == (3, 32)

    def test_statistics_without_data(self):
        """accelerate takes the packed weight away and leaves the statistics."""
        q = vf.quantize_4bit(torch.ones(32, 64))
        for leaf in ("packed", "absmax"):
            half = dataclasses.replace(q, **{leaf: getattr(q, leaf).to("meta")})
            for call in (lambda q: vf.quantized_linear(q, torch.ones(3, 64)), vf.dequantize):
                with pytest.raises(ValueError, match="offload"):
                    call(half)

    def test_vectors_without_data(self):
        params, frozen = vf.init_params(4, 6, device="meta"), vf.init_projections(4, 8, 6)
        frozen = {key: value.to("meta") for key, value in frozen.items()}
        with pytest.raises(ValueError, match="adapter is on the meta device"):
            vf.vera_forward(params, frozen, torch.ones(3, 8), nn.Linear(8, 6))

    def test_a_dense_weight_without_data(self):
        params, frozen = vf.init_params(4, 6), vf.init_projections(4, 8, 6)
        with pytest.raises(ValueError, match="offload"):
            vf.merge_dense(torch.ones(6, 8, device="meta"), params, frozen)


# ------------------------------------------------------------------------------------------------------ the copies


class Computed(nn.Module):
    """A weight that is computed, in the way `how` does it, beside a plain layer."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.layer = nn.Linear(7, 8), how(nn.Linear(8, 6))

    def forward(self, x):
        return self.layer(self.plain(x).tanh())


HOW = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm by a hook": nn.utils.weight_norm,
    "spectral_norm by a hook": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("how", HOW)
class TestComputedWeights:
    X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))

    def adapted(self, how, target):
        model = Computed(HOW[how]).train()
        model(self.X)
        model.eval()
        adapted = vf.adapt(model, vf.VeraConfig(r=5, target_modules=[target]))
        return model, adapted._replace(params=randomized(adapted.params))

    def test_are_adapted(self, how):
        model, adapted = self.adapted(how, "layer")
        vectors = {leaf: adapted.params[f"layer.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
        delta = vf.delta_weight(vectors, adapted.frozen, 8)
        expected = model(self.X) + model.plain(self.X).tanh() @ delta.T
        assert_close(adapted.apply(adapted.params, adapted.frozen, self.X), expected, rtol=1e-5, atol=1e-5)

    def test_merging_says_how(self, how):
        model, adapted = self.adapted(how, "layer")
        before = snapshot(model)
        remedy = "remove_parametrizations" if "hook" not in how else how.replace(" by a hook", "").join(["remove_", ""])
        for call in (lambda: vf.merge(model, adapted.params, adapted.frozen), lambda: vf.model_merge_report(adapted)):
            with pytest.raises(ValueError, match=rf"'layer'.*{remedy}"):
                call()
        assert_close(snapshot(model), before, rtol=0, atol=0)

    def test_beside_what_is_merged_they_stay(self, how):
        model, adapted = self.adapted(how, "plain")
        merged = vf.merge(model, adapted.params, adapted.frozen)
        assert_close(merged(self.X), adapted.apply(adapted.params, adapted.frozen, self.X), rtol=1e-5, atol=1e-5)

"""`to_module`: parameters under the keys of params, and what transformers and PEFT do with the module."""

import copy
import io
import os
import pickle
import shutil
import textwrap
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, grad
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint

import vera_func as vf
from vera_func.io import module as module_file
from vera_func.model.convert import quantize_model

from helpers import (
    MODELS,
    TARGETS,
    language,
    llama,
    quantized,
    randomized,
    relative_error,
    snapshot,
    tokens,
)
from refused import (
    ADAPTED,
    PARAMS,
    STACK,
    Refused,
)


R = 4


def build(name, base="dense"):
    """In training mode, as bitsandbytes rewrites 4-bit weights in the other, but without dropout."""
    model = quantized(MODELS[name](), base).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Tied(nn.Module):
    """Two layers with one bias, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(7, 7), nn.Linear(7, 7)
        self.lin2.bias = self.lin1.bias
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.norm(self.lin2(self.lin1(x).tanh())))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.lin1 = nn.Linear(7, 7)
        self.lin2 = self.lin1

    def forward(self, x):
        return self.lin2(self.lin1(x).tanh())


class Doubled(nn.Linear):
    """A subclass, whose own forward has to run."""

    def forward(self, x):
        return 2 * super().forward(x)


MAKERS = {
    "two linears": lambda: nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 3)),
    "Conv1D": lambda: nn.Sequential(Conv1D(7, 7), nn.LayerNorm(7), Conv1D(3, 7)),
    "a subclass": lambda: nn.Sequential(Doubled(7, 7), nn.LayerNorm(7), Doubled(7, 3)),
    "nf4": lambda: quantize_model(nn.Sequential(nn.Linear(7, 64), nn.LayerNorm(64), nn.Linear(64, 3)), "nf4"),
    "int8": lambda: quantize_model(nn.Sequential(nn.Linear(7, 64), nn.LayerNorm(64), nn.Linear(64, 3)), "int8"),
    "a bare layer": lambda: nn.Linear(7, 3),
}
NAMES = [
    *(
        (name, {"target_modules": ["0"], "bias": bias} | saved)
        for name in ("two linears", "Conv1D", "a subclass", "nf4", "int8")
        for bias in ("none", "vera_only", "all")
        for saved in ({}, {"modules_to_save": ["1"]})
    ),
    ("two linears", {"target_modules": ["0"], "modules_to_save": ["1", "2"], "bias": "all"}),
    ("Conv1D", {"target_modules": ["0"], "modules_to_save": ["2"]}),
    ("a bare layer", {"target_modules": ".*", "bias": "vera_only"}),
    *(
        (Tied, {"target_modules": t, "bias": b})
        for t in (["lin1", "lin2"], ["lin1"], ["lin2"])
        for b in ("vera_only", "all")
    ),
    (Tied, {"target_modules": ["lin2"], "bias": "all", "modules_to_save": ["norm", "head"]}),
    (Twice, {"target_modules": ["lin1"], "bias": "vera_only"}),
]


@pytest.mark.parametrize(("make", "fields"), NAMES, ids=str)
def test_the_trainable_names_are_the_keys(make, fields, tmp_path):
    torch.manual_seed(0)
    model = (MAKERS[make] if isinstance(make, str) else make)()
    adapted = vf.adapt(model, vf.VeraConfig(r=R, **fields))
    params = randomized(adapted.params, scale=0.5)
    adapted, x = adapted._replace(params=params), torch.randn(5, 7)
    module = vf.to_module(adapted)
    found = trained(module)
    assert found.keys() == params.keys()
    # The layer's own parameter stands in the place of the base layer's, not beside it.
    dense = [p for p in model.parameters() if p.is_floating_point()]
    vectors = [value for key, value in params.items() if "lambda" in key]
    assert sum(p.numel() for p in module.parameters()) == sum(value.numel() for value in (*dense, *vectors))
    # Where the vectors add nothing, it is the model with these parameters.
    oracle = copy.deepcopy(model).train()
    still = {key: torch.zeros_like(value) if key.endswith("lambda_b") else value for key, value in params.items()}
    for key in params:
        if "lambda" not in key:
            oracle.get_parameter(key).data = params[key].clone()
    assert_close(adapted.apply(still, adapted.frozen, x), oracle(x), rtol=1e-4, atol=1e-5)
    # Read back, they are params.
    output = module(x)
    assert torch.equal(adapted.apply(found, adapted.frozen, x), output)
    vf.save_adapter(tmp_path, found, adapted.frozen, adapted.config)
    loaded = vf.load_adapter(tmp_path, model)
    assert torch.equal(loaded.apply(loaded.params, loaded.frozen, x), output)
    # Under these names the module takes other values, and gives them their gradients.
    other = randomized(params, seed=3)
    assert torch.equal(
        functional_call(module, other, (x,), tie_weights=make is not Twice), adapted.apply(other, adapted.frozen, x)
    )
    assert torch.equal(module(x), output)
    output.square().sum().backward()
    gradient = grad(lambda params: adapted.apply(params, adapted.frozen, x).square().sum())(params)
    for key, value in gradient.items():
        assert_close(found[key].grad, value)


@pytest.mark.parametrize(
    ("saved", "more"),
    [
        ([], ["model.embed_tokens.weight"]),
        ([], ["lm_head.weight", "model.embed_tokens.weight"]),
        (["lm_head"], []),
        (["embed_tokens"], []),
        (["embed_tokens", "lm_head"], []),
    ],
    ids=str,
)
def test_the_trainable_names_are_the_keys_of_tied_embeddings(saved, more):
    model = llama(tie_word_embeddings=True)
    config = vf.VeraConfig(r=R, target_modules=["q_proj"], modules_to_save=saved or None)
    apply, params, frozen, config = vf.adapt(model, config)
    params = randomized(params | {key: model.get_parameter(key).detach() for key in more})
    module = vf.to_module(vf.Adapted(apply, params, frozen, config))
    found = trained(module)
    assert found.keys() == params.keys()
    output = module(input_ids=tokens()).logits
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, output)
    assert torch.equal(apply(found, frozen, input_ids=tokens()).logits, output)


def test_a_layer_under_two_names_forgets_what_it_was_given():
    torch.manual_seed(0)
    adapted = vf.adapt(Twice(), vf.VeraConfig(r=R, target_modules=["lin1"], bias="vera_only"))
    x = torch.randn(5, 7)
    for key in adapted.apply.slots:
        if not key.endswith("mixture"):
            before = adapted.apply(adapted.params, adapted.frozen, x)
            value = torch.randn(adapted.apply.slots[key].shape)
            adapted.apply(adapted.params | {key: value}, adapted.frozen, x)
            assert torch.equal(adapted.apply(adapted.params, adapted.frozen, x), before), key


@pytest.mark.parametrize("fields", [{"target_modules": ["0"]}, {"target_modules": ["1"], "modules_to_save": ["0"]}])
def test_hooks_of_a_layer_with_parameters_of_its_own_run(fields):
    layer = nn.Linear(7, 3)
    layer.register_forward_hook(lambda layer, args, y: y + 1)
    head = nn.Linear(3, 2)
    adapted = vf.adapt(nn.Sequential(layer, head), vf.VeraConfig(r=R, bias="all", **fields))
    x = torch.randn(5, 7)
    bias = torch.randn(3)
    expected = head(nn.functional.linear(x, layer.weight, bias) + 1)
    params = adapted.params | {"0.bias": bias}
    assert_close(adapted.apply(params, adapted.frozen, x), expected)
    assert_close(vf.to_module(adapted._replace(params=params))(x), expected)


@pytest.mark.parametrize(
    ("name", "base", "fields"),
    [
        ("bert", "nf4", {"bias": "vera_only", "task_type": "SEQ_CLS"}),
        ("bert", "int8", {"bias": "all"}),
        ("llama", "nested", {"modules_to_save": ["lm_head", "model.norm"]}),
        ("gpt2", "dense", {"bias": "all"}),
    ],
)
def test_peft_reads_what_save_pretrained_writes(name, base, fields, tmp_path):
    model = build(name, base)
    config = vf.VeraConfig(r=R, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **fields)
    adapted = vf.adapt(model, config)
    module = vf.to_module(adapted._replace(params=randomized(adapted.params)))
    expected = module(input_ids=tokens()).logits
    module.save_pretrained(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = vf.load_adapter(tmp_path / "adapter", model)
    assert torch.equal(loaded.apply(loaded.params, loaded.frozen, input_ids=tokens()).logits, expected)
    theirs = peft.PeftModel.from_pretrained(build(name, base), tmp_path / "adapter")
    assert relative_error(theirs.train()(input_ids=tokens()).logits, expected) < 1e-6


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch.load(saved(module), weights_only=False),
}


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_a_copy_is_a_module_of_its_own(how, base, tmp_path):
    model = build("bert", base)
    adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=TARGETS["bert"], bias="vera_only"))
    module = vf.to_module(adapted._replace(params=randomized(adapted.params)))
    other = COPIES[how](module)
    assert type(other) is type(module) is type(model)
    assert torch.equal(other(input_ids=tokens()).logits, module(input_ids=tokens()).logits)
    assert other.num_parameters() == module.num_parameters()
    before = snapshot(dict(module.named_parameters()))
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter.add_(1.0)
    assert_close(snapshot(dict(module.named_parameters())), before, rtol=0, atol=0)
    other.save_pretrained(tmp_path)
    loaded = vf.load_adapter(tmp_path, model)
    assert loaded.params.keys() == trained(other).keys()
    for key, value in trained(other).items():
        assert torch.equal(loaded.params[key], value)


def test_save_pretrained_takes_what_transformers_gives():
    module = vf.to_module(vf.adapt(llama(), vf.VeraConfig(r=R, target_modules=["q_proj"])))
    with pytest.raises(ValueError, match=r"call module\.push_to_hub"):
        module.save_pretrained("nowhere", push_to_hub=True)


def test_save_pretrained_on_other_processes_writes_nothing(tmp_path):
    module = vf.to_module(vf.adapt(llama(), vf.VeraConfig(r=R, target_modules=["q_proj"])))
    module.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    # A gathered state, as of a sharded model, goes before the module's own.
    state = {key: torch.full_like(value, 2.0) for key, value in trained(module).items()}
    module.save_pretrained(tmp_path / "a", state_dict=state)
    loaded = vf.load_adapter(tmp_path / "a", llama())
    assert all((value == 2).all() for value in loaded.params.values())


def test_other_modules_have_no_methods_of_transformers():
    module = vf.to_module(vf.adapt(nn.Sequential(nn.Linear(7, 3)), vf.VeraConfig(r=R, target_modules=["0"])))
    assert not hasattr(module, "save_pretrained")
    assert not hasattr(module, "num_parameters")


# transformers 5 renames it.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "base"), [("llama", "dense"), ("llama", "nested"), ("gpt2", "dense")])
def test_gradient_checkpointing(name, base, reentrant):
    _, adapted = language(name, base)
    gradients = []
    for checkpointing in (False, True):
        module = vf.to_module(adapted).train()
        if checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.enable_input_require_grads()
            calls = count_calls(module)
        module(input_ids=tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert set(calls.values()) == {2}  # every layer ran again in backward
    for key in adapted.params:
        assert relative_error(gradients[1][key], gradients[0][key]) < 1e-5, key


def count_calls(module):
    calls = {}
    for name, layer in module.named_modules():
        if isinstance(layer, vf.Linear | vf.Linear4bit):
            calls[name] = 0

            def count(layer, args, name=name):
                calls[name] += 1

            layer.register_forward_pre_hook(count)
    return calls


class TestToModule:
    def test_shares_the_base_and_copies_the_vectors(self):
        model, adapted = language("llama", "dense")
        module = vf.to_module(adapted)
        assert module.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
        before = snapshot(adapted.params)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
        module(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
        assert_close(snapshot(adapted.params), before, rtol=0, atol=0)
        params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        assert not torch.equal(
            params["model.layers.0.self_attn.q_proj.lambda_b"], before[0]["model.layers.0.self_attn.q_proj.lambda_b"]
        )
        assert torch.equal(
            adapted.apply(params, adapted.frozen, input_ids=tokens()).logits, module(input_ids=tokens()).logits
        )

    def test_uses_the_given_projections(self):
        _, adapted = language("llama", "dense")
        adapted = adapted._replace(frozen=randomized(adapted.frozen))
        expected = adapted.apply(*adapted[1:3], input_ids=tokens()).logits
        assert torch.equal(vf.to_module(adapted)(input_ids=tokens()).logits, expected)

    def test_modules_are_independent(self):
        _, adapted = language("gpt2", "dense")
        first, second = vf.to_module(adapted), vf.to_module(adapted._replace(params=randomized(adapted.params, 5)))
        expected = first(input_ids=tokens()).logits
        second(input_ids=tokens()).logits.sum().backward()
        assert torch.equal(first(input_ids=tokens()).logits, expected)
        assert torch.equal(adapted.apply(*adapted[1:3], input_ids=tokens()).logits, expected)
        assert all(p.grad is None for p in first.parameters())


# What transformers loads quantized --------------------------------------------------------------------------------

LOADS = {
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8 bit": {"load_in_8bit": True},
    "dense": None,
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def load(base_folder, kind):
    options = {} if LOADS[kind] is None else {"quantization_config": BitsAndBytesConfig(**LOADS[kind])}
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, device_map={"": "cpu"}, **options)


def adapt(model, **fields):
    return vf.adapt(model, vf.VeraConfig(**({"r": R, "target_modules": ["q_proj", "v_proj"]} | fields)))


class NoPrinting(TrainerCallback):
    """Trainer prints its last log where bars are off."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.clear()


def train(module, out, resume=None, **options):
    rows = tokens(8, 6)
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        out,
        **({"max_steps": 2, "save_steps": 1} | options),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(module, args, train_dataset=data, eval_dataset=data[:2], callbacks=[NoPrinting])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", LOADS)
def test_trainer(kind, base_folder, tmp_path):
    """It trains the vectors, its checkpoints are adapters, and a run resumed from one ends as the whole one did."""
    model = load(base_folder, kind)
    adapted = adapt(model, modules_to_save=["model.norm"])
    module = vf.to_module(adapted)
    train(module, tmp_path)
    straight = {key: value.detach().clone() for key, value in trained(module).items()}
    assert straight.keys() == adapted.params.keys()
    assert all(not torch.equal(value, adapted.params[key]) for key, value in straight.items())
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        loaded = vf.load_adapter(checkpoint, model)
        theirs = peft.PeftModel.from_pretrained(load(base_folder, kind).train(), checkpoint)
        expected = loaded.apply(loaded.params, loaded.frozen, input_ids=tokens()).logits
        assert relative_error(theirs.train()(input_ids=tokens()).logits, expected) < 1e-6
    assert all(torch.equal(loaded.params[key], value) for key, value in straight.items())
    again = vf.to_module(adapted)
    train(again, tmp_path / "again", resume=str(tmp_path / "checkpoint-1"))
    for key, value in trained(again).items():
        assert_close(value, straight[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["4 bit", "dense"])
def test_trainer_loads_the_best(kind, base_folder, tmp_path, monkeypatch):
    module = vf.to_module(adapt(load(base_folder, kind)))
    monkeypatch.setattr(Trainer, "evaluate", lambda self, *_, **__: {"eval_loss": float(self.state.global_step)})
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = train(module, tmp_path, max_steps=3, **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert best.keys() == trained(module).keys()
    for key, value in trained(module).items():
        assert torch.equal(value, best[key])


def test_the_recipe_of_the_docstring(base_folder, tmp_path, monkeypatch):
    """It runs as it stands: interrupted, it resumes to the same bits; the best checkpoint is what is saved."""
    recipe = textwrap.dedent("    quantization" + module_file.__doc__.partition("    quantization")[2])
    quiet = {"report_to": [], "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 6)]
    names = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "BitsAndBytesConfig": BitsAndBytesConfig,
        "TrainingArguments": partial(TrainingArguments, logging_strategy="no", **quiet),
        "Trainer": Trainer,
        "get_last_checkpoint": get_last_checkpoint,
        **{"vf": vf, "os": os, "name": str(base_folder), "train": rows[:12], "held_out": rows[12:]},
    }
    runs = []
    for folder in (tmp_path / "whole", tmp_path / "resumed"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        if runs:  # as if it had been killed after its first checkpoint
            shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-2", folder / "out" / "checkpoint-2")
        exec(recipe, run := dict(names))
        assert {path.name for path in (folder / "out").iterdir()} >= {"checkpoint-4", "checkpoint-6"}
        best = vf.load_adapter(run["trainer"].state.best_model_checkpoint, run["model"])
        saved = vf.load_adapter(folder / "my-adapter", run["model"])
        assert all(torch.equal(saved.params[key], value) for key, value in best.params.items())
        runs.append((saved, vf.load_adapter(folder / "out" / "checkpoint-6", run["model"]).params))
    (saved, whole), (again, resumed) = runs
    for key in whole:
        assert_close(resumed[key], whole[key], rtol=1e-6, atol=1e-7)
        assert_close(again.params[key], saved.params[key], rtol=1e-6, atol=1e-7)
    theirs = peft.PeftModel.from_pretrained(
        load(base_folder, "4 bit").train(), tmp_path / "whole" / "my-adapter"
    ).train()
    ours = saved.apply(saved.params, saved.frozen, input_ids=tokens()).logits
    assert relative_error(theirs(input_ids=tokens()).logits, ours) < 1e-6


def test_an_adapter_is_all_that_such_a_module_loads(base_folder):
    module = vf.to_module(adapt(load(base_folder, "4 bit")))
    state = {key: torch.ones_like(value) for key, value in trained(module).items()}
    assert module.load_state_dict(state) == ([], [])
    assert all((value == 1).all() for value in trained(module).values())
    del state["model.layers.0.self_attn.q_proj.lambda_b"]
    with pytest.raises(RuntimeError, match="lambda_b"):
        module.load_state_dict(state)


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("tied", [False, True])
def test_num_parameters(kind, tied, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load(tmp_path, kind)
    adapted = adapt(model)
    module = vf.to_module(adapted)
    vectors = sum(value.numel() for value in adapted.params.values())
    for embeddings in (False, True):
        total = module.num_parameters(exclude_embeddings=embeddings)
        assert total == model.num_parameters(exclude_embeddings=embeddings) + vectors
    assert module.num_parameters(only_trainable=True) == vectors


def test_the_users_model_keeps_its_marks(base_folder):
    model = load(base_folder, "4 bit")
    noticed = {name: id(value) for name, value in vars(model).items()}
    module = vf.to_module(adapt(model))
    assert {name: id(value) for name, value in vars(model).items()} == noticed
    assert model.is_quantized
    assert not hasattr(module, "is_quantized")
    assert module.to("cpu").half() is module  # which transformers refuses for its own


# What is refused

bad = Refused()

bad("to_module", "a stack", lambda _: vf.to_module(ADAPTED._replace(params=STACK)), "is stacked, but a module has one")
bad("to_module", "no vectors", lambda _: vf.to_module(ADAPTED._replace(params={})), "lacks 4 of its 4 keys")
bad("to_module", "no projections", lambda _: vf.to_module(ADAPTED._replace(frozen={})), r"'vera_B', got \[\]")
bad(
    "to_module",
    "a list",
    lambda _: vf.to_module(ADAPTED._replace(params=PARAMS | {"0.lambda_b": [1.0] * 5})),
    "got list",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)

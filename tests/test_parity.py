"""Against PEFT itself: the same model and adapter give the same numbers, and each reads what the other wrote."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.func import grad
from torch.testing import assert_close
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import vera_func as vf

from helpers import FORMATS, MODELS, TARGETS, gpt2, llama, quantized, randomized, relative_error


R = 8
CASES = [
    *(("llama", base, dtype) for base in ("dense", *FORMATS) for dtype in (torch.float32, torch.bfloat16)),
    *(("gpt2", "dense", dtype) for dtype in (torch.float32, torch.bfloat16)),
    # The linears of BERT have biases.
    *(("bert", base, dtype) for base in ("dense", "nf4", "int8") for dtype in (torch.float32, torch.bfloat16)),
    ("llama", "dense", torch.float16),
]


def build(model, base="dense", dtype=torch.float32, compute_dtype=None):
    """The same model on every call, training without dropout: in eval, bitsandbytes rewrites a 4-bit weight."""
    module = quantized(MODELS[model](dtype), base).train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, bnb.nn.Linear4bit) and compute_dtype is not None:
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype, True
    return module


def fields(model, **more):
    return {"r": R, "target_modules": TARGETS[model], "fan_in_fan_out": model == "gpt2", **more}


def peft_model(module, config, **options):
    return peft.get_peft_model(module, peft.VeraConfig(**config), **options)


def trained(module):
    """PEFT's trainable parameters under the keys that they have here."""
    named = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace("vera_lambda_", "lambda_")
            for part in (".default", ".base_layer", ".modules_to_save"):
                key = key.replace(part, "")
            named[key] = parameter
    return named


def projections(module, adapter="default"):
    return {name: getattr(module.base_model, name)[adapter] for name in ("vera_A", "vera_B")}


def put(module, params):
    """Give PEFT's model these values."""
    theirs = trained(module)
    assert theirs.keys() == params.keys()
    with torch.no_grad():
        for key, value in params.items():
            theirs[key].copy_(value)


def tokens():
    return torch.randint(0, 67, (3, 11), generator=torch.Generator().manual_seed(0))


def logits(module):
    return module(input_ids=tokens()).logits


def loss_of(output):
    return output.float().square().sum()


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def assert_parity(actual, expected, base):
    """Bit for bit on a dense base, where both call the same operations; over bitsandbytes, whose kernels depend
    on the machine, 1e-6 of the largest in float32 and a unit in the last place in bfloat16."""
    assert actual.dtype == expected.dtype
    if base == "dense":
        assert torch.equal(actual, expected)
    elif actual.dtype == torch.bfloat16:
        assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        assert relative_error(actual, expected) <= 1e-6


@pytest.mark.parametrize(("model", "base", "dtype"), CASES)
def test_logits_and_gradients(model, base, dtype):
    theirs = peft_model(build(model, base, dtype), fields(model))
    adapted = vf.adapt(build(model, base, dtype), vf.VeraConfig(**fields(model)))
    params = randomized(adapted.params)
    put(theirs, params)

    def loss(params):
        return loss_of(adapted.apply(params, adapted.frozen, input_ids=tokens()).logits)

    output = logits(theirs)
    assert_parity(adapted.apply(params, adapted.frozen, input_ids=tokens()).logits, output.detach(), base)

    vectors = trained(theirs)
    keys = list(params)
    expected = torch.autograd.grad(loss_of(output), [vectors[key] for key in keys])

    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    loss(leaves).backward()
    module = vf.to_module(adapted._replace(params=params)).train()
    loss_of(logits(module)).backward()
    for key, value in zip(keys, expected, strict=True):
        assert_parity(leaves[key].grad, value, base)
        assert_parity(module.get_parameter(key).grad, value, base)

    # torch.func.grad runs the backward pass so that it could be differentiated again, like create_graph=True. There,
    # torch computes SiLU's derivative in several operations, each of which rounds to the activations' dtype; in a
    # plain backward, in one. So this is PEFT's gradient with create_graph, and in bfloat16 a percent off the plain one.
    gradient = grad(loss)(params)
    expected_twice = torch.autograd.grad(loss_of(logits(theirs)), [vectors[key] for key in keys], create_graph=True)
    for key, value, twice in zip(keys, expected, expected_twice, strict=True):
        assert_parity(gradient[key], twice.detach(), base)
        assert relative_error(gradient[key], value) <= (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_func_grad_is_the_plain_gradient_without_silu(base):
    def model():
        return quantized(llama(torch.bfloat16, hidden_act="gelu_pytorch_tanh"), base).train()

    theirs = peft_model(model(), fields("llama"))
    apply, params, frozen, _ = vf.adapt(model(), vf.VeraConfig(**fields("llama")))
    params = randomized(params)
    put(theirs, params)
    loss_of(logits(theirs)).backward()
    gradient = grad(lambda p: loss_of(apply(p, frozen, input_ids=tokens()).logits))(params)
    for key, parameter in trained(theirs).items():
        assert_parity(gradient[key], parameter.grad, base)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_autocast(base):
    theirs = peft_model(build("llama", base), fields("llama"))
    apply, params, frozen, _ = vf.adapt(build("llama", base), vf.VeraConfig(**fields("llama")))
    params = randomized(params)
    put(theirs, params)
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = logits(theirs)
        actual = apply(leaves, frozen, input_ids=tokens()).logits
    assert_parity(actual, output, base)
    assert not torch.equal(actual, apply(params, frozen, input_ids=tokens()).logits)  # it did something
    loss_of(output).backward()
    loss_of(actual).backward()
    for key, parameter in trained(theirs).items():
        # Backward runs outside of autocast. What it multiplies by anew (here the update, in bitsandbytes an 8-bit
        # weight) is in float32 then, and in bfloat16 where the other saved it.
        assert relative_error(leaves[key].grad, parameter.grad) <= 2e-2


@pytest.mark.parametrize(("base", "compute_dtype"), [("dense", None), ("nf4", torch.bfloat16)])
def test_vectors_in_bfloat16(base, compute_dtype):
    def model():
        return build("llama", base, torch.bfloat16, compute_dtype)

    theirs = peft_model(model(), fields("llama"), autocast_adapter_dtype=False)
    apply, params, frozen, _ = vf.adapt(model(), vf.VeraConfig(**fields("llama")), dtype=torch.bfloat16)
    assert_same_bits(params, trained(theirs))
    assert_same_bits(frozen, projections(theirs))
    params = randomized(params)
    put(theirs, params)
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    output, actual = logits(theirs), apply(leaves, frozen, input_ids=tokens()).logits
    assert_parity(actual, output, base)
    loss_of(output).backward()
    loss_of(actual).backward()
    for key, parameter in trained(theirs).items():
        assert_parity(leaves[key].grad, parameter.grad, base)


INITIAL = {
    "float32": ("llama", "dense", torch.float32, None),
    "bfloat16": ("llama", "dense", torch.bfloat16, None),
    "float16": ("llama", "dense", torch.float16, None),
    "Conv1D in bfloat16": ("gpt2", "dense", torch.bfloat16, None),
    "nf4": ("llama", "nf4", torch.bfloat16, None),
    "nf4 computing in bfloat16": ("llama", "nf4", torch.float32, torch.bfloat16),
    "int8": ("llama", "int8", torch.bfloat16, None),
}


@pytest.mark.parametrize("case", INITIAL)
def test_starts_with_the_same_bits(case):
    # 0.3 and the draws are no numbers in 16 bits, so that a missing or a needless rounding shows.
    config = fields(INITIAL[case][0], d_initial=0.3, projection_prng_key=5)
    theirs = peft_model(build(*INITIAL[case]), config)
    _, params, frozen, _ = vf.adapt(build(*INITIAL[case]), vf.VeraConfig(**config))
    assert_same_bits(params, trained(theirs))
    assert_same_bits(frozen, projections(theirs))


def test_starts_with_the_same_bits_over_layers_of_several_dtypes():
    def model():
        module = llama()
        module.model.layers[1].to(torch.bfloat16)
        return module

    theirs = peft_model(model(), fields("llama"))
    _, params, frozen, _ = vf.adapt(model(), vf.VeraConfig(**fields("llama")))
    assert_same_bits(params, trained(theirs))
    assert_same_bits(frozen, projections(theirs))
    first, second = (params[f"model.layers.{i}.self_attn.q_proj.lambda_d"] for i in range(2))
    assert not torch.equal(first, second)


def peft_draw(r, in_features, out_features, key):
    """PEFT's pair for a model whose widest input and output belong to different layers."""
    model = nn.ModuleDict({"wide_in": nn.Linear(in_features, 1), "wide_out": nn.Linear(1, out_features)})
    config = peft.VeraConfig(r=r, target_modules=["wide_in", "wide_out"], projection_prng_key=key)
    return projections(peft.get_peft_model(model, config))


def test_draws_the_projections_of_a_llama():
    assert_same_bits(vf.init_projections(256, 4096, 11008, key=0), peft_draw(256, 4096, 11008, key=0))


@pytest.mark.parametrize("key", [0, 1, 0xFF, -1, -(2**62), 2**32, 2**32 + 1, 2**63 - 1])
def test_draws_the_projections_of_any_key(key):
    assert_same_bits(vf.init_projections(5, 37, 13, key), peft_draw(5, 37, 13, key))


# What a checkpoint may hold: (model, base, its dtype, further fields of the configuration, load and save options).
CHECKPOINTS = {
    "plain": ("llama", "dense", torch.float32, {}),
    "bfloat16": ("llama", "dense", torch.bfloat16, {}),
    "Conv1D": ("gpt2", "dense", torch.float32, {}),
    "drawn": ("llama", "dense", torch.float32, {"save_projection": False, "projection_prng_key": 7}),
    "drawn, bfloat16": ("llama", "dense", torch.bfloat16, {"save_projection": False, "projection_prng_key": -7}),
    "drawn, nf4": ("llama", "nf4", torch.bfloat16, {"save_projection": False}),
    "biases of the adapted": ("gpt2", "dense", torch.float32, {"bias": "vera_only"}),
    "all biases": ("gpt2", "dense", torch.float32, {"bias": "all"}),
    "biases of nf4": ("bert", "nf4", torch.float32, {"bias": "vera_only"}),
    "a head": ("bert", "dense", torch.float32, {"task_type": "SEQ_CLS"}),
    "a head, bfloat16": ("bert", "dense", torch.bfloat16, {"task_type": "SEQ_CLS"}),
    "a head, nf4": ("bert", "nf4", torch.float32, {"task_type": "SEQ_CLS"}),
    "a tied head": ("gpt2", "dense", torch.float32, {"modules_to_save": ["lm_head"]}),
    "tied embeddings": ("gpt2", "dense", torch.float32, {"modules_to_save": ["wte"]}),
    "a module": ("llama", "dense", torch.float32, {"modules_to_save": ["lm_head"]}),
    "nf4": ("llama", "nf4", torch.float32, {}),
    "nested": ("llama", "nested", torch.bfloat16, {}),
    "int8": ("llama", "int8", torch.float32, {}),
    "a regular expression": ("llama", "dense", torch.float32, {"target_modules": r".*\.1\..*(q_proj|down_proj)"}),
    "some layers": ("llama", "dense", torch.float32, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "all linear": ("llama", "dense", torch.float32, {"target_modules": "all-linear"}),
}

# PEFT trains a copy of a tied weight, and says that the two are no longer equal.
TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request):
    model, base, dtype, more = CHECKPOINTS[request.param]
    return (lambda: build(model, base, dtype)), fields(model, **more), base


def train_a_step(module):
    """Every trained value becomes another one, by a step that PEFT itself takes."""
    put(module, randomized({key: p.detach() for key, p in trained(module).items()}, seed=2))
    optimizer = torch.optim.SGD(trained(module).values(), lr=1e-3)
    loss_of(logits(module)).backward()
    optimizer.step()


@TIED
def test_reads_what_peft_wrote(checkpoint, tmp_path):
    model, config, base = checkpoint
    theirs = peft_model(model(), config)
    if config.get("save_projection", True):
        # Not what the key would draw: the file's are to be read.
        for pair in (theirs.base_model.vera_A, theirs.base_model.vera_B):
            pair["default"].mul_(1.5)
    train_a_step(theirs)
    theirs.save_pretrained(tmp_path)

    apply, params, frozen, loaded = vf.load_adapter(tmp_path, model())
    assert_same_bits(params, trained(theirs))
    assert_same_bits(frozen, projections(theirs))
    assert_parity(apply(params, frozen, input_ids=tokens()).logits, logits(theirs).detach(), base)
    for name in ("r", "projection_prng_key", "save_projection", "bias", "task_type", "fan_in_fan_out"):
        assert getattr(loaded, name) == getattr(theirs.peft_config["default"], name), name


@TIED
def test_peft_reads_what_was_written_here(checkpoint, tmp_path):
    model, config, base = checkpoint
    apply, params, frozen, config = vf.adapt(model(), vf.VeraConfig(**config))
    params = randomized(params)
    if config.save_projection:
        frozen = randomized(frozen, seed=2)
    vf.save_adapter(tmp_path, params, frozen, config)

    theirs = peft.PeftModel.from_pretrained(model(), tmp_path, is_trainable=True).train()
    assert_same_bits(trained(theirs), params)
    assert_same_bits(projections(theirs), frozen)
    assert_parity(apply(params, frozen, input_ids=tokens()).logits, logits(theirs).detach(), base)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_reads_vectors_that_peft_wrote_in_bfloat16(dtype, tmp_path):
    theirs = peft_model(build("llama", dtype=torch.bfloat16), fields("llama"), autocast_adapter_dtype=False)
    train_a_step(theirs)
    theirs.save_pretrained(tmp_path)
    autocast = dtype is not None
    again = peft.PeftModel.from_pretrained(
        build("llama", dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast, is_trainable=True
    )
    apply, params, frozen, _ = vf.load_adapter(tmp_path, build("llama", dtype=torch.bfloat16), dtype=dtype)
    assert_same_bits(params, trained(again))
    assert_same_bits(frozen, projections(again))
    assert {value.dtype for value in (*params.values(), *frozen.values())} == {dtype or torch.bfloat16}
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, logits(again))


def test_peft_reads_vectors_that_were_written_here_in_bfloat16(tmp_path):
    base = build("llama", dtype=torch.bfloat16)
    apply, params, frozen, config = vf.adapt(base, vf.VeraConfig(**fields("llama")), dtype=torch.bfloat16)
    params = randomized(params)
    vf.save_adapter(tmp_path, params, frozen, config)
    theirs = peft.PeftModel.from_pretrained(
        build("llama", dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=False, is_trainable=True
    )
    assert_same_bits(trained(theirs), params)
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, logits(theirs))


def test_reads_several_adapters_that_peft_wrote(tmp_path):
    theirs = peft_model(build("llama"), fields("llama"))
    theirs.add_adapter("other", peft.VeraConfig(**fields("llama")))
    outputs = {}
    for seed, name in enumerate(["default", "other"]):
        theirs.set_adapter(name)
        vectors = [p for _, p in theirs.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for vector, value in zip(vectors, randomized(dict(enumerate(vectors)), seed).values(), strict=True):
                vector.copy_(value)
            outputs[name] = logits(theirs)
    theirs.save_pretrained(tmp_path)
    assert not torch.equal(*outputs.values())
    base = build("llama")
    for name, expected in outputs.items():
        apply, params, frozen, _ = vf.load_adapter(tmp_path, base, adapter_name=name)
        assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, expected)


def test_peft_reads_several_adapters_that_were_written_here(tmp_path):
    apply, params, frozen, config = vf.adapt(build("llama"), vf.VeraConfig(**fields("llama")))
    adapters = {name: randomized(params, seed) for seed, name in enumerate(["default", "other"])}
    for name, adapter in adapters.items():
        vf.save_adapter(tmp_path, adapter, frozen, config, adapter_name=name)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    theirs.load_adapter(tmp_path / "other", "other")
    for name, adapter in adapters.items():
        theirs.set_adapter(name)
        assert torch.equal(apply(adapter, frozen, input_ids=tokens()).logits, logits(theirs))


def test_biases_and_a_head_at_once(tmp_path):
    # With bias="all", PEFT writes the bias of a head three times, under different names.
    config = fields("bert", bias="all", task_type="SEQ_CLS")
    theirs = peft_model(build("bert"), config)
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(theirs.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(randomized({"": parameter}, seed)[""])
    theirs.save_pretrained(tmp_path / "theirs")
    apply, params, frozen, config = vf.load_adapter(tmp_path / "theirs", build("bert"))
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, logits(theirs))
    assert "classifier.bias" in params
    assert "bert.embeddings.LayerNorm.bias" in params

    params = randomized(params, seed=3)
    vf.save_adapter(tmp_path / "ours", params, frozen, config)
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "ours").train()
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, logits(theirs))


def test_a_head_that_peft_trains_by_accident(tmp_path):
    # "classifier" is an ending of "pre_classifier" to PEFT, which trains and writes both.
    def model():
        torch.manual_seed(0)
        sizes = {"vocab_size": 67, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4}
        return DistilBertForSequenceClassification(DistilBertConfig(**sizes, dropout=0.0, seq_classif_dropout=0.0))

    config = {"r": R, "target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}
    theirs = peft_model(model().eval(), config)
    train_a_step(theirs)
    theirs.save_pretrained(tmp_path)
    apply, params, frozen, _ = vf.load_adapter(tmp_path, model().eval())
    assert_same_bits(params, {key: trained(theirs)[key] for key in params})
    assert "pre_classifier.weight" in params
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, logits(theirs))


def test_the_adapter_is_seen():
    """Equal logits above say something: these adapters move them, and without one PEFT's are the base's."""
    theirs = peft_model(build("gpt2"), fields("gpt2"))
    train_a_step(theirs)
    with theirs.disable_adapter():
        base = logits(theirs)
    assert relative_error(logits(theirs), base) > 0.01
    assert torch.equal(base, logits(gpt2()))

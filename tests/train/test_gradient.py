"""A step's gradient is right, or an error: never zeros for what the loss depends on."""

import functools

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vera_func as vf
from vera_func.train.gradient import gradient_of

from helpers import bert, llama, normal, quantized, randomized, tokens


fit = functools.partial(vf.fit, steps=2, learning_rate=1e-2, progress=False)
# transformers 5 renames them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


def adapt(model, *targets, scale=0.5, **fields):
    adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=list(targets), **fields))
    return adapted._replace(params=randomized(adapted.params, scale=scale))


class Layers(nn.Module):
    """Three layers, of which the middle one runs as `run(layer, x)` says."""

    def __init__(self, run):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(7, 7) for _ in range(3))
        self.run = run

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.run(self.middle, x))


@torch.no_grad()
def without_gradients(layer, x):
    return layer(x)


def half_without(layer, x):
    with torch.no_grad():
        layer(x)
    return layer(x)


RUNS = {
    "as usual": (lambda layer, x: layer(x), None),
    "not at all": (lambda layer, x: x, None),
    "for nothing": (lambda layer, x: x + 0 * layer(x).detach(), None),
    "once more without gradients": (half_without, None),
    "without gradients": (without_gradients, "depend on 'middle.lambda_b', but this leaf gets no gradient"),
    "detached": (lambda layer, x: layer(x).detach(), "depend on 'middle.lambda_b', but this leaf gets no gradient"),
    "checkpointed": (lambda layer, x: checkpoint(layer, x, use_reentrant=False), "runs again in backward"),
    "checkpointed by reentering": (lambda layer, x: checkpoint(layer, x, use_reentrant=True), "use_reentrant"),
}
ADVICE = r"gradient_checkpointing_disable\(\).*to_module"


def loss_of(adapted, x):
    return lambda params, _: adapted.apply(params, adapted.frozen, x).square().mean()


@pytest.mark.parametrize("run", RUNS)
def test_no_layer_trains_nothing(run):
    how, message = RUNS[run]
    adapted, x = adapt(Layers(how), "first", "middle", "last"), normal(5, 7)
    loss = loss_of(adapted, x)
    if message is not None:
        with pytest.raises(ValueError, match=f"(?s){message}.*{ADVICE}"):
            fit(loss, adapted.params, int)
        return
    gradients, value = gradient_of(loss, adapted.params, (), True, None)
    module = vf.to_module(adapted)
    right = module(x).square().mean()
    right.backward()
    assert torch.equal(value, right.detach())
    for key, found in gradients.items():
        grad = module.get_parameter(key).grad
        assert_close(found, torch.zeros_like(found) if grad is None else grad)
    after = fit(loss, adapted.params, int).params
    moved = {key for key in after if not torch.equal(after[key], adapted.params[key])}
    assert moved == {key for key in after if run in ("as usual", "once more without gradients") or "middle" not in key}


def test_stacked_adapters_are_looked_into():
    adapted, x = adapt(Layers(without_gradients), "first", "middle"), normal(2, 5, 7)
    stacked = vf.stack_adapters([adapted.params, randomized(adapted.params, 5)])
    call = vf.vmap_adapters(adapted.apply)
    with pytest.raises(ValueError, match=r"depend on 'middle\.lambda_b'"):
        fit(lambda params, _: call(params, adapted.frozen, x).square().mean((1, 2)), stacked, int, num_adapters=2)


def test_which_of_many_is_named():
    params = {f"{i}.lambda_b": torch.ones(3) for i in range(9)}
    loss = lambda p, batch: p["0.lambda_b"].sum() + p["6.lambda_b"].detach().square().sum()
    with pytest.raises(ValueError, match=r"depend on '6\.lambda_b'"):
        fit(loss, params, int)
    run = fit(lambda p, batch: p["0.lambda_b"].sum(), params, int)
    assert torch.equal(run.params["6.lambda_b"], params["6.lambda_b"])


def test_a_random_loss_is_evaluated_with_the_same_numbers():
    params = {"a.p": torch.ones(3), "b.p": torch.ones(3)}
    seen = []

    def loss(p, batch):
        seen.append(torch.rand(3))
        return (p["a.p"] * seen[-1]).sum()

    torch.manual_seed(0)
    fit(loss, params, int)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    torch.manual_seed(0)
    assert torch.equal(torch.stack([torch.rand(3) for _ in range(2)]), torch.stack([seen[0], seen[3]]))

    own = torch.Generator().manual_seed(0)
    fit(lambda p, batch: (p["a.p"] * torch.rand(3, generator=own)).sum(), params, int)  # tells nothing, and is no error


def test_a_pooler_beside_mean_pooling():
    model = bert().bert.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    adapted = adapt(model, "query", "pooler.dense")
    loss = lambda p, ids: adapted.apply(p, adapted.frozen, input_ids=ids).last_hidden_state.mean(1).square().mean()
    run = fit(loss, adapted.params, lambda step: tokens())
    for key, value in run.params.items():
        assert torch.equal(value, adapted.params[key]) == key.startswith("pooler")


WAYS = {
    "prepare_model_for_kbit_training": peft.prepare_model_for_kbit_training,
    "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "reentrant, with inputs that require grad": lambda model: [
        model.gradient_checkpointing_enable({"use_reentrant": True}),
        model.enable_input_require_grads(),
    ],
    "not reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
}


@pytest.mark.parametrize("base", ["dense", "nested"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_of_transformers_is_refused_with_the_way_out(way, base):
    model = quantized(llama(), base).train()
    model.is_loaded_in_4bit = base == "nested"  # as `from_pretrained` marks it
    WAYS[way](model)
    if not model.is_gradient_checkpointing:  # PEFT turns it on for quantized models alone
        model.gradient_checkpointing_enable()
    ids = tokens()
    adapted = adapt(model, "q_proj", "v_proj", scale=0.1)
    loss = lambda p, _=None: adapted.apply(p, adapted.frozen, input_ids=ids).logits.square().mean()
    stacked = vf.stack_adapters([adapted.params] * 2)
    for call in (
        lambda: fit(loss, adapted.params, int),
        lambda: torch.func.grad(loss)(adapted.params),
        lambda: torch.func.vmap(torch.func.grad(loss))(stacked),
        lambda: torch.func.grad(lambda p: torch.func.vmap(loss)(p).sum())(stacked),
    ):
        with pytest.raises(ValueError, match=f"(?s)checkpoint.*{ADVICE}"):
            call()
    loss(adapted.params)  # what asks for no gradient is served
    with torch.no_grad():
        loss({key: value.clone().requires_grad_() for key, value in adapted.params.items()})
    # The module may go on with it; and both ways out lead to the same gradient.
    module = vf.to_module(adapted)
    module.enable_input_require_grads()
    module(input_ids=ids, use_cache=False).logits.square().mean().backward()
    model.gradient_checkpointing_disable()
    again = vf.adapt(model, adapted.config)
    plain = lambda p, _: again.apply(p, again.frozen, input_ids=ids).logits.square().mean()
    gradients, _ = gradient_of(plain, adapted.params, (), True, None)
    for key, value in gradients.items():
        assert value.abs().max() > 0
        assert_close(value, module.get_parameter(key).grad, rtol=1e-4, atol=1e-7)
    for key, value in torch.func.grad(plain)(adapted.params, None).items():
        assert_close(value, gradients[key], rtol=1e-4, atol=1e-7)


def test_inputs_that_were_made_to_require_grad_disturb_no_transform():
    # transformers does that with checkpointing, and does not undo it with checkpointing.
    model = llama().train()
    expected = adapt(model, "q_proj")
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    adapted = adapt(model, "q_proj")
    loss = lambda p, a: a.apply(p, a.frozen, input_ids=tokens()).logits.square().mean()
    found, right = (torch.func.grad(loss)(a.params, a) for a in (adapted, expected))
    assert_close(found, right, rtol=0, atol=0)
    vf.to_module(adapted)(input_ids=tokens()).logits.sum().backward()
    assert vf.to_module(adapted).get_input_embeddings()(tokens()).requires_grad  # old checkpointing needs it


class Requires(Layers):
    def forward(self, x):
        return super().forward((x * 1).requires_grad_())


def test_what_transforms_refuse_is_explained():
    adapted, x = adapt(Requires(lambda layer, x: layer(x)), "first"), normal(5, 7)
    loss = loss_of(adapted, x)
    with pytest.raises(ValueError, match=f"(?s)torch.func's transforms do not support.*{ADVICE}"):
        torch.func.grad(loss)(adapted.params, None)
    gradient_of(loss, adapted.params, (), True, None)
    adapted = adapt(Layers(RUNS["checkpointed"][0]), "first")
    with pytest.raises(ValueError, match=f"(?s)torch.func's transforms do not support.*{ADVICE}"):
        torch.func.grad(loss_of(adapted, x))(adapted.params, None)


def test_a_layer_that_runs_again_never_sees_another_call():
    """The tree has been given to another call when backward comes, in whose middle it runs."""
    calls = []

    def run(layer, x):
        if calls:
            calls.pop()()
        return checkpoint(layer, x, use_reentrant=False)

    adapted, x = adapt(Layers(run), "first", "middle", "last"), normal(5, 7)
    leaves = {key: value.clone().requires_grad_() for key, value in adapted.params.items()}
    loss = adapted.apply(leaves, adapted.frozen, x).sum()
    failures = []

    def backward():
        with pytest.raises(ValueError, match="runs again in backward"):
            loss.backward()
        failures.append(True)

    calls.append(backward)
    adapted.apply(randomized(adapted.params, 5), adapted.frozen, x)
    assert failures == [True]


def test_a_call_may_be_checkpointed_as_a_whole():
    adapted, x = adapt(Layers(lambda layer, x: layer(x)), "first", "middle", "last"), normal(5, 7)
    loss = lambda p, _: checkpoint(adapted.apply, p, adapted.frozen, x, use_reentrant=False).square().mean()
    found = gradient_of(loss, adapted.params, (), True, None)
    right = gradient_of(loss_of(adapted, x), adapted.params, (), True, None)
    assert_close(found, right, rtol=0, atol=0)

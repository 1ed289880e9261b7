"""Equal arguments give equal bits, whatever was called before, meanwhile or inside, and no call leaves a trace.

The oracle is a copy of the model that nothing ran before: its first call knows no history.
"""

import copy
import functools
import gc
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from transformers import LogitsProcessor

import vera_func as vf
from vera_func.model.checkout import SMALL

from helpers import llama, normal, quantized, randomized, tokens


R = 4


def adapt(model, targets=("layer",), **fields):
    adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=list(targets), **fields))
    return adapted._replace(params=randomized(adapted.params, scale=0.5))


def state_of(model):
    """Every tensor and every other attribute of every module, as bytes and texts."""
    tensors = {
        f"{name} {key}": value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value)
        for name, module in model.named_modules()
        for key, value in (vars(module) | module._buffers | module._parameters).items()
        if not isinstance(value, dict) and value is not None
    }
    return tensors | {name: repr(vars(module).keys()) for name, module in model.named_modules()}


class Writer(nn.Module):
    """A model that writes to itself, by `write`, whose result depends on what was written before."""

    def __init__(self, write):
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.write = write
        self.inner = nn.Identity()
        self.register_buffer("buffer", torch.zeros(3))
        self.register_buffer("large", torch.zeros(SMALL))
        self.tensor, self.number, self.list, self.dict = torch.zeros(()), 0, [], {"nested": {"n": 0}}
        self.set, self.deque, self.bytes, self.object = set(), deque(), bytearray(), SimpleNamespace(n=0, list=[])
        self.pair, self.none = ([], 1), None
        self.tensors = [torch.zeros(3)], (torch.zeros(3), {torch.zeros(3)})
        self.bound = functools.partial(getattr, self.object)

    def forward(self, x):
        return self.layer(x) + float(self.write(self))


def counted(name):
    """A write to an attribute that is a number."""

    def write(m):
        setattr(m, name, (getattr(m, name, None) or 0) + 1)
        return getattr(m, name)

    return write


def hooked(m):
    m.inner.register_forward_hook(lambda module, args, output: output + 1)
    return m.inner(torch.zeros(()))


def replaced(m):
    m.register_buffer("buffer", m.buffer + 1)
    return m.buffer[0]


def grown(m):
    m.add_module(f"more{len(m._modules)}", nn.Identity())
    return len(m._modules)


def written(m, name, through):
    through(getattr(m, name)).__iadd__(1)
    return getattr(m, name).sum()


def appended(container, add="append"):
    def write(m):
        value = container(m)
        getattr(value, add)(len(value))
        return len(value)

    return write


def cached(m):
    m.dict["nested"]["n"] += 1
    return m.dict["nested"]["n"]


WRITES = {
    "a number": counted("number"),
    "a new attribute": counted("other"),
    "None": counted("none"),
    "a child's attribute": lambda m: counted("number")(m.inner),
    "a scalar tensor": lambda m: setattr(m, "tensor", m.tensor + 1) or m.tensor,
    "a list": appended(lambda m: m.list),
    "a list in an object": appended(lambda m: m.object.list),
    "a list in a tuple": appended(lambda m: m.pair[0]),
    "a set": appended(lambda m: m.set, "add"),
    "a deque": appended(lambda m: m.deque),
    "bytes": appended(lambda m: m.bytes),
    "a dict in a dict": cached,
    "an object": lambda m: counted("n")(m.object),
    "a hook": hooked,
    "a submodule": grown,
    "a new buffer": replaced,
    "in place": lambda m: written(m, "buffer", lambda t: t),
    "through .data": lambda m: written(m, "buffer", lambda t: t.data),
    "through numpy": lambda m: written(m, "buffer", lambda t: t.numpy()),
    "a large one in place": lambda m: written(m, "large", lambda t: t),
    "a tensor in a list": lambda m: m.tensors[0][0].data.add_(1).sum(),
    "a tensor in a tuple": lambda m: m.tensors[1][0].add_(1).sum(),
    "a tensor in a set": lambda m: next(iter(m.tensors[1][1])).add_(1).sum(),
    "a tensor that is no buffer": lambda m: written(m, "tensor", lambda t: t.data),
}


class TestAModelThatWritesToItself:
    @pytest.mark.parametrize("write", WRITES)
    def test_every_call_is_the_first(self, write):
        model = Writer(WRITES[write]).eval()
        adapted, x, before = adapt(model), normal(3, 7), state_of(model)
        first, module = adapted.apply(*adapted[1:3], x), vf.to_module(adapted)
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(adapted.apply, *adapted[1:3], x).result(), first)
        # A module keeps what it writes, as the model would, but only for itself.
        seen = [module(x), module(x)]
        assert torch.equal(seen[0], first)
        assert not torch.equal(seen[1], first)
        assert torch.equal(vf.to_module(adapted)(x), first)
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)
        assert state_of(model) == before

    def test_a_large_buffer_in_training_mode(self):
        model = Writer(lambda m: written(m, "large", lambda t: t.data)).train()
        adapted, x = adapt(model), normal(3, 7)
        first = adapted.apply(*adapted[1:3], x)
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)

    def test_two_names_of_one_buffer_stay_one(self):
        model = Writer(lambda m: m.alias.add_(1) is m.alias and m.buffer.sum())
        model.alias = model.buffer
        adapted, x = adapt(model), normal(3, 7)
        first = adapted.apply(*adapted[1:3], x)
        assert_close(first, vf.to_module(adapted)(x))
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)

    def test_what_failed_leaves_no_trace(self):
        def write(m):
            counted("number")(m)
            m.buffer += 1
            m.list.append(1)
            if m.fails:
                raise KeyError("on purpose")
            return m.number + m.buffer.sum() + len(m.list)

        model = Writer(write)
        model.fails = False
        adapted, x = adapt(model), normal(3, 7)
        first = adapted.apply(*adapted[1:3], x)
        failing = copy.deepcopy(model)
        failing.fails = True
        broken = adapt(failing)
        for _ in range(2):
            with pytest.raises(KeyError):
                broken.apply(*broken[1:3], x)
        assert broken.apply.trees.free[0].root.model.number == 0
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)

    def test_nothing_that_was_given_is_kept(self):
        def stash(m):
            m.last = m.layer.lambda_b
            m.list.append(m.layer.projections.vera_A)
            return 0

        adapted = adapt(Writer(stash))
        params, frozen = (
            {k: v.clone() for k, v in adapted.params.items()},
            {k: v * 1 for k, v in adapted.frozen.items()},
        )
        references = [weakref.ref(value) for value in (*params.values(), *frozen.values())]
        adapted.apply(params, frozen, normal(3, 7))
        del params, frozen
        gc.collect()
        assert not any(reference() is not None for reference in references)

    def test_random_numbers_are_the_callers(self):
        # A generator is asked for other numbers each time; that is no trace of a call.
        model = Writer(lambda m: torch.rand(()))
        adapted, x = adapt(model), normal(3, 7)
        torch.manual_seed(0)
        first, second = (adapted.apply(*adapted[1:3], x) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(5)
        self.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.norm(self.layer(x)) + self.norm.running_mean + self.norm.num_batches_tracked


class TestBatchNorm:
    def test_calls_are_the_first(self):
        model = Normalized().train()
        adapted, x, before = adapt(model), normal(6, 7), state_of(model)
        call = lambda x: adapted.apply(*adapted[1:3], x)
        first = call(x)
        call(10 * x + 3)
        assert torch.equal(call(x), first)
        module = vf.to_module(adapted)
        assert torch.equal(module(x), first)
        for _ in range(5):
            module(10 * x + 3)
        assert torch.equal(call(x), first)
        assert torch.equal(vf.to_module(adapted)(x), first)
        assert not torch.equal(module(x), first)
        assert state_of(model) == before

    def test_gradients(self):
        # torch.func.grad refuses to write to a buffer of outside; to a call's own it may.
        model = Normalized().train()
        adapted, x = adapt(model), normal(6, 7)
        loss = lambda params: adapted.apply(params, adapted.frozen, x).square().sum()
        gradients = grad(loss)(adapted.params)
        module = vf.to_module(adapted)
        module(x).square().sum().backward()
        for key, value in gradients.items():
            assert_close(value, module.get_parameter(key).grad)
        assert torch.equal(loss(adapted.params), loss(adapted.params))

    def test_compiled_calls_are_the_first(self):
        model = Normalized().train()
        adapted, x = adapt(model), normal(6, 7)
        first = adapted.apply(*adapted[1:3], x)
        call = torch.compile(lambda x: adapted.apply(*adapted[1:3], x), fullgraph=True, backend="aot_eager")
        for _ in range(2):
            call(10 * x + 3)
            assert_close(call(x), first)
        assert torch.equal(adapted.apply(*adapted[1:3], x), first)
        assert torch.equal(vf.to_module(adapted)(x), first)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dynamic_rope_does_not_remember_a_longer_text(base):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = quantized(llama(max_position_embeddings=16, rope_parameters=rope), base).train()
    fresh = lambda ids: copy.deepcopy(model)(input_ids=ids).logits
    adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj"]))
    call = lambda ids: adapted.apply(*adapted[1:3], input_ids=ids).logits
    texts = [tokens(1, length) for length in (8, 40, 12, 24, 16)]
    expected = [fresh(ids) for ids in texts]
    longest = copy.deepcopy(model)
    longest(input_ids=texts[1])
    if torch.equal(longest(input_ids=texts[3]).logits, expected[3]):
        pytest.skip("models of this release of transformers do not remember")
    for ids, right in zip(texts, expected, strict=True):
        assert_close(call(ids), right, rtol=1e-5, atol=1e-5)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(call, texts[3]).result(), call(texts[3]))
    module = vf.to_module(adapted)
    module(input_ids=texts[1])
    assert torch.equal(call(texts[3]), vf.to_module(adapted)(input_ids=texts[3]).logits)


class Within(nn.Module):
    """Calls `self.inside`, in the middle of its forward, if there is something to call."""

    inside = None

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 7)

    def forward(self, x):
        x = self.norm(self.layer(x))
        if Within.inside is not None:
            call, Within.inside = Within.inside, None
            call()
        return self.last(self.norm(x))


class TestCallsInsideCalls:
    """What the outer call was given is not seen by the inner, nor the other way round."""

    def adapted(self):
        torch.manual_seed(0)
        return adapt(Within().train(), ["layer", "last"], vera_dropout=0.5)

    def nested(self, outer, inner):
        found = {}
        Within.inside = lambda: found.update(inner=inner())
        found["outer"] = outer()
        return found["outer"], found["inner"]

    @pytest.mark.parametrize("outer", ["plain", "override", "dropout", "rows", "grad"])
    @pytest.mark.parametrize("inner", ["plain", "override", "dropout", "rows", "grad"])
    def test_both_are_what_they_are_alone(self, outer, inner):
        adapted, x = self.adapted(), normal(3, 7)
        other = randomized(adapted.params, 7)
        rows = vf.select_adapters(vf.stack_adapters([adapted.params, other]), [1, 0, 1])
        seeded = lambda: adapted.apply.with_dropout(torch.Generator().manual_seed(3))
        calls = {
            "plain": lambda: adapted.apply(adapted.params, adapted.frozen, x),
            "override": lambda: adapted.apply(
                other | {"norm.weight": 2 * torch.ones(7), "last.weight": normal(7, 7)}, adapted.frozen, x
            ),
            "dropout": lambda: seeded()(adapted.params, adapted.frozen, x),
            "rows": lambda: adapted.apply(rows, adapted.frozen, x),
            "grad": lambda: grad(lambda p: adapted.apply(p, adapted.frozen, x).square().sum())(other)["last.lambda_d"],
        }
        alone = calls[outer](), calls[inner]()
        assert all(map(torch.equal, self.nested(calls[outer], calls[inner]), alone))

    @pytest.mark.parametrize("inner", ["plain", "override", "sum"])
    def test_compiled(self, inner):
        inside = []

        class Calls(Within):
            def forward(self, x, nest=False):
                y = super().forward(x)
                return y + (self.norm.weight * inside[-1]()).sum() if nest else y

        torch.manual_seed(0)
        adapted, x = adapt(Calls(), ["layer", "last"]), normal(3, 7)
        other = randomized(adapted.params, 7)
        summed = vf.select_adapters(vf.stack_adapters([adapted.params, other]), [[0, 1]] * 3)
        within = {"plain": other, "override": other | {"last.weight": normal(7, 7)}, "sum": summed}[inner]
        inside.append(lambda: adapted.apply(within, adapted.frozen, x))
        for params in (adapted.params | {"norm.weight": 2 * torch.ones(7)}, summed):
            call = lambda params: adapted.apply(params, adapted.frozen, x, nest=True)
            assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(params), call(params))

    def test_a_copy_for_each_depth_and_no_more(self):
        adapted, x = self.adapted(), normal(3, 7)
        call = lambda: adapted.apply(*adapted[1:3], x)
        for _ in range(3):
            call()
        assert len(adapted.apply.trees.free) == 1
        for _ in range(3):
            self.nested(call, call)
        assert len(adapted.apply.trees.free) == 2

    def test_a_copy_that_was_made_in_a_transform_serves_outside(self):
        adapted, x = self.adapted(), normal(3, 7)
        alone = adapted.apply(*adapted[1:3], x)
        other = self.adapted()
        call = lambda params: other.apply(params, other.frozen, x)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            call(other.params)
        vmap(lambda p: grad(lambda p: call(p).sum())(p)["last.lambda_d"])(vf.stack_adapters([other.params] * 2))
        leaves = {key: value.clone().requires_grad_() for key, value in other.params.items()}
        output = call(leaves)
        assert torch.equal(output, alone)
        output.sum().backward()
        assert all(leaf.grad is not None for leaf in leaves.values())

    @pytest.mark.parametrize("base", ["dense", "nested"])
    def test_a_logits_processor_asks_for_other_logits(self, base):
        model = quantized(llama(), base).train()
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj", "v_proj"]))
        adapted = adapted._replace(params=randomized(adapted.params, scale=0.3))
        ask = lambda ids: adapted.apply(adapted.params, adapted.frozen, input_ids=ids).logits[:, -1]
        seen = []

        class Asks(LogitsProcessor):
            def __call__(self, input_ids, scores):
                seen.append((input_ids, ask(input_ids)))
                return scores

        changed = adapted.params | {"model.norm.weight": 2 * model.model.norm.weight.detach()}
        options = {"max_new_tokens": 3, "do_sample": False}
        with torch.no_grad():
            alone = adapted.apply.generate(changed, adapted.frozen, tokens(), **options)
            output = adapted.apply.generate(changed, adapted.frozen, tokens(), logits_processor=[Asks()], **options)
            assert torch.equal(output, alone)
            assert len(seen) == 3
            for ids, logits in seen:
                assert torch.equal(logits, ask(ids))


class Methods(nn.Module):
    """Methods that return more than data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def steps(self, x):
        for _ in range(3):
            x = self.layer(x)
            yield x

    def part(self):
        return self.layer


class TestResultsThatHoldTheTree:
    def test_a_generator_goes_on_with_its_own_adapter(self):
        adapted, x = adapt(Methods()), normal(3, 7)
        other = randomized(adapted.params, 5)
        method = lambda params: adapted.apply.method("steps", params, adapted.frozen, x)
        alone = [list(method(params)) for params in (adapted.params, other)]
        together = list(zip(method(adapted.params), method(other), strict=True))
        for i in range(2):
            assert all(torch.equal(a, b[i]) for a, b in zip(alone[i], together, strict=True))

    def test_a_module_stays_what_was_asked_for(self):
        adapted, x = adapt(Methods()), normal(3, 7)
        other = randomized(adapted.params, 5)
        part = adapted.apply.method("part", adapted.params, adapted.frozen)
        expected = part(x)
        assert torch.equal(adapted.apply.method("steps", adapted.params, adapted.frozen, x).__next__(), expected)
        next(adapted.apply.method("steps", other, adapted.frozen, x))
        assert torch.equal(part(x), expected)


def test_layers_of_the_tree_are_called_by_their_names():
    """A root is run by `functional_call` too, as benchmarks do."""
    adapted, x = adapt(Normalized().eval()), normal(3, 7)
    root = adapted.apply.trees.copy()
    values = {f"model.{key}": value for key, value in adapted.params.items()}
    values |= {f"projections.{key}": value for key, value in adapted.frozen.items()}
    output = functional_call(root, values, ("__call__", (x,), {}))
    assert torch.equal(output, adapted.apply(*adapted[1:3], x))

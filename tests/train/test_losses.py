"""Losses equal a float64 loop over rows, in value and derivatives, and never hold the logits of all positions."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import vera_func as vf
from vera_func.model.head import RowHead, hidden_and_head
from vera_func.train.distributed import mean_over_micro_batches
from vera_func.train.losses import IGNORED, next_token_loss, sequence_logprobs

from helpers import (
    LargestTensor,
    LiveTensors,
    gpt2,
    left_padded,
    llama,
    normal,
    quantized,
    randomized,
    relative_error,
    tokens,
)
from refused import Refused


ROWS, SEQ, WIDTH, VOCAB = 4, 11, 7, 23


def labels_of(pattern="mixed"):
    """Padding on the left, on the right, a prompt, and a row without a target."""
    labels = torch.randint(0, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))
    if pattern == "mixed":
        labels[0, :4] = labels[1, 6:] = labels[2] = IGNORED
    if pattern == "none":
        labels[:] = IGNORED
    return labels


def loop(hidden, weight, bias, labels):
    """The oracle: a loop over rows and positions in float64."""
    totals = []
    for states, row in zip(hidden.double(), labels, strict=True):
        total = 0.0 * states.sum()
        for t in range(len(row) - 1):
            if row[t + 1] != IGNORED:
                logits = weight.double() @ states[t] + bias.double()
                total = total + logits.logsumexp(0) - logits[row[t + 1]]
        totals.append(total)
    return torch.stack(totals)


def whole(hidden, weight, bias, labels):
    """The loop without its loops, for transforms; the first test holds it to the loop."""
    logits = (hidden @ weight.mT + bias)[..., :-1, :]
    targets = labels[..., 1:].expand(logits.shape[:-1])
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -torch.where(targets == IGNORED, 0, picked).sum(-1)


HEADS = {
    "weight": lambda hidden, weight, bias, labels: next_token_loss(hidden, weight, labels, bias=bias).total,
    "function": lambda hidden, weight, bias, labels: (
        next_token_loss(hidden, lambda x: x @ weight.mT + bias, labels, chunk_size=3).total
    ),
    "logits": lambda hidden, weight, bias, labels: next_token_loss(hidden @ weight.mT + bias, None, labels).total,
}


def inputs(dtype=torch.float64):
    return normal(ROWS, SEQ, WIDTH, dtype=dtype), normal(VOCAB, WIDTH, seed=1, dtype=dtype), normal(VOCAB, dtype=dtype)


@pytest.mark.parametrize("pattern", ["mixed", "all", "none"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_those_of_a_loop(head, pattern, dtype):
    args, labels = inputs(dtype), labels_of(pattern)
    exact = [x.double() for x in args]
    right, back = vjp(lambda *args: loop(*args, labels), *exact)
    assert_close(whole(*exact, labels), right)
    got, pull = vjp(lambda *args: HEADS[head](*args, labels), *args)
    assert got.dtype == dtype
    weights = normal(ROWS, dtype=dtype)
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    for one, other in zip((got, *pull(weights)), (right, *back(weights.double())), strict=True):
        assert (one.double() - other).abs().max() <= bound * max(1.0, other.abs().max())


def test_counts_and_the_default_bias():
    (hidden, weight, bias), labels = inputs(), labels_of()
    total, count = next_token_loss(hidden, weight, labels)
    assert count.tolist() == [SEQ - 4, 5, 0, SEQ - 1]
    assert_close(total, loop(hidden, weight, 0 * bias, labels))
    assert_close(sequence_logprobs(hidden, weight, labels, bias=bias), -loop(hidden, weight, bias, labels))
    assert next_token_loss(hidden[:, :1], weight, labels[:, :1]).count.tolist() == [0] * ROWS
    shared = next_token_loss(torch.stack([hidden, 2 * hidden]), weight, labels)  # stacked adapters on one batch
    assert_close(shared.total[1], loop(2 * hidden, weight, 0 * bias, labels))
    assert shared.count.shape == (2, ROWS)
    assert_close(next_token_loss(hidden[0], weight, labels[0]).total, total[0])
    empty = next_token_loss(hidden[:0], weight, labels[:0])
    assert empty.total.shape == empty.count.shape == (0,)


WEIGHTS = normal(ROWS, dtype=torch.float64)


def weighted(function):
    return lambda *args: (function(*args) * WEIGHTS).sum()


TRANSFORMS = {
    "grad": lambda f: grad(weighted(f), (0, 1, 2)),
    "vf.grad": lambda f: vf.grad(weighted(f), (0, 1, 2)),
    "jvp": lambda f: lambda *args: jvp(f, args, args),
    "hessian": lambda f: lambda h, w, b: hessian(weighted(f), (0, 1))(h, w, b),
    "reverse twice": lambda f: lambda h, w, b: jacrev(jacrev(weighted(f), (1, 2)), 0)(h, w, b),
    "grad of jvp": lambda f: grad(lambda *args: jvp(weighted(f), args, args)[1], (0, 1, 2)),
    "jvp of jvp": lambda f: lambda *args: jvp(lambda *args: jvp(weighted(f), args, args)[1], args, args)[1],
    "vmap": lambda f: lambda h, w, b: vmap(f, (0, None, 0))(torch.stack([h, 2 * h]), w, torch.stack([b, 3 * b])),
    "vmap of grad": lambda f: (
        lambda h, w, b: vmap(grad(weighted(f), (0, 1, 2)), (None, 0, None))(h, torch.stack([w, 3 * w]), b)
    ),
    "vmap of hessian": lambda f: (
        lambda h, w, b: vmap(hessian(weighted(f)), (None, 0, None))(h[:, :4], torch.stack([w, 3 * w]), b)
    ),
    # Without the code generator, which takes half a minute.
    "compile": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
    "compile of grad": lambda f: torch.compile(grad(weighted(f), (0, 1, 2)), fullgraph=True, backend="aot_eager"),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("head", HEADS)
def test_transforms(head, transform):
    if "compile" in transform and head != "weight":
        pytest.skip("the compiler sees the same operations")
    labels = labels_of()
    short = labels[:, :4] if transform == "vmap of hessian" else labels
    got = TRANSFORMS[transform](lambda *args: HEADS[head](*args, short))(*inputs())
    right = TRANSFORMS[transform](lambda *args: whole(*args, short))(*inputs())
    assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_vmap_over_labels():
    args, labels = inputs(), torch.stack([labels_of(), labels_of("all"), labels_of("none")])
    got = vmap(lambda labels: grad(weighted(lambda *args: HEADS["weight"](*args, labels)), (0, 1))(*args))(labels)
    right = vmap(lambda labels: grad(weighted(lambda *args: whole(*args, labels)), (0, 1))(*args))(labels)
    assert_close(got, right)


@pytest.mark.parametrize("head", ["weight", "function"])
def test_derivatives_of_plain_autograd(head):
    hidden, weight, bias = inputs()
    args = [x.clone().requires_grad_() for x in (hidden[:2, :4, :2], weight[:5, :2], bias[:5])]
    labels = torch.tensor([[3, IGNORED, 0, 4], [0, 1, 2, IGNORED]])
    assert torch.autograd.gradcheck(lambda *args: HEADS[head](*args, labels), args)
    assert torch.autograd.gradgradcheck(lambda *args: HEADS[head](*args, labels), args)


@pytest.mark.parametrize("head", HEADS)
def test_padding_does_not_matter(head):
    """Not a bit of a gradient comes from positions without a target, not even from NaN."""
    (hidden, weight, bias), labels = inputs(), labels_of()
    predicts = torch.zeros(ROWS, SEQ, 1, dtype=torch.bool)
    predicts[:, :-1, 0] = labels[:, 1:] != IGNORED
    spoiled = torch.where(predicts, hidden, torch.nan)
    total, pull = vjp(lambda hidden: HEADS[head](hidden, weight, bias, labels), spoiled)
    assert torch.equal(total, HEADS[head](hidden, weight, bias, labels))
    (gradient,) = pull(torch.ones_like(total))
    assert head == "logits" or torch.equal(gradient != 0, predicts.expand(gradient.shape))


def test_bfloat16_rounds_no_more_than_its_logits():
    (hidden, weight, bias), labels = inputs(torch.bfloat16), labels_of("all")
    total, count = next_token_loss(hidden, weight, labels, bias=bias)
    right = loop(hidden, weight, bias, labels)
    assert total.dtype == torch.float32
    assert ((total - right).abs() / count).max() < 1e-2
    got = grad(lambda *args: HEADS["weight"](*args, labels).sum(), (0, 1, 2))(hidden, weight, bias)
    right = grad(lambda *args: loop(*args, labels).sum(), (0, 1, 2))(*(x.double() for x in (hidden, weight, bias)))
    for one, other in zip(got, right, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.double(), other, rtol=0.03, atol=0.03)


def test_many_chunks_in_bfloat16_are_summed_in_float32():
    hidden, weight = normal(1, 401, WIDTH, dtype=torch.bfloat16), normal(VOCAB, WIDTH, dtype=torch.bfloat16)
    labels = torch.zeros(1, 401, dtype=torch.long)  # one token: its products all add up

    def gradient(weight, chunk_size):
        return vf.grad(lambda weight: next_token_loss(hidden, weight, labels, chunk_size=chunk_size).total.sum())(
            weight
        )

    right = vf.grad(lambda weight: loop(hidden, weight, torch.zeros(VOCAB), labels).sum())(weight.double())
    one, many = (relative_error(gradient(weight, size).double(), right) for size in (400, 1))
    assert many < 2 * one < 0.02


@pytest.mark.parametrize("transform", [vf.grad, grad])
@pytest.mark.parametrize("head", ["weight", "function"])
def test_logits_are_never_whole(head, transform):
    (hidden, _, bias), labels = inputs(), torch.zeros(ROWS, SEQ, dtype=torch.long)
    big = torch.randn(VOCAB * 20, WIDTH, dtype=torch.float64)
    with LargestTensor() as largest:
        transform(lambda *args: HEADS[head](*args, labels).sum(), (0, 1))(hidden, big, bias.repeat(20))
    assert largest.numel <= 3 * ROWS * SEQ * len(big) // 8
    with torch.no_grad(), LargestTensor() as largest:
        HEADS[head](hidden, big, bias.repeat(20), labels)
    assert largest.numel <= 3 * ROWS * SEQ * len(big) // 8


@pytest.mark.parametrize("outer", ["reverse", "forward"])
def test_second_derivatives_hold_the_logits_of_one_chunk(outer):
    weight, direction = torch.randn(VOCAB * 20, WIDTH), torch.ones(1, 33, WIDTH)

    def most(positions):
        hidden, labels = torch.randn(1, positions + 1, WIDTH), torch.zeros(1, positions + 1, dtype=torch.long)
        gradient = grad(lambda h: next_token_loss(h, weight, labels, chunk_size=8).total.sum())
        with LiveTensors(8 * len(weight)) as live:
            if outer == "reverse":
                vjp(gradient, hidden)[1](direction[:, : positions + 1])
            else:
                jvp(gradient, (hidden,), (direction[:, : positions + 1],))
        return live.most

    assert 0 < most(32) == most(16)


@pytest.mark.parametrize("head", ["weight", "function"])
def test_logits_are_not_kept_for_the_backward_pass(head):
    (hidden, _, _), labels = inputs(), torch.zeros(ROWS, SEQ, dtype=torch.long)
    big, kept = torch.randn(VOCAB * 20, WIDTH, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        HEADS[head](hidden.requires_grad_(), big, big[:, 0], labels)
    assert sum(kept) < ROWS * SEQ * len(big) / 2


@pytest.mark.parametrize("head", ["weight", "function"])
def test_the_head_is_multiplied_only_where_there_is_a_target(head):
    (hidden, weight, bias), labels = inputs(), labels_of()
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "addmm") and out.shape[-1] == VOCAB:
                products.append(len(out))
            return out

    with Products():
        HEADS[head](hidden.requires_grad_(), weight, bias, labels)
    assert sum(products) == (labels[:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("chunk_size", [None, 1, 1000])
def test_the_chunk_does_not_matter(chunk_size):
    args, labels = inputs(), labels_of()
    total, _ = next_token_loss(args[0], args[1], labels, bias=args[2], chunk_size=chunk_size)
    assert_close(total, whole(*args, labels))


def with_head(head):
    model = llama()
    model.lm_head = head
    return model.eval()


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def gemma2():
    """A model that bounds its logits, so that its head can't be taken apart."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 0.1, "use_cache": False}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=67, pad_token_id=0, **sizes, **more)).eval()


# Model, what is adapted and trained in it, and the type of head that the losses get.
MODELS = {
    "llama": (llama, {}, torch.Tensor),
    "tied": (lambda: tied(llama()), {}, torch.Tensor),
    "gpt2": (gpt2, {"target_modules": ["c_attn"]}, torch.Tensor),
    "nf4": (lambda: quantized(llama(), "nf4"), {}, torch.Tensor),
    "bias": (lambda: with_head(nn.Linear(64, 67)), {}, partial),
    "nf4 head": (lambda: with_head(vf.to_bnb(vf.quantize_4bit(normal(67, 64) / 8))), {}, partial),
    "trained head": (llama, {"modules_to_save": ["lm_head"]}, torch.Tensor),
    "trained tied head": (lambda: tied(llama()), {"modules_to_save": ["lm_head"]}, torch.Tensor),
    "adapted head": (llama, {"target_modules": ["q_proj", "lm_head"]}, partial),
    "bounded logits": (gemma2, {}, type(None)),
}


def adapted_model(case):
    make, options, kind = MODELS[case]
    config = {"target_modules": ["q_proj", "v_proj"]} | options
    adapted = vf.adapt(make(), vf.VeraConfig(r=8, **config))
    return adapted._replace(params=randomized(adapted.params, scale=0.3)), kind


def batch():
    ids = tokens(3, 7)
    mask = left_padded(3, 7)
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[0, :5] = IGNORED
    return {"input_ids": ids, "attention_mask": mask}, labels


def row_losses(apply, params, frozen, labels, **inputs):
    return next_token_loss(*hidden_and_head(apply, params, frozen, **inputs), labels)


@pytest.mark.parametrize("case", MODELS)
def test_the_loss_of_a_model(case):
    (apply, params, frozen, _), kind = adapted_model(case)
    inputs, labels = batch()
    assert isinstance(hidden_and_head(apply, params, frozen, **inputs).head, kind)

    def from_logits(params):
        logits = apply(params, frozen, **inputs).logits[:, :-1].transpose(1, 2)
        return cross_entropy(logits, labels[:, 1:], ignore_index=IGNORED, reduction="sum")

    def loss(params):
        return row_losses(apply, params, frozen, labels, **inputs).total.sum()

    for transform in (vf.grad, grad):
        right, got = transform(from_logits)(params), transform(loss)(params)
        for key in params:
            assert_close(got[key], right[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert_close(loss(params), from_logits(params))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_transforms_of_the_loss_of_a_model(targets):
    model = quantized(llama(attention="eager"), "nf4")
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=8, target_modules=targets))
    params, (inputs, labels) = randomized(params, scale=0.3), batch()

    def loss(params):
        total, count = row_losses(apply, params, frozen, labels, **inputs)
        return total.sum() / count.sum()

    right = vf.grad(loss)(params)
    slope = jvp(loss, (params,), (params,))[1]
    assert_close(slope, sum((params[key] * right[key]).sum() for key in params), rtol=1e-4, atol=1e-5)
    many = vf.stack_adapters([params, randomized(params)])
    together = vmap(grad(loss))(many)
    for key in params:
        assert_close(together[key][0], right[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_step_of_a_model():
    apply, params, frozen, _ = vf.adapt(quantized(llama(), "nf4"), vf.VeraConfig(r=8, target_modules=["q_proj"]))
    inputs, labels = batch()

    def loss(params):
        return row_losses(apply, params, frozen, labels, **inputs).total.sum()

    compiled = torch.compile(vf.grad(loss), fullgraph=True)(randomized(params))
    for key, right in vf.grad(loss)(randomized(params)).items():
        assert_close(compiled[key], right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", MODELS)
def test_each_adapter_of_a_mixed_batch_has_its_own_loss(case):
    (apply, params, frozen, _), kind = adapted_model(case)
    many = [randomized(params, seed=seed, scale=0.2) for seed in range(3)]
    inputs, labels = batch()
    stacked = vf.stack_adapters(many)
    ids = [2, 0, 1]
    rows = vf.select_adapters(stacked, ids)
    if kind is partial or case.startswith("trained"):
        assert isinstance(hidden_and_head(apply, rows, frozen, **inputs).head, RowHead | partial)
    total, count = row_losses(apply, rows, frozen, labels, **inputs)
    alone = [row_losses(apply, one, frozen, labels, **inputs) for one in many]
    for i, which in enumerate(ids):
        assert_close(total[i], alone[which].total[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(count, alone[0].count)

    each = vf.vmap_adapters(partial(row_losses, apply), in_dims=None)
    together = each(stacked, frozen, labels, **inputs)
    assert_close(together.total, torch.stack([one.total for one in alone]), rtol=1e-5, atol=1e-5)
    assert together.count.shape == (3, 3)

    def mean(stacked):
        total, count = each(stacked, frozen, labels, **inputs)
        return (total.sum(-1) / count.sum(-1)).sum()

    gradient = vf.grad(mean)(stacked)

    def mean_alone(params):
        total, count = row_losses(apply, params, frozen, labels, **inputs)
        return total.sum() / count.sum()

    for i, one in enumerate(many):
        right = vf.grad(mean_alone)(one)
        for key in right:
            assert_close(gradient[key][i], right[key], rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter_where_each_row_has_its_own_head():
    (apply, params, frozen, _), _ = adapted_model("adapted head")
    rows = vf.stack_adapters([randomized(params, seed=seed, scale=0.2) for seed in range(3)])
    inputs, labels = batch()
    hidden, head = hidden_and_head(apply, rows, frozen, **inputs)
    assert isinstance(head, RowHead)
    predicts = torch.zeros(3, 7, 1, dtype=torch.bool)
    predicts[:, :-1, 0] = labels[:, 1:] != IGNORED
    spoiled = torch.where(predicts, hidden, torch.nan)
    gradient = vf.grad(lambda hidden: next_token_loss(hidden, head, labels).total.sum())
    assert torch.equal(next_token_loss(spoiled, head, labels).total, next_token_loss(hidden, head, labels).total)
    assert torch.equal(gradient(spoiled), gradient(hidden))
    assert torch.equal((gradient(spoiled) != 0).any(-1, keepdim=True), predicts)
    with pytest.raises(ValueError, match=r"labels must be token ids, or -100 .* got -1"):
        next_token_loss(hidden, head, labels.clamp(min=-1))
    with pytest.raises(ValueError, match=r"labels must be token ids from 0 to 66, or -100, got 100"):
        next_token_loss(hidden, head, labels.abs())


def test_micro_batches_of_unequal_size_weigh_by_their_labels():
    (apply, params, frozen, _), _ = adapted_model("llama")
    inputs, labels = batch()

    def loss(params, rows):
        chosen = {name: value[rows] for name, value in inputs.items()}
        total, count = row_losses(apply, params, frozen, labels[rows], **chosen)
        return total.sum() / count.sum().clamp(min=1)

    def weight(rows):
        return (labels[rows, 1:] != IGNORED).sum().item()

    fit = partial(vf.fit, loss, params, steps=2, learning_rate=1e-2, progress=False)
    whole = fit(lambda step: torch.arange(3))
    parts = fit(lambda step: torch.arange(3).split(2), accumulate=partial(mean_over_micro_batches, weight=weight))
    assert_close(parts.losses, whole.losses, rtol=1e-5, atol=1e-6)
    assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)


def test_dropout_at_an_adapted_head_is_refused():
    adapted = vf.adapt(llama(), vf.VeraConfig(r=8, target_modules=["q_proj", "lm_head"], vera_dropout=0.5))
    apply, (inputs, labels) = adapted.apply.with_dropout(torch.Generator()), batch()
    with pytest.raises(ValueError, match="the output head has an adapter with dropout"):
        hidden_and_head(apply, adapted.params, adapted.frozen, **inputs)
    logits = apply(adapted.params, adapted.frozen, **inputs).logits
    assert next_token_loss(logits, None, labels).total.isfinite().all()


@pytest.mark.parametrize("make", [llama, gemma2])
def test_dropout_is_drawn_once(make):
    """Whatever was called before: finding out whether the head can be taken apart draws nothing."""
    adapted = vf.adapt(make(), vf.VeraConfig(r=8, target_modules=["q_proj"], vera_dropout=0.5))
    params, (inputs, labels) = randomized(adapted.params, scale=0.5), batch()

    def draw(loss):
        return loss(adapted.apply.with_dropout(torch.Generator().manual_seed(3)))

    def loss(apply):
        return row_losses(apply, params, adapted.frozen, labels, **inputs).total

    first, again = draw(loss), draw(loss)
    assert torch.equal(first, again)
    right = draw(lambda apply: next_token_loss(apply(params, adapted.frozen, **inputs).logits, None, labels).total)
    assert_close(first, right)


bad = Refused()
HIDDEN, WEIGHT, LABELS = torch.ones(2, 5, 3), torch.ones(7, 3), torch.ones(2, 5, dtype=torch.long)
bad(
    "next_token_loss",
    "an id beyond the vocabulary",
    lambda _: next_token_loss(HIDDEN, WEIGHT, LABELS * 7),
    "from 0 to 6, or -100, got 7",
)
bad(
    "next_token_loss",
    "an id beyond the vocabulary of a function",
    lambda _: next_token_loss(HIDDEN, lambda x: x @ WEIGHT.mT, LABELS * 7),
    "from 0 to 6, or -100, got 7",
)
bad(
    "next_token_loss",
    "a function of something else",
    lambda _: next_token_loss(HIDDEN, lambda x: WEIGHT @ x.mT, LABELS),
    r"head must return logits \(3, vocab\) for an input of shape \(3, 3\), got \(7, 3\)",
)
bad(
    "next_token_loss",
    "a negative id",
    lambda _: next_token_loss(HIDDEN, None, LABELS * -1),
    "token ids, or -100 .* got -1",
)
bad(
    "next_token_loss",
    "labels of another length",
    lambda _: next_token_loss(HIDDEN, WEIGHT, LABELS[:, 1:]),
    r"labels \(2, 4\) do not match hidden \(2, 5, 3\): pass labels of shape \(2, 5\)",
)
bad(
    "next_token_loss",
    "labels in floating point",
    lambda _: next_token_loss(HIDDEN, WEIGHT, LABELS.float()),
    "labels must be .* got .* torch.float32",
)
bad(
    "next_token_loss",
    "a mask for labels",
    lambda _: next_token_loss(HIDDEN, WEIGHT, LABELS.bool()),
    "labels must be .* got .* torch.bool",
)
bad(
    "next_token_loss",
    "a transposed head",
    lambda _: next_token_loss(HIDDEN, WEIGHT.mT, LABELS),
    r"head \(3, 7\) .* does not fit hidden .* weight \(vocab, 3\)",
)
bad(
    "next_token_loss",
    "a head in another dtype",
    lambda _: next_token_loss(HIDDEN, WEIGHT.double(), LABELS),
    "head .* torch.float64 does not fit",
)
bad(
    "next_token_loss",
    "ids for hidden states",
    lambda _: next_token_loss(LABELS, WEIGHT, LABELS),
    "hidden must be a floating-point tensor",
)
bad(
    "next_token_loss",
    "a name for a head",
    lambda _: next_token_loss(HIDDEN, "lm_head", LABELS),
    "head must be a weight .* got str",
)
bad(
    "next_token_loss",
    "a bias without a weight",
    lambda _: next_token_loss(HIDDEN, None, LABELS, bias=torch.ones(3)),
    "bias was passed, but head is not a weight",
)
bad(
    "next_token_loss",
    "a bias of another size",
    lambda _: next_token_loss(HIDDEN, WEIGHT, LABELS, bias=torch.ones(3)),
    r"bias must have shape \(7,\)",
)
bad(
    "next_token_loss",
    "a chunk of nothing",
    lambda _: next_token_loss(HIDDEN, WEIGHT, LABELS, chunk_size=0),
    "chunk_size must be a positive",
)
bad(
    "sequence_logprobs",
    "no labels",
    lambda _: sequence_logprobs(HIDDEN, WEIGHT, None),
    "labels must be .* got NoneType",
)


@pytest.mark.parametrize("transform", ["vmap", "compile"])
def test_a_negative_label_whose_value_is_unknown_gives_nan(transform):
    hidden, weight, _ = inputs()
    labels = labels_of()
    labels[1, 2] = -1
    f = lambda hidden, labels: next_token_loss(hidden, weight, labels).total
    got = vmap(f)(hidden, labels) if transform == "vmap" else torch.compile(f, backend="aot_eager")(hidden, labels)
    assert got[1].isnan()
    right = next_token_loss(hidden[[0]], weight, labels[[0]]).total
    assert_close(got[[0]], right)


@pytest.mark.parametrize("case", bad.rows)
def test_refused(case, tmp_path):
    bad.check(case, tmp_path)

"""Differentially private training on the demo's task: accuracy over ε, beside training without noise.

The noise of a step grows with the square root of the number of parameters. So only `lambda_d` is trained, at a small
rank; it starts at 0, with `lambda_b` fixed at 1. Batches are large Poisson samples. Examples whose prompt exceeds
`MAX_TOKENS` are left out.
"""

import math
import warnings

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import vera_func as vf
from vera_func.data.examples import demo_examples, split
from vera_func.data.models import load_base, native_dtype
from vera_func.data.prompts import collate
from vera_func.data.task import encode_examples, logits_of, make_task, score_of
from vera_func.train.optim import adamw_init, adamw_update, linear_warmup_cosine
from vera_func.train.per_example import per_example_norms
from vera_func.train.privacy import poisson_indices

from .common import table


EPSILONS, DELTA = [math.inf, 8.0, 3.0, 1.0], 1e-5
STEPS, LOT, MICRO_BATCH, MAX_NORM, RATE = 16, 96, 64, 1.0, 2e-2
MAX_TOKENS, HELD_OUT, RANK, SEED = 24, 400, 32, 0


def run(dtype=None, epsilons=None):
    """Print a row for each ε, and a table at the end."""
    dtype = native_dtype(torch.device("cpu")) if dtype is None else getattr(torch, dtype)
    base = load_base(quant="nf4", dtype=dtype)
    task = make_task(base, ["negative", "positive"])
    train, test = _data(base, task)
    config = vf.VeraConfig(r=RANK, target_modules=["q_proj", "v_proj"])
    adapted = vf.adapt(base.model, config, product_dtype=base.product_dtype)
    fixed = {key: torch.ones_like(p) for key, p in adapted.params.items() if key.endswith("lambda_b")}
    start = {key: torch.zeros_like(p) for key, p in adapted.params.items() if key.endswith("lambda_d")}
    logits = logits_of(adapted, task)

    def loss_rows(rows, batch):
        labels = batch["label"]
        rows = rows | {key: p.expand(len(labels), -1) for key, p in fixed.items()}
        return cross_entropy(logits(rows, batch).float(), labels, reduction="none")

    before = score_of(adapted, task, {**fixed, **start}, test)
    print(f"not trained: {100 * before.accuracy:.1f} %, loss {before.loss:.3f}", flush=True)
    rows = []
    for epsilon in epsilons or EPSILONS:
        params, noise, norm = _train(loss_rows, start, train, task, epsilon)
        found = score_of(adapted, task, {**fixed, **params}, test)
        rows.append(
            {
                "ε": epsilon,
                "noise multiplier": noise,
                "median norm at first": norm,
                "accuracy, %": f"{100 * found.accuracy:.1f}",
                "loss": f"{found.loss:.3f}",
            }
        )
        print(rows[-1], flush=True)
    size = sum(p.numel() for p in start.values())
    title = f"{len(train)} training examples, {STEPS} steps of {LOT}, {size} parameters, δ = {DELTA:g}"
    table(f"{title}, {len(test)} test examples, nf4, {str(dtype)[6:]}", rows)


def _data(base, task):
    examples = demo_examples()
    encoded = encode_examples(base, task, examples)
    short = [one for one, row in zip(examples, encoded, strict=True) if len(row.ids) <= MAX_TOKENS]
    train, test = split(short, HELD_OUT, seed=SEED)
    return [encode_examples(base, task, part) for part in (train, test[:HELD_OUT])]


def _train(loss_rows, start, train, task, epsilon):
    """The params, the noise multiplier, and the median norm of the gradients of the first batch."""
    noise = _noise_multiplier(epsilon, LOT / len(train))
    generator, params, state = torch.Generator().manual_seed(SEED), start, adamw_init(start)
    first = None
    for step in tqdm(range(STEPS), desc=f"ε = {epsilon:g}"):
        indices = poisson_indices(step, num_examples=len(train), batch_size=LOT, key=SEED)
        chosen = sorted((train[i] for i in indices), key=lambda row: len(row.ids))
        batches = [collate(chosen[i : i + MICRO_BATCH], task.pad_id) for i in range(0, len(chosen), MICRO_BATCH)]
        parts = [vf.per_example_grads(loss_rows, params, batch) for batch in batches]
        grads = {key: torch.cat([part[key] for part in parts]) for key in start}
        first = per_example_norms(grads).median().item() if first is None else first
        grad = vf.private_step(grads, MAX_NORM, noise_multiplier=noise, generator=generator, batch_size=LOT)
        rate = RATE * float(linear_warmup_cosine(step, warmup=0, total=STEPS))
        params, state = adamw_update(grad, state, params, learning_rate=rate)
    return params, noise, first


def _noise_multiplier(epsilon, sample_rate):
    if math.isinf(epsilon):
        return 0.0
    from opacus.accountants.utils import get_noise_multiplier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders that its search tries
        return get_noise_multiplier(target_epsilon=epsilon, target_delta=DELTA, sample_rate=sample_rate, steps=STEPS)

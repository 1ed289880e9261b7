"""VeRA, DVoRA and PEFT's LoRA on two tasks, at equal examples and steps: accuracy over seeds.

A seed decides the order of the training examples and the random draw (projections; LoRA's A). The learning rate of each
method and task is the one with the lowest validation loss in a sweep with a seed of its own, extended while the best
rate is at an end of the grid. Examples whose prompt exceeds `max_tokens` are left out.

Every run is appended to `results`, a file of JSON lines, and read from there if the benchmark is started again.
"""

import copy
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch.func import functional_call
from tqdm import tqdm

import vera_func as vf
from vera_func.data.assets import load_snippets
from vera_func.data.examples import polar_examples, split
from vera_func.data.models import load_base, native_dtype
from vera_func.data.prompts import answer_loss, score, train_batches
from vera_func.data.task import encode_examples, loss_of, make_task, score_of
from vera_func.model.dora import keep_norm_statistics
from vera_func.train.optim import linear_warmup_cosine

from .common import table


TASKS = {"movie": "movie reviews", "amazon": "product reviews"}
TARGETS = ["q_proj", "v_proj"]
RATES = {
    "VeRA": [1e-2, 2e-2, 4e-2],
    "DVoRA": [1e-2, 2e-2, 4e-2],
    "LoRA r 8": [1e-3, 2e-3, 4e-3],
}
BATCH, MAX_NORM, RANK, SWEEP_SEED = 16, 1.0, 256, 99


class Data(NamedTuple):
    """Encoded examples of one task."""

    train: list
    validation: list
    test: list


class Setting(NamedTuple):
    """What all runs of a comparison have in common."""

    dtype: str
    steps: int
    held_out: int
    max_tokens: int


def run(seeds=5, steps=30, dtype=None, results=None, *, held_out=400, max_tokens=24):
    """Print a table with a row for each method and task."""
    dtype = native_dtype(torch.device("cpu")) if dtype is None else getattr(torch, dtype)
    setting = Setting(str(dtype).removeprefix("torch."), steps, held_out, max_tokens)
    base = load_base(quant="nf4", dtype=dtype)
    base.model.train()  # there is no dropout; in eval mode bitsandbytes repacks its weights for PEFT's layers
    task = make_task(base, ["negative", "positive"], prompt="Text: {text}\nSentiment:")
    data = {domain: _data(base, task, domain, setting) for domain in TASKS}
    records = _Records(results, setting)
    pairs = [(domain, method) for domain in TASKS for method in RATES]
    record = {}
    for domain, method in pairs:
        train = partial(_lora if method.startswith("LoRA") else _vera, base, task, data[domain], steps, method)
        record[domain, method] = partial(records.get, train, domain, method)
    best = {pair: _best_rate(record[pair], RATES[pair[1]]) for pair in tqdm(pairs, desc="sweeps")}
    # Seeds in the outer loop, so that a run that is cut off has as many of each method.
    found = [[record[pair](seed, best[pair]) for pair in pairs] for seed in tqdm(range(seeds), desc="seeds")]
    untrained = vf.adapt(base.model, vf.VeraConfig(r=4, target_modules=TARGETS), product_dtype=base.product_dtype)
    for domain, name in TASKS.items():
        before = score_of(untrained, task, untrained.params, data[domain].test)
        print(f"{name}, not trained: {100 * before.accuracy:.1f} %, loss {before.loss:.3f}")
    rows = [_row(TASKS[pair[0]], column) for pair, column in zip(pairs, zip(*found, strict=True), strict=True)]
    table(f"{seeds} seeds, {steps} steps of {BATCH} examples, r {RANK}, nf4, {setting.dtype}", rows)


def _data(base, task, domain, setting):
    examples = polar_examples(load_snippets(domain))
    encoded = encode_examples(base, task, examples)
    short = [one for one, row in zip(examples, encoded, strict=True) if len(row.ids) <= setting.max_tokens]
    rest, test = split(short, setting.held_out, seed=0)
    train, validation = split(rest, setting.held_out // 2, seed=0)
    parts = train[: setting.steps * BATCH], validation[: setting.held_out // 2], test[: setting.held_out]
    return Data(*(encode_examples(base, task, part) for part in parts))


def _best_rate(record, rates):
    """The rate with the lowest validation loss; `record(SWEEP_SEED, rate)` trains with it."""
    for extra in range(3):
        losses = [record(SWEEP_SEED, rate)["loss"] for rate in rates]
        best = losses.index(min(losses))
        if 0 < best < len(rates) - 1 or extra == 2:
            break
        rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]
    return rates[best]


class _Records:
    """Results of finished runs, kept in a file if there is one."""

    def __init__(self, path, setting):
        self.path, self.setting = path, setting._asdict()
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).exists() else []
        self.rows = [row for row in map(json.loads, lines) if self.setting.items() <= row.items()]

    def get(self, train, domain, method, seed, rate):
        """The record of a run, from the file or from `train(seed, rate)`."""
        key = {"task": domain, "method": method, "seed": seed, "rate": rate}
        found = [row for row in self.rows if key.items() <= row.items()]
        if not found:
            found = [{**self.setting, **key, **train(seed, rate)}]
            self.rows += found
            if self.path:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(found[0]) + "\n")
        return found[0]


def _vera(base, task, data, steps, method, seed, rate):
    config = vf.VeraConfig(r=RANK, target_modules=TARGETS, projection_prng_key=seed, use_dora=method == "DVoRA")
    adapted = vf.adapt(base.model, config, product_dtype=base.product_dtype)
    if config.use_dora:
        adapted = adapted._replace(frozen=keep_norm_statistics(adapted.apply, adapted.frozen))
    params = _fit(loss_of(adapted, task), adapted.params, task, data, steps, seed, rate)
    if config.use_dora:
        params = vf.fold_magnitude(adapted.apply, params, adapted.frozen)
    scored = score_of(adapted, task, params, data.validation if seed == SWEEP_SEED else data.test)
    return _record(vf.num_parameters(adapted).trainable, scored)


def _lora(base, task, data, steps, method, seed, rate):
    torch.manual_seed(seed)
    r = int(method.rpartition(" ")[2])
    model = copy.deepcopy(base.model)
    # Only the rows of the labels, as in `token_logits`.
    model.lm_head = torch.nn.Linear(1, 1, bias=False)
    model.lm_head.weight = torch.nn.Parameter(base.model.lm_head.weight[task.answers].detach(), requires_grad=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)).train()
    params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def logits(params, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return functional_call(model, params, kwargs=inputs | {"logits_to_keep": 1}).logits[:, -1]

    def loss(params, batch):
        return answer_loss(logits(params, batch), batch["label"])

    trained = _fit(loss, params, task, data, steps, seed, rate)
    part = data.validation if seed == SWEEP_SEED else data.test
    scored = score(partial(logits, trained), part, pad_id=task.pad_id)
    return _record(sum(p.numel() for p in params.values()), scored)


def _fit(loss, params, task, data, steps, seed, rate):
    return vf.fit(
        loss,
        params,
        train_batches(data.train, BATCH, seed=seed, pad_id=task.pad_id),
        steps=steps,
        learning_rate=rate,
        schedule=partial(linear_warmup_cosine, warmup=0, total=steps),
        max_norm=MAX_NORM,
        progress=False,
    ).params


def _record(trained, scored):
    return {"trained": trained, "accuracy": float(scored.accuracy), "loss": float(scored.loss)}


def _row(name, found):
    """The row of a method and task from its records, one for each seed."""
    return {
        "task": name,
        "method": found[0]["method"],
        "trained parameters": found[0]["trained"],
        "learning rate": found[0]["rate"],
        "accuracy, %": _spread([100 * record["accuracy"] for record in found], 1),
        "loss": _spread([record["loss"] for record in found], 3),
    }


def _spread(values, digits):
    values = torch.tensor(values)
    spread = values.std().item() if len(values) > 1 else 0.0
    return f"{values.mean().item():.{digits}f} ± {spread:.{digits}f}"

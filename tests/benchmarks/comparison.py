"""VeRA, DVoRA and PEFT's LoRA on two tasks, at equal examples and steps: accuracy over seeds.

For each method and task, the learning rate is the one with the lowest mean validation loss over the seeds. A seed
decides the order of the training examples and the random draw (projections; LoRA's A).
"""

import copy
from functools import partial

import peft
import torch
from torch.func import functional_call
from tqdm import tqdm

import vera_func as vf
from vera_func.data.assets import load_snippets
from vera_func.data.examples import polar_examples, split
from vera_func.data.models import load_base
from vera_func.data.prompts import answer_loss, score, train_batches
from vera_func.data.task import encode_examples, loss_of, make_task, score_of
from vera_func.model.dora import keep_norm_statistics
from vera_func.train.optim import linear_warmup_cosine

from .common import table


TASKS = {"movie": "movie reviews", "amazon": "product reviews"}
TARGETS = ["q_proj", "v_proj"]
RATES = {"VeRA": [5e-3, 1e-2, 2e-2, 4e-2], "DVoRA": [5e-3, 1e-2, 2e-2, 4e-2], "LoRA r 8": [5e-4, 1e-3, 2e-3, 4e-3]}
BATCH, MAX_NORM = 16, 1.0


def run(seeds=5, steps=60, rank=256, rates=4, held_out=500):
    """Print a table with a row for each task and method."""
    base = load_base(quant="nf4", dtype=torch.float32)
    base.model.train()  # there is no dropout; in eval mode bitsandbytes repacks its weights for PEFT's layers
    task = make_task(base, ["negative", "positive"], prompt="Text: {text}\nSentiment:")
    rows = []
    for domain, name in TASKS.items():
        rest, test = split(polar_examples(load_snippets(domain)), held_out, seed=0)
        train, validation = split(rest, held_out, seed=0)
        train, validation, test = (
            encode_examples(base, task, part)
            for part in (train[: steps * BATCH], validation[:held_out], test[:held_out])
        )
        for method, candidates in RATES.items():
            scores, trained = [], 0
            for seed in tqdm(range(seeds), desc=f"{name}, {method}"):
                batches = train_batches(train, BATCH, seed=seed, pad_id=task.pad_id)
                options = {"steps": steps, "max_norm": MAX_NORM, "progress": False}
                options["schedule"] = partial(linear_warmup_cosine, warmup=0, total=steps)
                train_one = _lora if method.startswith("LoRA") else partial(_vera, rank=rank, dora=method == "DVoRA")
                found, trained = train_one(base, task, candidates[:rates], seed, batches, options, (validation, test))
                scores.append(found)  # (rates, 3): validation loss, test accuracy, test loss
            rows.append(_row(name, method, candidates, torch.tensor(scores), trained))
    table(f"{seeds} seeds, {steps} steps of {BATCH} examples, nf4, float32", rows)


def _vera(base, task, rates, seed, batches, options, parts, *, rank, dora):
    """Train one adapter for each rate in one run; the scores (rates, 3), and the trained parameters of one."""
    config = vf.VeraConfig(r=rank, target_modules=TARGETS, projection_prng_key=seed, use_dora=dora)
    adapted = vf.adapt(base.model, config)
    frozen = keep_norm_statistics(adapted.apply, adapted.frozen) if dora else adapted.frozen
    adapted = adapted._replace(frozen=frozen)
    stacked = vf.stack_adapters([adapted.params] * len(rates))
    loss = loss_of(adapted, task, stacked=True)
    result = vf.fit(loss, stacked, batches, learning_rate=rates, num_adapters=len(rates), **options)
    params = vf.fold_magnitude(adapted.apply, result.params, frozen) if dora else result.params
    found = []
    for one in vf.unstack_adapters(params):
        validation, test = (score_of(adapted, task, one, part) for part in parts)
        found.append((float(validation.loss), float(test.accuracy), float(test.loss)))
    return found, vf.num_parameters(adapted).trainable


def _lora(base, task, rates, seed, batches, options, parts):
    """The same for PEFT's LoRA, one run after another."""
    found = []
    for rate in rates:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
        model = peft.get_peft_model(copy.deepcopy(base.model), config).train()
        params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

        def logits(params, batch, model=model):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
            out = functional_call(model, params, kwargs=inputs | {"logits_to_keep": 1}).logits
            return out[:, -1, task.answers]

        def loss(params, batch, logits=logits):
            return answer_loss(logits(params, batch), batch["label"])

        result = vf.fit(loss, params, batches, learning_rate=rate, **options)
        scores = [score(partial(logits, result.params), part, pad_id=task.pad_id) for part in parts]
        found.append((float(scores[0].loss), float(scores[1].accuracy), float(scores[1].loss)))
    return found, sum(p.numel() for p in params.values())


def _row(name, method, rates, scores, trained):
    """The row of a method, at the rate with the lowest validation loss; `scores` (seeds, rates, 3)."""
    best = scores[..., 0].mean(0).argmin()
    accuracy, loss = 100 * scores[:, best, 1], scores[:, best, 2]
    return {
        "task": name,
        "method": method,
        "trained parameters": trained,
        "learning rate": rates[best],
        "accuracy, %": _spread(accuracy),
        "loss": _spread(loss),
        "accuracy by rate, %": ", ".join(f"{100 * value:.1f}" for value in scores[..., 1].mean(0)),
    }


def _spread(values):
    spread = values.std().item() if len(values) > 1 else 0.0
    return f"{values.mean().item():.3g} ± {spread:.2g}"

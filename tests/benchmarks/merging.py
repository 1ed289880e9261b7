"""What every way of merging does to the demo's adapter: accuracy, and the error of the answers' logit gap."""

import time
from functools import partial

import torch
from tqdm import tqdm

import vera_func as vf
from vera_func.cli.exports import CALIBRATION
from vera_func.data.answers import calibrate_answers
from vera_func.data.assets import load_snippets
from vera_func.data.examples import HELD_OUT, demo_examples, polar_examples, split, split_examples
from vera_func.data.models import load_base
from vera_func.data.prompts import collate
from vera_func.data.task import encode_examples, logits_of, make_task

from .common import table


def run(adapter, texts):
    """Print a table with a row for each way; `adapter` is what `vera-func demo` wrote, `texts` the number a domain."""
    base = load_base(quant="nf4", dtype=torch.float32)
    adapted = vf.load_adapter(adapter, base.model)
    task = make_task(base, ["negative", "positive"])
    train, held_out = split_examples(demo_examples(), HELD_OUT, seed=0)
    domains = {
        "movies": encode_examples(base, task, held_out[:texts]),
        # Shuffled: the files are sorted by label.
        "editorials": encode_examples(base, task, split(polar_examples(load_snippets("nyt")), texts, seed=0)[1]),
    }
    start = time.perf_counter()
    rows = encode_examples(base, task, train[:CALIBRATION])
    weights = calibrate_answers(adapted, task, rows, progress=tqdm)
    seconds = time.perf_counter() - start

    merge = partial(vf.merge, base.model, adapted.params, adapted.frozen)
    nothing = {k: torch.zeros_like(v) if k.endswith("lambda_b") else v for k, v in adapted.params.items()}
    ways = {
        "not merged": adapted,
        "bfloat16": _stored(merge(torch.bfloat16).to(torch.float32), adapted.config),
        "int8": _stored(merge("int8"), adapted.config),
        "nf4, rounded": _stored(merge(), adapted.config),
        f"nf4, calibrated ({seconds:.0f} s)": _stored(merge(weights=weights), adapted.config),
        "adapter left out": adapted._replace(params=nothing),
    }
    gaps = {name: {d: _gaps(one, rows, task) for d, rows in domains.items()} for name, one in ways.items()}
    rows = []
    for name, of_domain in gaps.items():
        row = {"q, v merged to": name}
        for domain, examples in domains.items():
            wanted, dropped = gaps["not merged"][domain], gaps["adapter left out"][domain]
            labels = torch.tensor([example.label for example in examples]).bool()
            right = (of_domain[domain] > 0) == labels
            error = (of_domain[domain] - wanted).abs().mean() / (dropped - wanted).abs().mean()
            same = (of_domain[domain] > 0) == (wanted > 0)
            row[f"{domain}: accuracy"] = f"{right.float().mean():.1%}"
            row[f"{domain}: error / effect"] = f"{error:.1%}"
            row[f"{domain}: same answers"] = f"{same.float().mean():.1%}"
        rows.append(row)
    table(f"Merging the demo's adapter, {texts} held-out texts of each domain", rows)


def _stored(model, config):
    """The model's weights as they are stored; bitsandbytes' own forward would round activations, or repack."""
    return vf.adapt(model.eval(), config)


def _gaps(adapted, rows, task):
    """The logit of " positive" minus that of " negative", in the order of the rows."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    gaps = torch.empty(len(rows))
    with torch.no_grad():
        for start in tqdm(range(0, len(rows), 32), leave=False):
            part = order[start : start + 32]
            batch = collate([rows[i] for i in part], task.pad_id)
            negative, positive = logits_of(adapted, task)(adapted.params, batch).unbind(1)
            gaps[part] = positive - negative
    return gaps

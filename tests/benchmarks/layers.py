"""The calibrated merge layer by layer: a random update of 1 % of each linear, judged on texts it has not seen."""

import torch
from tqdm import tqdm

import vera_func as vf
from vera_func.data.examples import HELD_OUT, demo_examples, split_examples
from vera_func.data.models import load_base
from vera_func.data.prompts import batches_by_length
from vera_func.data.task import encode_examples, make_task
from vera_func.merging.calibrate import calibrate_rows, output_error, output_kept
from vera_func.merging.second_moments import second_moments
from vera_func.quant.quantize import levels, unpack

from .common import table


CALIBRATION, JUDGES, ROWS, SIZE = 192, 64, 256, 0.01  # texts, texts, rows of each weight, ‖ΔW‖ / ‖W‖
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(restarts=0, depths=(2, 15, 28)):
    """Print a row for each kind of linear: the mean over layers of these depths; or what restarts find in two."""
    base = load_base(quant="nf4", dtype=torch.float32)
    adapted = vf.adapt(base.model, vf.VeraConfig(r=1, target_modules="all-linear"))
    task = make_task(base, ["negative", "positive"])
    train, held_out = split_examples(demo_examples(), HELD_OUT, seed=0)
    seen, unseen = (
        second_moments(adapted, _batches(base, task, texts)) for texts in (train[:CALIBRATION], held_out[:JUDGES])
    )

    def layer(kind, depth):
        name = next(n for n in adapted.apply.targets if f"layers.{depth}." in n and n.endswith(kind))
        return vf.from_bnb(base.model.get_submodule(name))[0], seen[name], unseen[name]

    if restarts:
        rows = [{"linear": kind, **_restart(*layer(kind, depths[-1]), restarts)} for kind in ("q_proj", "v_proj")]
        table(f"Error of a random update of {SIZE:.0%} onto nf4, layer {depths[-1]}, {restarts} restarts", rows)
        return
    rows = []
    for kind in tqdm(KINDS, leave=False):
        mean = torch.tensor([_judge(*layer(kind, depth)) for depth in depths]).mean(0).tolist()
        names = ["error", "kept", "error, overshot", "kept, overshot"]
        rows.append({"linear": kind, **dict(zip(names, mean, strict=True))})
    table(f"A random update of {SIZE:.0%} onto nf4, outputs on held-out texts, layers {depths}", rows)


def _update(q):
    """`(weight, codes, absmax, update)` of some rows."""
    generator = torch.Generator().manual_seed(0)
    weight, (codes, absmax) = vf.dequantize(q, torch.float32)[:ROWS], unpack(q)
    vectors = {
        "lambda_b": torch.randn(len(weight), generator=generator),
        "lambda_d": torch.randn(256, generator=generator),
    }
    delta = vf.delta_weight(vectors, vf.init_projections(256, q.shape[1], len(weight)), q.shape[1])
    delta *= SIZE * weight.norm() / delta.norm()
    return weight, codes[:ROWS], absmax.reshape(q.shape[0], -1)[:ROWS], delta


def _merged(q, codes, absmax):
    return levels(q)[codes.long()] * absmax.repeat_interleave(q.blocksize, dim=1)


def _judge(q, gram, unseen):
    weight, codes, absmax, delta = _update(q)
    results = []
    for max_kappa in (1, 4):
        done = calibrate_rows(codes, absmax, delta, code=levels(q), gram=gram, max_kappa=max_kappa)
        change = _merged(q, done.codes, done.absmax) - weight
        results += [output_error(change, delta, unseen), output_kept(change, delta, unseen)]
    return results


def _restart(q, gram, unseen, restarts):
    """Errors before and after: a restart is a merge of what is missing into the best codes, some of them changed."""
    weight, codes, absmax, delta = _update(q)
    target, options = weight + delta, {"code": levels(q), "gram": gram, "max_kappa": 1}
    generator = torch.Generator().manual_seed(0)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))  # what calibrate_rows minimises

    def errors(codes, absmax):
        off = _merged(q, codes, absmax) - target
        return (off @ damped * off).sum(1)

    def report(name):
        change = _merged(q, best.codes, best.absmax) - weight
        return {f"{name}, {on}": output_error(change, delta, h) for on, h in (("seen", gram), ("unseen", unseen))}

    best = calibrate_rows(codes, absmax, delta, **options)
    row = report("before")
    for i in tqdm(range(restarts), leave=False):
        place = torch.randint(codes.shape[1], (len(codes), 2 ** (1 + i % 4)), generator=generator)
        step = torch.randint(2, place.shape, generator=generator) * 2 - 1
        changed = best.codes.long()
        changed.scatter_(1, place, (changed.gather(1, place) + step).clamp(0, 15))  # nf4's levels ascend
        missing = target - _merged(q, changed, best.absmax)
        other = calibrate_rows(changed.byte(), best.absmax, missing, **options)
        better = (errors(other.codes, other.absmax) < errors(best.codes, best.absmax))[:, None]
        pairs = ((other.codes, best.codes), (other.absmax, best.absmax))
        best = best._replace(**dict(zip(("codes", "absmax"), (torch.where(better, *p) for p in pairs), strict=True)))
    return row | report("after")


def _batches(base, task, texts):
    for batch in batches_by_length(encode_examples(base, task, texts), 16, task.pad_id):
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

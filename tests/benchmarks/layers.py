"""The calibrated merge layer by layer: a random update of 1 % of each linear, judged on texts it has not seen."""

import torch
from tqdm import tqdm

import vera_func as vf
from vera_func.calibrate import calibrate_rows, output_error, output_kept
from vera_func.demo import HELD_OUT, demo_examples, split_examples
from vera_func.pretrained import load_base
from vera_func.quantized import levels, unpack
from vera_func.sentiment import batches_by_length
from vera_func.task import encode_examples, make_task

from .common import table


CALIBRATION, JUDGES, ROWS, SIZE = 192, 64, 256, 0.01  # texts, texts, rows of each weight, ‖ΔW‖ / ‖W‖
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(depths=(2, 15, 28)):
    """Print a row for each kind of linear: the mean over layers of these depths."""
    base = load_base(quant="nf4", dtype=torch.float32)
    adapted = vf.adapt(base.model, vf.VeraConfig(r=1, target_modules="all-linear"))
    task = make_task(base, ["negative", "positive"])
    train, held_out = split_examples(demo_examples(), HELD_OUT, seed=0)
    seen, unseen = (
        vf.layer_grams(adapted, _batches(base, task, texts)) for texts in (train[:CALIBRATION], held_out[:JUDGES])
    )
    rows = []
    for kind in tqdm(KINDS, leave=False):
        results = []
        for depth in depths:
            name = next(n for n in adapted.apply.targets if f"layers.{depth}." in n and n.endswith(kind))
            q, _ = vf.from_bnb(base.model.get_submodule(name))
            results.append(_judge(q, seen[name], unseen[name]))
        mean = torch.tensor(results).mean(0).tolist()
        names = ["error", "kept", "error, overshot", "kept, overshot"]
        rows.append({"linear": kind, **dict(zip(names, mean, strict=True))})
    table(f"A random update of {SIZE:.0%} onto nf4, outputs on held-out texts, layers {depths}", rows)


def _judge(q, gram, unseen):
    generator = torch.Generator().manual_seed(0)
    weight, (codes, absmax) = vf.dequantize(q, torch.float32)[:ROWS], unpack(q)
    codes, absmax = codes[:ROWS], absmax.reshape(q.shape[0], -1)[:ROWS]
    vectors = {
        "lambda_b": torch.randn(len(weight), generator=generator),
        "lambda_d": torch.randn(256, generator=generator),
    }
    delta = vf.delta_weight(vectors, vf.init_projections(256, q.shape[1], len(weight)), q.shape[1])
    delta *= SIZE * weight.norm() / delta.norm()
    results = []
    for max_kappa in (1, 4):
        done = calibrate_rows(codes, absmax, delta, code=levels(q), gram=gram, max_kappa=max_kappa)
        merged = levels(q)[done.codes.long()] * done.absmax.repeat_interleave(q.blocksize, dim=1)
        results += [output_error(merged - weight, delta, unseen), output_kept(merged - weight, delta, unseen)]
    return results


def _batches(base, task, texts):
    for batch in batches_by_length(encode_examples(base, task, texts), 16, task.pad_id):
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

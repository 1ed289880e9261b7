"""TRL's trainers with PEFT's VeRA, and `fit`, on the same rows in the same order: losses of each step, and time.

TRL's defaults of activation checkpointing and bf16 are off. Each side tokenizes the rows itself. The adapters that TRL
trained are evaluated here, so that held-out losses differ by the training only.
"""

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

import vera_func as vf
from vera_func.data.batches import Item, Part, collate_items
from vera_func.data.dataset import open_dataset
from vera_func.data.objective import loss_of_rows, reference_logprobs, score_rows
from vera_func.data.samples import chapters, movie_pairs, write_rows
from vera_func.data.smollm2 import load_smollm2
from vera_func.data.tokens import tokenize

from .common import llama, table


BETA, RATE, MAX_NORM = 0.1, 2e-2, 1.0
TOKENS = 128  # of a row, at most
BATCH = {"text": 8, "preference": 4}
VERA = {"r": 64, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 0, "task_type": "CAUSAL_LM"}


def run(steps=6, held_out=24, sizes=("tiny", "SmolLM2")):
    """Print a table with a row for each model and kind of data."""
    if find_spec("trl") is None:
        print("\ntrainers: skipped, since TRL is not installed; pip install -e '.[benchmarks]' brings it.")
        return
    _, tokenizer = load_smollm2(torch.float32, "nf4")
    rows = [measure(size, kind, tokenizer, steps, held_out) for size in sizes for kind in BATCH]
    table(f"TRL's trainers with PEFT's VeRA, and fit: nf4, float32, r 64 on q and v, {steps} steps", rows)


def measure(size, kind, tokenizer, steps, held_out, repeats=2):
    """One row of the table. The two train in turns, `repeats` times, and the shorter time of each counts."""
    rows, count = rows_of(kind), steps * BATCH[kind]
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        train, test = (prepare(part, kind, tokenizer) for part in (rows[:count], rows[count : count + held_out]))
        for _ in range(repeats):
            results = {
                "TRL": train_trl(make_model(size), tokenizer, train[0].rows, kind, steps, folder),
                "here": train_here(make_model(size), tokenizer, train[1], kind, steps),
            }
            best = {name: min(found["seconds"], best.get(name, found["seconds"])) for name, found in results.items()}
    theirs, ours = results["TRL"], results["here"]
    adapted, pad = ours["adapted"], {"pad_id": tokenizer.pad_token_id}
    if kind == "preference":
        test = (None, test[1]._replace(reference=reference_logprobs(adapted, adapted.params, test[1], **pad)))
    scores = {
        name: score_rows(adapted, params, [test[1]], stacked=False, **pad).loss.item()
        for name, params in (("before", adapted.params), ("TRL", theirs["params"]), ("here", ours["params"]))
    }
    return {
        "model": size,
        "rows": f"{kind}, {BATCH[kind]} a step",
        "largest difference of a step's loss": (theirs["losses"] - ours["losses"]).abs().max().item(),
        "loss of the first and last step": f"{ours['losses'][0]:.4f}, {ours['losses'][-1]:.4f}",
        "held out: before": scores["before"],
        "by TRL": scores["TRL"],
        "here": scores["here"],
        "TRL, s": best["TRL"],
        "here, s": best["here"],
        "here / TRL": best["here"] / best["TRL"],
        "reference bit-equal": ours["unchanged"],
    }


def rows_of(kind):
    """Verses of the King James Bible, or pairs of sentences."""
    if kind == "preference":
        return movie_pairs()
    return [{"text": verse} for row in chapters()[:20] for verse in row["text"].split("\n")]


def prepare(rows, kind, tokenizer):
    """The data set, and its tokenized rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(rows, Path(folder) / "rows.jsonl")
        data = open_dataset(Path(folder) / "rows.jsonl")
    tokens = tokenize(data, tokenizer, max_length=TOKENS)
    return data, Part(tokens, torch.arange(len(tokens.groups)), BETA if kind == "preference" else None)


def make_model(size):
    """A new base, since PEFT changes the one that it gets."""
    if size == "tiny":
        # Widths are multiples of the block size: bitsandbytes' layers are wrong otherwise on CPUs with AVX512.
        return llama(width=64, layers=2, dtype=torch.float32, vocab=49152, mlp=192)
    return load_smollm2(torch.float32, "nf4")[0]


def train_trl(model, tokenizer, rows, kind, steps, folder):
    """Train with TRL."""
    import peft
    from datasets import disable_progress_bars
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH[kind], "learning_rate": RATE,
        "lr_scheduler_type": "constant", "max_grad_norm": MAX_NORM, "weight_decay": 0.0, "optim": "adamw_torch",
        "gradient_checkpointing": False, "bf16": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "train_sampling_strategy": "sequential", "max_length": TOKENS,
    }  # fmt: skip
    disable_progress_bars()
    watch = stopwatch()
    common = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft.VeraConfig(**VERA)}
    if kind == "preference":
        trainer = DPOTrainer(model, args=DPOConfig(beta=BETA, **options), callbacks=[watch], **common)
    else:
        trainer = SFTTrainer(model, args=SFTConfig(**options), callbacks=[watch], **common)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    params = vf.from_peft(trainer.model).params
    return {"losses": torch.tensor(losses, dtype=torch.float64), "seconds": watch.seconds, "params": params}


def train_here(model, tokenizer, part, kind, steps):
    """Train with `fit`. The forward pass of the reference is part of the time."""
    adapted, pad = vf.adapt(model.eval(), vf.VeraConfig(**VERA)), {"pad_id": tokenizer.pad_token_id}
    start = clock()
    reference = reference_logprobs(adapted, adapted.params, part, **pad) if kind == "preference" else None
    part = part._replace(reference=reference)

    def batch(step):
        rows = part.use[step * BATCH[kind] : (step + 1) * BATCH[kind]].tolist()
        weight = 1 / sum(part.rows.num_targets(row) for row in rows)
        return collate_items([part], [Item(0, row, weight) for row in rows], **pad)

    options = {"learning_rate": RATE, "max_norm": MAX_NORM, "progress": False}
    run = vf.fit(loss_of_rows(adapted), adapted.params, batch, steps=steps, **options)
    found = {"losses": run.losses.double(), "seconds": clock() - start, "params": run.params, "adapted": adapted}
    if reference is None:
        return {**found, "unchanged": "-"}
    again = reference_logprobs(adapted, adapted.params, part, **pad)
    return {**found, "unchanged": str(torch.equal(again, reference))}


def stopwatch():
    """A callback of transformers' trainer that measures the training loop, without what comes before it."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *args, **kwargs):
            self.seconds = -clock()

        def on_train_end(self, *args, **kwargs):
            self.seconds += clock()

    return Stopwatch()


def clock():
    """Seconds; with one thread, of the process, which other programs disturb less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

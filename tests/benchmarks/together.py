"""Training steps of eight adapters in one run, each on its own data set, over the same steps one after another."""

import torch

import vera_func as vf
from vera_func.data.batches import Part, collate_items, training_batches
from vera_func.data.objective import loss_of_rows
from vera_func.data.smollm2 import load_smollm2
from vera_func.data.tokens import TokenRows

from .common import interleave, table


ADAPTERS, ROWS, STEPS = 8, 4, 2  # data sets, rows of each in a step, steps of a measurement
TOKENS = (8, 16, 32, 64)  # of a row
OPTIONS = {"steps": STEPS, "max_norm": 1.0, "progress": False}


def run(dtype):
    """Print seconds of a step of all adapters, and the ratio, for each number of tokens a row."""
    model, _ = load_smollm2(dtype, "nf4")
    model.set_attn_implementation("eager" if dtype == torch.bfloat16 else "sdpa")
    products = torch.bfloat16 if dtype == torch.bfloat16 else None  # as the command line
    adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=["q_proj", "v_proj"]), product_dtype=products)
    rows = [measure(adapted, tokens) for tokens in TOKENS]
    table(f"{ADAPTERS} data sets, {ROWS} rows of each a step: SmolLM2-135M in nf4, r 256, {str(dtype)[6:]}", rows)


def measure(adapted, tokens):
    """One row of the table."""
    parts = [_part(tokens, seed) for seed in range(ADAPTERS)]
    stacked = vf.stack_adapters([adapted.params] * ADAPTERS)

    def together():
        rates = [2e-2] * ADAPTERS
        vf.fit(
            loss_of_rows(adapted, ADAPTERS), stacked, _batches(parts), learning_rate=rates, num_adapters=ADAPTERS,
            accumulate=_first, **OPTIONS,
        )  # fmt: skip

    def alone():
        for part in parts:
            vf.fit(
                loss_of_rows(adapted),
                adapted.params,
                _batches([part]),
                learning_rate=2e-2,
                accumulate=_first,
                **OPTIONS,
            )

    best = interleave({"together": together, "alone": alone}, repeats=4, seconds=60)
    seconds = {f"{name}, s": value / STEPS for name, value in best.items()}
    return {"tokens a row": tokens, **seconds, "together / alone": best["together"] / best["alone"]}


def _part(tokens, seed):
    """Rows of random tokens, as many as a step takes."""
    ids = torch.randint(100, 40_000, (ROWS * tokens,), generator=torch.Generator().manual_seed(seed)).int()
    rows = TokenRows(ids, ids, torch.arange(0, len(ids) + 1, tokens), 1, torch.arange(ROWS))
    return Part(rows, torch.arange(ROWS))


def _batches(parts):
    def collate(items, scale):
        return collate_items(parts, items, scale)

    return training_batches(parts, [STEPS] * len(parts), ROWS, seed=0, micro_batches=1, collate=collate)


def _first(gradient, micro):
    """The gradients of the only micro-batch."""
    return gradient(micro[0])

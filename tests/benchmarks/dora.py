"""DVoRA over VeRA: a mixed batch with norms computed once or in each call, and training steps."""

import torch

import vera_func as vf
from vera_func.model.dora import keep_norm_statistics

from .common import interleave, llama, table, train_step


TARGETS = ["q_proj", "v_proj"]
CASES = [(1, 16), (1, 512), (128, 16)]


def run(dtype):
    """Print a table with a row for each `(adapters, tokens)`."""
    model = llama(dtype=dtype)
    vera, dora = (
        vf.adapt(model, vf.VeraConfig(r=256, target_modules=TARGETS, use_dora=use_dora)) for use_dora in (False, True)
    )
    kept = keep_norm_statistics(dora.apply, dora.frozen)
    rows = [measure(vera, dora, kept, *case) for case in CASES]
    table(f"DVoRA / VeRA, nf4, width 1024, 6 layers, r 256 on q and v, {str(dtype)[6:]}", rows)


def measure(vera, dora, kept, n, tokens):
    """One row: `n` adapters, each on a sequence of its own."""
    ids = torch.randint(0, 512, (n, tokens), generator=torch.Generator().manual_seed(0))
    plain, magnitudes = (vf.stack_adapters([adapted.params] * n) for adapted in (vera, dora))
    folded = vf.fold_magnitude(dora.apply, magnitudes, kept)

    def forward(adapted, params, frozen):
        def call():
            with torch.no_grad():
                adapted.apply(params, frozen, input_ids=ids)

        return call

    def step(adapted, params, frozen):
        def loss(p):
            return adapted.apply(p, frozen, input_ids=ids).logits.float().square().mean((1, 2)).sum()

        return lambda: train_step(loss, params)

    best = interleave(
        {
            "VeRA": forward(vera, plain, vera.frozen),
            "folded": forward(dora, folded, dora.frozen),
            "kept": forward(dora, magnitudes, kept),
            "each call": forward(dora, magnitudes, dora.frozen),
            "train VeRA": step(vera, plain, vera.frozen),
            "train kept": step(dora, magnitudes, kept),
            "train each call": step(dora, magnitudes, dora.frozen),
            "fold": lambda: vf.fold_magnitude(dora.apply, magnitudes, kept),
        },
        repeats=8,
    )
    return {
        "adapters x tokens": f"{n} x {tokens}",
        "evaluate: folded": best["folded"] / best["VeRA"],
        "evaluate: kept statistics": best["kept"] / best["VeRA"],
        "evaluate: nothing kept": best["each call"] / best["VeRA"],
        "train: kept statistics": best["train kept"] / best["train VeRA"],
        "train: nothing kept": best["train each call"] / best["train VeRA"],
        "fold, s": best["fold"],
        "VeRA, s": best["VeRA"],
    }

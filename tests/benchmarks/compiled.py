"""`torch.compile(fullgraph=True)` of a whole training step of a transformers model, against the same step in eager."""

import time

import torch
from torch.func import grad

import vera_func as vf

from .common import interleave, llama, table
from .single import TARGETS


def run(dtype, tokens=(16, 128)):
    """Print a row for each choice of targets and number of tokens."""
    rows = []
    for name, targets in TARGETS.items():
        apply, params, frozen, _ = vf.adapt(llama(dtype=dtype), vf.VeraConfig(r=256, target_modules=targets))

        def loss(params, ids, apply=apply, frozen=frozen):
            return apply(params, frozen, input_ids=ids).logits.float().square().mean()

        for count in tokens:
            ids = torch.randint(0, 512, (1, count), generator=torch.Generator().manual_seed(0))
            torch.compiler.reset()
            step = torch.compile(grad(loss), fullgraph=True)
            start = time.perf_counter()
            compiled = step(params, ids)
            seconds = time.perf_counter() - start
            eager = grad(loss)(params, ids)
            worst = max((compiled[k] - eager[k]).norm() / eager[k].norm().clamp(min=1e-12) for k in eager)
            best = interleave(
                {"eager": lambda: grad(loss)(params, ids), "compiled": lambda: step(params, ids)}  # noqa: B023
            )
            rows.append(
                {
                    "targets": name,
                    "tokens": count,
                    "compiled / eager": best["compiled"] / best["eager"],
                    "compiled, ms": 1e3 * best["compiled"],
                    "compiling, s": seconds,
                    "largest difference of a gradient": worst.item(),
                }
            )
    table(f"A compiled training step, nf4, width 1024, 6 layers, r 256, {str(dtype)[6:]}", rows)

"""How the cost of a mixed batch grows: one size at a time, beside the bare base and beside what the flops say."""

from pathlib import Path

import torch

import vera_func as vf

from .common import bare, interleave, llama, table


TARGETS = ["q_proj", "v_proj"]
START = {"adapters": 16, "tokens": 16, "width": 512, "r": 256}
RANGES = {
    "adapters": [1, 4, 16, 64, 256],
    "tokens": [1, 4, 16, 64, 256],
    "width": [256, 512, 1024, 2048],
    "r": [16, 64, 256, 1024],
}


def run(dtype, out, device="cpu", start=START, ranges=RANGES):
    """Print a table, and draw it on logarithmic axes into the file `out`."""
    rows = []
    for what, sizes in ranges.items():
        for size in sizes:
            rows.append({"size": what, "at": size, **measure(dtype, device, **{**start, what: size})})
    table(f"Growth of one forward from {start}, nf4, 2 layers, {str(dtype)[6:]}", rows)
    if out:
        draw(rows, ranges, start, out)
        print(f"\nDrawn in {out}.")


def measure(dtype, device, *, adapters, tokens, width, r):
    """Seconds of a mixed batch and of the bare base, and the flops of both."""
    model = llama(width, 2, dtype, device=device)
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=r, target_modules=TARGETS))
    stacked = vf.stack_adapters([params] * adapters)
    ids = torch.randint(0, 512, (adapters, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    base = torch.no_grad()(bare(apply))

    @torch.no_grad()
    def mixed():
        apply(stacked, frozen, input_ids=ids)

    best = interleave({"mixed": mixed, "bare": lambda: base(ids)}, repeats=5, seconds=10)
    # Multiply-adds a token and layer: q, k, v, o, and an MLP of 2.75; A once for q and v, B for each.
    products = 4 + 3 * 2.75
    return {
        "mixed, ms": 1e3 * best["mixed"],
        "bare, ms": 1e3 * best["bare"],
        "mixed / bare": best["mixed"] / best["bare"],
        "flops mixed / bare": 1 + 3 * r / (products * width),
    }


def draw(rows, ranges, start, out):
    """Four panels, one for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(ranges), figsize=(3.2 * len(ranges), 3.2), sharey=True, layout="constrained")
    for axis, what in zip(axes, ranges, strict=True):
        part = [row for row in rows if row["size"] == what]
        at = [row["at"] for row in part]
        axis.loglog(at, [row["mixed, ms"] for row in part], "o-", label="mixed batch")
        axis.loglog(at, [row["bare, ms"] for row in part], "s--", label="bare base")
        fixed = ", ".join(f"{name} {value}" for name, value in start.items() if name != what)
        axis.set_title(fixed, fontsize=8)
        axis.set_xticks(at, [str(size) for size in at])
        axis.minorticks_off()
        axis.set_xlabel(what)
        axis.grid(which="both", alpha=0.3)
    axes[0].set_ylabel("one forward, ms")
    axes[0].legend()
    figure.savefig(Path(out), dpi=150)

"""`python -m tests.benchmarks [WHAT ...]`: ratios against PEFT, with the machine named."""

import argparse

import torch

from . import attention, compiled, gpu, layers, many, memory, merging, processes, roofline, scaling, single
from .common import machine


CASES = [(1, 16), (16, 16), (64, 16), (128, 4), (128, 16), (512, 4)]
WHAT = ["many", "single", "compiled", "memory", "roofline", "attention", "scaling", "bank", "merging", "layers"]
WHAT += ["processes", "gpu"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", nargs="*", choices=[*WHAT, []], help="all but merging, layers and processes, if nothing is said"
    )
    parser.add_argument(
        "--adapter", default="vera-demo", help="directory of the demo's adapter, for merging (%(default)s)"
    )
    parser.add_argument("--texts", type=int, default=500, help="of each domain, for merging (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], nargs="*", default=["bfloat16", "float32"])
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1, 16, 128, 512, 2048], help="of single (%(default)s)"
    )
    parser.add_argument("--restarts", type=int, default=0, help="of the search of layers, which then looks at two only")
    parser.add_argument("--adapters", type=int, default=10_000, help="of the bank (%(default)s)")
    parser.add_argument("--out", help="file for the plots of scaling, such as scaling.png")
    parser.add_argument("--dry-run", action="store_true", help="of gpu: tiny, on a CPU, to see that it runs")
    args = parser.parse_args()
    what = args.what or [name for name in WHAT if name not in ("merging", "layers", "processes")]

    print(machine())
    for dtype in (getattr(torch, name) for name in args.dtype):
        if "many" in what:
            many.run(dtype, CASES)
        if "single" in what:
            single.run(dtype, args.tokens)
        if "compiled" in what:
            compiled.run(dtype)
        if "memory" in what:
            memory.run(dtype)
        if "roofline" in what:
            roofline.run(dtype)
        if "attention" in what:
            attention.run(dtype)
        if "scaling" in what:
            scaling.run(dtype, args.out)
    if "merging" in what:
        merging.run(args.adapter, args.texts)
    if "layers" in what:
        layers.run(args.restarts)
    if "bank" in what:
        many.bank(args.adapters)
    if "processes" in what:
        processes.run()
    if "gpu" in what:
        gpu.run(args.dry_run)


if __name__ == "__main__":  # and not again in the processes that memory starts
    main()

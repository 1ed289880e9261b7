"""`python -m tests.benchmarks [WHAT ...]`: ratios against PEFT, with the machine named."""

import argparse
from importlib import import_module

import torch

from .common import machine


CASES = [(1, 16), (16, 16), (64, 16), (128, 4), (128, 16), (512, 4)]
DEFAULT = ["many", "single", "compiled", "memory", "roofline", "attention", "language", "decoding", "dora", "scaling"]
DEFAULT += ["per_example", "together", "bank"]
WHAT = [*DEFAULT, "merging", "layers", "comparison", "private", "processes", "gpu", "trainers"]
DTYPES = ["bfloat16", "float32"]
OF_EACH_DTYPE = DEFAULT[: DEFAULT.index("bank")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], help=f"without one: {' '.join(DEFAULT)}")
    parser.add_argument(
        "--adapter", default="vera-demo", help="directory of the demo's adapter, for merging (%(default)s)"
    )
    parser.add_argument("--texts", type=int, default=500, help="of each domain, for merging (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", help="(default: both; of one model: native)")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1, 16, 128, 512, 2048], help="of single (%(default)s)"
    )
    parser.add_argument("--adapters", type=int, nargs="*", help="of many: only the cases of so many")
    parser.add_argument("--restarts", type=int, default=0, help="of the search of layers, which then looks at two only")
    parser.add_argument("--seeds", type=int, default=5, help="of the comparison of methods (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of the comparison of methods (%(default)s)")
    parser.add_argument("--results", help="JSON lines to which the comparison appends its runs, and resumes from")
    parser.add_argument("--epsilon", type=float, nargs="*", help="of private training (default: inf 8 3 1)")
    parser.add_argument("--size", type=int, default=10_000, help="adapters of the bank (%(default)s)")
    parser.add_argument("--out", help="file for the plots of scaling, such as scaling.png")
    parser.add_argument("--dry-run", action="store_true", help="of gpu: tiny, on a CPU, to see that it runs")
    args = parser.parse_args()
    what = args.what or DEFAULT
    native = args.dtype[:1] if args.dtype else [None]  # of benchmarks that load one model
    arguments = {
        "many": ([case for case in CASES if not args.adapters or case[0] in args.adapters],),
        "single": (args.tokens,),
        "scaling": (args.out,),
        "bank": (args.size,),
        "merging": (args.adapter, args.texts),
        "layers": (args.restarts,),
        "comparison": (args.seeds, args.steps, *native, args.results),
        "private": (*native, args.epsilon),
        "gpu": (args.dry_run,),
    }

    print(machine())
    for dtype in args.dtype or DTYPES:
        for name in (name for name in OF_EACH_DTYPE if name in what):
            _module(name).run(getattr(torch, dtype), *arguments.get(name, ()))
    for name in (name for name in WHAT if name in what and name not in OF_EACH_DTYPE):
        _module(name).run(*arguments.get(name, ()))


def _module(name):
    return import_module(f".{name}", __package__)


if __name__ == "__main__":  # and not again in the processes that memory starts
    main()

"""`python -m tests.benchmarks [many] [single] [bank] [merging] [processes]`: ratios in one run, the machine named."""

import argparse

import torch

from . import many, merging, processes, single
from .common import machine


CASES = [(1, 16), (16, 16), (64, 16), (128, 4), (128, 16), (512, 4)]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "what",
    nargs="*",
    choices=["many", "single", "bank", "merging", "processes", []],
    default=["many", "single", "bank"],
)
parser.add_argument("--adapter", default="vera-demo", help="directory of the demo's adapter, for merging (%(default)s)")
parser.add_argument("--texts", type=int, default=500, help="of each domain, for merging (%(default)s)")
parser.add_argument("--dtype", choices=["bfloat16", "float32"], nargs="*", default=["bfloat16", "float32"])
parser.add_argument("--adapters", type=int, default=10_000, help="of the bank (%(default)s)")
args = parser.parse_args()

print(machine())
for dtype in (getattr(torch, name) for name in args.dtype):
    if "many" in args.what:
        many.run(dtype, CASES)
    if "single" in args.what:
        single.run(dtype)
if "merging" in args.what:
    merging.run(args.adapter, args.texts)
if "bank" in args.what:
    many.bank(args.adapters)
if "processes" in args.what:
    processes.run()

"""A fuzzer over every file that is read: `python -m tests.fuzz --seconds 600`.

Whole files are damaged as bytes and as JSON, and read. What is allowed: a ValueError or OSError of one sentence, or a
load that holds what a second, independent reader finds in the same bytes. A case that takes five seconds of CPU time
hangs. Every case is a function of its number, which a failure names: `python -m tests.fuzz --case 1234`.
"""

import argparse
import copy
import dataclasses
import json
import random
import signal
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vera_func as vf
from vera_func.data.examples import read_examples
from vera_func.data.metadata import Metadata, read_metadata, write_metadata
from vera_func.io.checkpoint import WEIGHTS
from vera_func.train.fit import load_fit, save_fit


VALUES = [
    *(None, True, False, 0, 1, -1, 3, 4, 5, 2**31, 2**63 - 1, 2**63, 2**70, -(2**70)),
    *(1e400, -1e400, float("nan"), 0.5, 1e-320),
    *("", "0", "2", ".*", "(", "[0-2]", "all-linear", "\0", "\ud800", "../../x", "__class__", "0.bias"),
    *("é" * 300, "x" * 70_000, "VERA", "LORA", "vera_only", "all", "_only", "SEQ_CLS"),
    *("F32", "F64", "BF16", "I64", "F8_E4M3", "BOOL", "U8", "C64"),
    *([], {}, [0], ["0"], ["2", "0"], [None], [[]], {"a": 1}, [2**70], [0, 4], [0, 0], [1, 1], [-1], [2**62, 2**62]),
    *("vera_A", "vera_B", "0.lambda_b", "base_model.vera_A", "base_model.model.0.vera_lambda_b", "losses", "step"),
]  # fmt: skip
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


@dataclasses.dataclass
class Wrong(Exception):
    """Something was read that is not in the file."""

    what: str


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def originals(folder: Path) -> dict[str, bytes]:
    """Whole files, by their place in a folder."""
    base = model()
    for name, fields in {"plain": {}, "own": {"bias": "all"}, "drawn": {"save_projection": False}}.items():
        adapted = vf.adapt(base, vf.VeraConfig(**{"r": 4, "target_modules": ["0", "2"]} | fields))
        params = {key: torch.randn_like(value) for key, value in adapted.params.items()}
        vf.save_adapter(folder / name, params, *adapted[2:])
    stacked = vf.stack_adapters([adapted.params] * 3)
    vf.save_bank(folder / "bank", stacked, *adapted[2:], names=["a", "b", "c"])
    run = vf.fit(lambda p, _: p["p"].sum(), {"p": torch.ones(5)}, int, steps=3, learning_rate=0.1, progress=False)
    save_fit(folder / "run", run)
    write_metadata(folder, Metadata("nf4", ["yes", "no"], "{text}"))
    (folder / "data.csv").write_text('text,label\n"a, b",yes\nc,no\n')
    (folder / "data.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "no"}\n')
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- damage


def damage(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """The same bytes with a few things wrong."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        data = rng.choice([flip, flip_numbers, flip_numbers, cut, insert, splice, lengthen, edit, edit, edit, edit])(
            data, rng, others
        )
    return data


def flip(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 32])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_numbers(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Other numbers in the tensors, which is no damage that a reader can see."""
    try:
        _, rest = header_of(data)
    except ValueError:
        return flip(data, rng, others)
    return data[: len(data) - len(rest)] + flip(rest, rng, others)


def cut(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[a:], data[:a] + data[b:]])


def insert(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([b"\0" * 8, b"\xff", b"{", b'"', b"NaN", b"1e999", rng.randbytes(9)]) + data[at:]


def splice(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def lengthen(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Lie about the length of the header."""
    length = rng.choice(
        [0, 1, 2, len(data), len(data) - 8, 10**6, 10**8 + 1, 2**32, 2**63, 2**64 - 1, rng.randrange(2000)]
    )
    return struct.pack("<Q", length % 2**64) + data[8:]


def edit(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Damage a JSON value, of a JSON file or of the header of a safetensors file, and keep the rest in order."""
    try:
        text, rest = header_of(data)
    except ValueError:
        text, rest = data, None
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return flip(data, rng, others)
    tree = edited(tree, rng)
    new = json.dumps(tree).encode(errors="surrogatepass")
    if rng.random() < 0.1:
        new = new.replace(b'"VERA"', b'"VERA", "r": 4', 1)  # a key twice
    return new if rest is None else struct.pack("<Q", len(new)) + new + rest


def edited(tree: Any, rng: random.Random) -> Any:
    places = [((), tree)]
    for path, node in places:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        places.extend(((*path, key), value) for key, value in items)
    path, node = rng.choice(places)
    new: Any
    if isinstance(node, str) and node[:1] in ("{", "[") and rng.random() < 0.8:
        try:
            new = json.dumps(edited(json.loads(node), rng))  # JSON inside JSON: the metadata
        except (ValueError, RecursionError):
            new = node[:-1]
    elif isinstance(node, int) and rng.random() < 0.5:
        new = node + rng.choice([-4, -1, 1, 4])
    else:
        new = copy.deepcopy(rng.choice([*VALUES, rng.choice(places)[1]]))
    if not path:
        return new
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    action = rng.random()
    if action < 0.7:
        parent[path[-1]] = new
    elif action < 0.85:
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[rng.choice([str(new), *parent])] = parent.pop(path[-1])
    else:
        parent.append(new)
    return tree


# ------------------------------------------------------------------------------------------------- a second reader


def header_of(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or data[8:9] != b"{":
        raise ValueError("not a safetensors file")
    return data[8 : 8 + length], data[8 + length :]


def tensors_in(data: bytes) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, by numpy alone; bfloat16 as float32."""
    text, rest = header_of(data)
    found = {}
    for name, fields in json.loads(text).items():
        if name != "__metadata__":
            start, stop = fields["data_offsets"]
            if fields["dtype"] == "BF16":
                array = (np.frombuffer(rest[start:stop], "<u2").astype("<u4") << 16).view("<f4")
            else:
                array = np.frombuffer(rest[start:stop], NUMPY[fields["dtype"]])
            found[name] = array.reshape(fields["shape"])
    return found


def require(holds: Any, what: str) -> None:
    if not holds:
        raise Wrong(what)


def compare(tensor: torch.Tensor, array: np.ndarray, what: str) -> None:
    require(tuple(tensor.shape) == array.shape, f"{what} has another shape than in the file")
    with np.errstate(over="ignore"):
        expected = array.astype(tensor.float().numpy().dtype) if tensor.is_floating_point() else array
    require(
        np.array_equal(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy(), expected, True), what
    )


# ----------------------------------------------------------------------------------------------------- what is read


def read_adapter(path: Path, base: nn.Module) -> vf.Adapted:
    return vf.load_adapter(path.parent, base)


def verify_adapter(adapted: vf.Adapted, path: Path) -> None:
    apply, params, frozen, config = adapted
    arrays = tensors_in((path.parent / WEIGHTS).read_bytes())
    for key, value in params.items():
        layer, _, leaf = key.rpartition(".")
        inner = "base_layer." if f"{layer}.lambda_b" in params and leaf == "bias" else ""
        name = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}.get(leaf, inner + leaf)
        compare(value, arrays[f"base_model.model.{layer}.{name}"], key)
        require(value.isfinite().all(), f"{key} is not finite")
        require(leaf != "lambda_d" or value.shape == (config.r,), f"{key} is not of rank {config.r}")
    if config.save_projection:
        for name, value in frozen.items():
            compare(value, arrays[f"base_model.{name}"], name)
    else:
        sizes = [(7, 5), (5, 3)] if "2.lambda_b" in params and "0.lambda_b" in params else None
        drawn = vf.init_projections(config.r, 7, 5, config.projection_prng_key) if sizes else frozen
        require(all(torch.equal(frozen[name], drawn[name]) for name in drawn), "the drawn projections")
    apply(params, frozen, torch.ones(2, 7))


def read_bank(path: Path, base: nn.Module) -> tuple:
    bank = vf.open_bank(path)
    return bank, bank.read(), bank.frozen(), bank.read([bank.names[-1]]) if bank.names else {}, bank.adapted(base)


def verify_bank(read: tuple, path: Path) -> None:
    bank, everything, frozen, last, adapted = read
    data = path.read_bytes()
    arrays = tensors_in(data)
    metadata = json.loads(header_of(data)[0])["__metadata__"]
    require(list(bank.names) == json.loads(metadata["names"]), "the names")
    for name, value in (everything | frozen).items():
        compare(value, arrays[name], name)
    for name, value in last.items():
        compare(value[0], arrays[name][-1], f"the last row of {name}")
    if bank.names:
        adapted.apply({key: value[0] for key, value in adapted.params.items()}, adapted.frozen, torch.ones(2, 7))


def read_run(path: Path, base: nn.Module) -> vf.Fit:
    return load_fit(path, {"p": torch.ones(5)})


def verify_run(run: vf.Fit, path: Path) -> None:
    arrays = tensors_in(path.read_bytes())
    found = {
        "params.p": run.params["p"],
        "state.mean['p']": run.state.mean["p"],
        "state.var['p']": run.state.var["p"],
        "state.step": run.state.step,
    }
    for name, value in (found | {"losses": run.losses, "metrics": run.metrics}).items():
        compare(value, arrays[name], name)


def verify_metadata(metadata: Metadata, path: Path) -> None:
    fields = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    require(metadata == Metadata(**{name: fields.get(name) for name in Metadata._fields}), "the metadata")


def verify_examples(examples: list, path: Path) -> None:
    require(all(example.text.strip() and example.label for example in examples), "an empty example")
    require(len({example.label for example in examples}) > 1, "one label")


# File -> how it is read, and how what was read is compared with it.
CHECKS: dict[str, tuple[Callable, Callable]] = {
    "bank": (read_bank, verify_bank),
    "run": (read_run, verify_run),
    "vera_func.json": (lambda path, base: read_metadata(path.parent), verify_metadata),
    "data.csv": (lambda path, base: read_examples(path), verify_examples),
    "data.jsonl": (lambda path, base: read_examples(path), verify_examples),
}


class Fuzzer:
    """Original files in a folder, and one damaged at a time."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.model, self.files = folder, model(), originals(folder)
        self.outcomes: Counter[str] = Counter()

    def run(self, case: int) -> None:
        """Damage a file, read it, and put it back. Raises what is not allowed."""
        rng = random.Random(case)
        name = rng.choice(sorted(self.files))
        path = self.folder / name
        path.write_bytes(damage(self.files[name], rng, list(self.files.values())))
        read, verify = CHECKS.get(name, (read_adapter, verify_adapter))
        signal.setitimer(signal.ITIMER_PROF, 5)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    found = read(path, self.model)
                except (ValueError, OSError) as error:
                    # Raised on purpose, and about the file; not json's or a codec's own.
                    require(type(error) in (ValueError, FileNotFoundError), f"{type(error).__name__}: {error}")
                    require(str(self.folder) in str(error), f"no file in the message: {error}")
                    self.outcomes[f"{name}: {type(error).__name__}"] += 1
                    return
                verify(found, path)
            self.outcomes[f"{name}: read"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            path.write_bytes(self.files[name])


def _hang(*_: Any) -> None:
    raise Wrong("it hangs")


def fuzz(seconds: float, first: int = 0, only: int | None = None) -> tuple[int, Counter[str], list[str]]:
    """Run cases for some seconds: their number, what became of them, and a line for each failure."""
    failures: list[str] = []
    before = signal.signal(signal.SIGPROF, _hang)
    try:
        with tempfile.TemporaryDirectory() as folder:
            fuzzer, end, case = Fuzzer(Path(folder)), time.monotonic() + seconds, first
            while time.monotonic() < end:
                case = case if only is None else only
                try:
                    fuzzer.run(case)
                except Exception as error:
                    if only is not None:
                        raise
                    failures.append(f"case {case}: {type(error).__name__}: {str(error)[:200]}")
                case += 1
                if only is not None:
                    break
            return case - first, fuzzer.outcomes, failures
    finally:
        signal.signal(signal.SIGPROF, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone, with its traceback")
    options = parser.parse_args()
    count, outcomes, failures = fuzz(options.seconds, options.first, options.case)
    for line in [f"{n:8} {what}" for what, n in sorted(outcomes.items())] + failures[:50]:
        print(line)
    print(f"{count} cases, {len(failures)} failures")
    raise SystemExit(bool(failures))

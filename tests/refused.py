"""Bad input is refused: one sentence says what came and what would be right, and nothing is half-written.

A test file has a table `bad` of what its functions refuse: `bad(function, what is wrong, call, part of the message)`.
What other tests try beside what is right is not repeated in it.
"""

import json
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn, ones

import vera_func as vf


class Refused:
    """Rows `"function: what is wrong" -> (call, exception, part of the message)`; a call takes a folder of its own."""

    all: ClassVar = {}  # of the tables of every test file that was imported

    def __init__(self):
        self.rows = {}

    def __call__(self, function, what, call, message, error=ValueError):
        name = f"{function}: {what}"
        assert name not in Refused.all, name
        self.rows[name] = Refused.all[name] = (call, error, message)

    def check(self, case, folder):
        call, error, message = self.rows[case]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(error, match=message) as raised:
                call(folder)
        assert type(raised.value) is error or error is OSError, type(raised.value)
        text = str(raised.value)
        assert 10 < len(text) < 600 or error is KeyError, text
        left = [path.name for path in folder.rglob("*") if path.name.startswith(".") or path.name in ("new", "lora")]
        assert not left


NAN, INF = float("nan"), float("inf")


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def filled(params, value=1.0):
    return {key: torch.full_like(leaf, value) for key, leaf in params.items()}


ADAPTED = vf.adapt(small_model(), vf.VeraConfig(r=4, target_modules=["0", "2"]))
PARAMS, FROZEN, CONFIGURATION = filled(ADAPTED.params), ADAPTED.frozen, ADAPTED.config
STACK = vf.stack_adapters([PARAMS] * 3)
# One layer, 64 -> 32.
LAYER = {"lambda_b": ones(32), "lambda_d": ones(4)}
PAIR = vf.init_projections(4, 64, 32)
X = ones(3, 64)
Q4 = vf.quantize_4bit(torch.linspace(-1, 1, 2048).reshape(32, 64))
Q4_NESTED = vf.quantize_4bit(torch.linspace(-1, 1, 2048).reshape(32, 64), double_quant=True)
Q8 = vf.quantize_8bit(torch.linspace(-1, 1, 2048).reshape(32, 64))
ROWS = vf.quantize_4bit(torch.linspace(-1, 1, 1024).reshape(32, 32))  # blocks of 64 straddle its rows
QMODEL = nn.Sequential(vf.to_bnb(Q4))
QADAPTED = vf.adapt(QMODEL, vf.VeraConfig(r=4, target_modules=["0"]))


def stored(header, data=b"", length=None):
    """A safetensors file that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# What a safetensors file may be instead, and the words for most of it.
UNREADABLE = "is not a complete safetensors file"
RAW = {
    "a shape beyond its bytes": stored({"a": entry([9], 0, 4)}, bytes(4)),
    "bytes twice": stored({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "a hole": stored({"a": entry([1], 4, 8)}, bytes(8)),
    "a negative size": stored({"a": entry([-1], 0, 4)}, bytes(4)),
    "a size of 2^124": stored({"a": entry([2**62, 2**62], 0, 4)}, bytes(4)),
    "data beyond the end": stored({"a": entry([100], 0, 400)}, bytes(4)),
    "a header of 2^63 bytes": stored({}, length=2**63 - 1),
    "a header beyond the end": stored({}, length=10**6),
    "a deep header": stored(b"[" * 50_000),
    "a header in UTF-16": stored("{}".encode("utf-16")),
    "a list of metadata": stored({"__metadata__": [1]}),
    "numbers in metadata": stored({"__metadata__": {"format": 5}}),
    "no tensors": stored({}),
    "a pickle": b"\x80\x04K\x01.",
    "zeros": bytes(64),
}

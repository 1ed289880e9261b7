"""What is wrong is refused: one sentence says what came and what would be right, and nothing is half-written.

One table, `BAD`: `"function: what is wrong" -> (call, exception, part of the message)`. Every public function has rows
in it. Mistakes that the other test files try, beside what is right, are not repeated here.
"""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vera_func as vf
from vera_func.cli.report import merge_advice
from vera_func.data import assets
from vera_func.data.examples import read_examples
from vera_func.data.models import load_base, read_note
from vera_func.io.bank import append_to_bank, export_adapters, import_adapters
from vera_func.io.checkpoint import CONFIG, WEIGHTS
from vera_func.merging.layer import merge_stochastic
from vera_func.merging.second_moments import calibrate_weights, second_moments
from vera_func.model.batch import num_adapters
from vera_func.train.distributed import map_sharded, mean_over_micro_batches
from vera_func.train.fit import batch_indices
from vera_func.train.optim import adamw_init, adamw_update, clip_by_norm, constant, global_norm, linear_warmup_cosine
from vera_func.train.sweep import sweep, sweep_table


NAN, INF = float("nan"), float("inf")
ones = torch.ones
BAD = {}


def bad(function, what, call, message, error=ValueError):
    """A row; `call` takes a folder of its own."""
    name = f"{function}: {what}"
    assert name not in BAD, name
    BAD[name] = (call, error, message)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def filled(params, value=1.0):
    return {key: torch.full_like(leaf, value) for key, leaf in params.items()}


ADAPTED = vf.adapt(model(), vf.VeraConfig(r=4, target_modules=["0", "2"]))
PARAMS, FROZEN, CONFIGURATION = filled(ADAPTED.params), ADAPTED.frozen, ADAPTED.config
STACK = vf.stack_adapters([PARAMS] * 3)
# One layer, 64 -> 32.
LAYER = {"lambda_b": ones(32), "lambda_d": ones(4)}
PAIR = vf.init_projections(4, 64, 32)
X = ones(3, 64)
Q4 = vf.quantize_4bit(torch.linspace(-1, 1, 2048).reshape(32, 64))
NESTED = vf.quantize_4bit(torch.linspace(-1, 1, 2048).reshape(32, 64), double_quant=True)
Q8 = vf.quantize_8bit(torch.linspace(-1, 1, 2048).reshape(32, 64))
ROWS = vf.quantize_4bit(torch.linspace(-1, 1, 1024).reshape(32, 32))  # blocks of 64 straddle its rows
QMODEL = nn.Sequential(vf.to_bnb(Q4))
QADAPTED = vf.adapt(QMODEL, vf.VeraConfig(r=4, target_modules=["0"]))


def forward(params=None, frozen=None, x=X, base=lambda x: x[..., :32], mask=None):
    return vf.vera_forward(LAYER | (params or {}), frozen or PAIR, x, base, dropout_mask=mask)


# ------------------------------------------------------------------------------------------------------- one layer

for r in (0, -1, 2.5, "4", None, True, INF):
    bad("init_params", f"r={r!r}", lambda _, r=r: vf.init_params(r, 3), f"r must be a positive integer, got {r!r}")
bad("init_params", "out=0", lambda _: vf.init_params(4, 0), "out_features must be a positive integer, got 0")
bad("init_params", "d of NaN", lambda _: vf.init_params(4, 3, NAN), "d_initial must be finite, got nan")
bad("init_params", "d of inf", lambda _: vf.init_params(4, 3, -INF), "d_initial must be finite, got -inf")
for dtype in (torch.int32, torch.bool, "float32"):
    bad(
        "init_params", f"dtype={dtype!r}", lambda _, dtype=dtype: vf.init_params(4, 3, dtype=dtype),
        f"dtype must be a floating-point dtype, got {dtype!r}",
    )  # fmt: skip
for size in (0, -3, 1.5, "4", None, True):
    bad(
        "init_projections", f"in={size!r}", lambda _, size=size: vf.init_projections(4, size, 3),
        f"in_features must be a positive integer, got {size!r}",
    )  # fmt: skip
bad("init_projections", "a key of text", lambda _: vf.init_projections(4, 3, 3, "1"), "key must be an integer seed")
bad("init_projections", "a huge key", lambda _: vf.init_projections(4, 3, 3, 2**70), "key must fit in 64 bits")

for p in (1.0, -0.5, NAN):
    bad(
        "dropout_mask", f"p={p}", lambda _, p=p: vf.dropout_mask(p, (2,), generator=torch.Generator()),
        f"p must be at least 0 and below 1, got {p}",
    )  # fmt: skip

bad("vera_forward", "a LoRA factor", lambda _: forward({"alpha": ones(())}), "keys 'lambda_b' and 'lambda_d'")
bad("vera_forward", "None for a vector", lambda _: forward({"lambda_d": None}), "lambda_d must be a tensor of floating")
bad("vera_forward", "a list", lambda _: forward({"lambda_d": [1.0] * 4}), "lambda_d must be a tensor.*got list")
bad("vera_forward", "integers", lambda _: forward({"lambda_d": ones(4).long()}), "lambda_d .*got torch.int64")
bad("vera_forward", "complex", lambda _: forward({"lambda_b": ones(32) + 0j}), "lambda_b .*got torch.complex64")
bad("vera_forward", "a scalar vector", lambda _: forward({"lambda_d": ones(())}), r"lambda_d \(\) must be")
bad("vera_forward", "another rank", lambda _: forward({"lambda_d": ones(5)}), r"implies rank 5, but vera_A \(4, 64\)")
bad("vera_forward", "one lambda_b for all", lambda _: forward({"lambda_b": ones(1)}), r"is for 1 outputs.*\(3, 32\)")
bad("vera_forward", "lambda_b too short", lambda _: forward({"lambda_b": ones(31)}), "is for 31 outputs")
bad("vera_forward", "a base of one output", lambda _: forward(base=lambda x: x[..., :1]), r"base_fn\(x\) is \(3, 1\)")
bad("vera_forward", "half a mixture", lambda _: forward({"mixture": ones(2)}), r"mixture \(2,\) must be \(\*rows, k\)")
bad("vera_forward", "half the pair", lambda _: forward(frozen={"vera_A": ones(4, 64)}), r"frozen lacks \['vera_B'\]")
bad("vera_forward", "a flat A", lambda _: forward(frozen=PAIR | {"vera_A": ones(4)}), r"vera_A \(4,\) .*must be")
bad("vera_forward", "a stack of A", lambda _: forward(frozen=PAIR | {"vera_A": ones(4, 64, 1)}), r"\(4, 64, 1\)")
bad("vera_forward", "a narrow A", lambda _: forward(frozen=vf.init_projections(4, 63, 32)), "layer is 64 -> 32, but")
bad(
    "vera_forward", "no data", lambda _: forward(frozen={k: v.to("meta") for k, v in PAIR.items()}),
    "are on meta and meta, but lambda_b and lambda_d on cpu",
)  # fmt: skip
bad("vera_forward", "a scalar x", lambda _: forward(x=ones(())), r"x must be a floating-point tensor .*got \(\)")
bad("vera_forward", "x of integers", lambda _: forward(x=X.long()), r"got \(3, 64\) torch.int64")
bad("vera_forward", "x as a list", lambda _: forward(x=[1.0] * 64), "got list")
bad("vera_forward", "x without features", lambda _: forward(x=ones(3, 0)), "positive in, here 0")
bad("vera_forward", "a mask for others", lambda _: forward(mask=ones(5)), r"dropout_mask \(5,\) does not broadcast")
for size in (0, -1):
    bad("delta_weight", f"in={size}", lambda _, n=size: vf.delta_weight(LAYER, PAIR, n), f"positive in, here {size}")
bad("delta_weight", "in of 65", lambda _: vf.delta_weight(LAYER, PAIR, 65), "were drawn for at most 64 -> 32")
bad("delta_weight", "no lambda_d", lambda _: vf.delta_weight({"lambda_b": ones(32)}, PAIR, 64), r"got \['lambda_b'\]")

# ------------------------------------------------------------------------------------------------ a quantized weight

for quantize in ("quantize_4bit", "quantize_8bit"):
    f = getattr(vf, quantize)
    bad(quantize, "a list", lambda _, f=f: f([[1.0]]), r"weight must be a tensor \(out, in\), got list")
    bad(quantize, "a module", lambda _, f=f: f(nn.Linear(2, 3)), "must be a tensor .*got Linear")
    bad(quantize, "complex", lambda _, f=f: f(ones(2, 64) + 0j), "float16, bfloat16 or float32, got torch.complex64")
    bad(quantize, "booleans", lambda _, f=f: f(ones(2, 64) > 0), "got torch.bool")
    bad(quantize, "no columns", lambda _, f=f: f(ones(2, 0)), r"both positive, got \(2, 0\)")
for kind in ("int4", None, 4, ["nf4"]):
    bad(
        "quantize_4bit", f"type {kind!r}", lambda _, kind=kind: vf.quantize_4bit(ones(2, 64), kind),
        f"quant_type must be 'nf4' or 'fp4', got {re.escape(repr(kind))}",
    )  # fmt: skip
for size in (0, -64, 63, 64.0, None, "64", [64]):
    bad(
        "quantize_4bit", f"blocksize {size!r}", lambda _, size=size: vf.quantize_4bit(ones(2, 64), "nf4", size),
        "blocksize must be one of .32, 64",
    )  # fmt: skip
for dtype in (torch.int64, torch.bool, torch.complex64, "uint8", None):
    bad(
        "quantize_4bit", f"storage {dtype}", lambda _, dtype=dtype: vf.quantize_4bit(ones(2, 64), quant_storage=dtype),
        "quant_storage must be one of",
    )  # fmt: skip
for dtype in (torch.complex64, torch.float8_e4m3fn, "bfloat16"):
    bad(
        "quantize_4bit", f"computing in {dtype}",
        lambda _, dtype=dtype: vf.quantize_4bit(ones(2, 64), compute_dtype=dtype), "compute_dtype must be None or one",
    )  # fmt: skip
bad("quantize_8bit", "an infinite threshold", lambda _: vf.quantize_8bit(ones(2, 64), threshold=INF), "got inf")
for dtype in (torch.int8, torch.bool, torch.complex64, "float32"):
    bad("dequantize", f"to {dtype}", lambda _, d=dtype: vf.dequantize(Q4, d), "dtype must be a floating-point dtype")
bad("dequantize", "a dense weight", lambda _: vf.dequantize(X), "expected a Quantized4bit or Quantized8bit .*Tensor")
bad("dequantize", "None", lambda _: vf.dequantize(None), "expected a Quantized4bit .* got NoneType")
# A value made by hand: the kernels would read past the end of these.
LIES = {
    "a larger shape": (Q4, {"shape": (64, 64)}, r"packs into 2048"),
    "too few scales": (Q4, {"absmax": Q4.absmax[:2]}, r"absmax must be \(32,\) torch.float32, got \(2,\)"),
    "smaller blocks": (Q4, {"blocksize": 32}, r"absmax must be \(64,\)"),
    "too few nested scales": (
        NESTED,
        {"nested": NESTED.nested._replace(scale=ones(0))},
        r"nested.scale must be \(1,\)",
    ),
    "one scale for all rows": (Q8, {"scale": ones(1)}, r"scale must be \(32,\)"),
    "codes of another shape": (Q8, {"codes": Q8.codes.T}, r"codes must be \(32, 64\)"),
}
for what, (q, change, message) in LIES.items():
    lying = dataclasses.replace(q, **change)
    bad("dequantize", what, lambda _, q=lying: vf.dequantize(q), message)
    bad("quantized_linear", what, lambda _, q=lying: vf.quantized_linear(q, ones(2, q.shape[1])), message)
    bad("to_bnb", what, lambda _, q=lying: vf.to_bnb(q), message)
bad("quantized_linear", "a dense weight", lambda _: vf.quantized_linear(X, X), "expected a Quantized4bit .* got Tensor")
bad("quantized_linear", "x of integers", lambda _: vf.quantized_linear(Q4, X.long()), "floating-point .*torch.int64")
bad("quantized_linear", "x complex", lambda _: vf.quantized_linear(Q4, X + 0j), "floating-point .*torch.complex64")
bad("quantized_linear", "x of booleans", lambda _: vf.quantized_linear(Q8, X > 0), "floating-point .*torch.bool")
bad("quantized_linear", "x as None", lambda _: vf.quantized_linear(Q4, None), "got NoneType")
bad("to_bnb", "a dense weight", lambda _: vf.to_bnb(X), "expected a Quantized4bit or Quantized8bit")
bad("from_bnb", "a plain layer", lambda _: vf.from_bnb(nn.Linear(2, 3)), "expected bitsandbytes' .*, got Linear")
bad("from_bnb", "None", lambda _: vf.from_bnb(None), "got NoneType")


def module_with(q, **state):
    module = vf.to_bnb(q)
    for name, value in state.items():
        setattr(module.weight.quant_state, name, value)
    return module


def without_scales():
    module = vf.to_bnb(Q8)
    module.weight.SCB = None
    return module


bad("from_bnb", "an odd blocksize", lambda _: vf.from_bnb(module_with(Q4, blocksize=100)), "blocksize must be one of")
bad("from_bnb", "an unknown type", lambda _: vf.from_bnb(module_with(Q4, quant_type="int4")), "quant_type must be")
bad("from_bnb", "a lying shape", lambda _: vf.from_bnb(module_with(Q4, shape=torch.Size([64, 64]))), "packs into 2048")
bad("from_bnb", "no row scales", lambda _: vf.from_bnb(without_scales()), "no row scales .SCB.")


# -------------------------------------------------------------------------------------------- a configuration, a model

for field, value, message in (
    ("r", 2**70, "r must be below 2"),
    ("target_modules", 5, "target_modules must be a name or a sequence of names, got 5"),
    ("target_modules", {"q": 1}, "target_modules must be a name or a sequence"),
    ("target_modules", "(a", "not a regular expression"),
    ("modules_to_save", 5, "modules_to_save must be a name or a sequence"),
    ("layers_to_transform", 1.5, "layers_to_transform must be an index or a sequence of them, got 1.5"),
    ("base_model_name_or_path", 5, "base_model_name_or_path must be a text or None, got 5"),
    ("revision", ["x"], "revision must be a text or None"),
    ("d_initial", 10**400, "d_initial must be finite"),
    ("d_initial", 1e308, "d_initial must be finite in float32"),
    ("vera_dropout", 10**400, "vera_dropout must be at least 0 and below 1"),
    ("bias", ["x_only"], "bias must be"),
    ("task_type", 5, "task_type must be None or one of"),
):
    bad("VeraConfig", f"{field}={str(value)[:12]}", lambda _, f=field, v=value: vf.VeraConfig(**{f: v}), message)
bad("VeraConfig", "a LoRA field", lambda _: vf.VeraConfig(lora_alpha=8), "lora_alpha", TypeError)
bad(
    "VeraConfig", "layers_pattern=(",
    lambda _: vf.VeraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern="("),
    r"layers_pattern='\(' is not a regular expression",
)  # fmt: skip
bad("adapt", "no model", lambda _: vf.adapt(None, CONFIGURATION), "model must be an nn.Module, got NoneType")
bad("adapt", "a dict", lambda _: vf.adapt(model(), {"r": 4}), "config must be vera_func's VeraConfig, got dict")
bad(
    "adapt", "integers", lambda _: vf.adapt(model(), CONFIGURATION, dtype=torch.int32), "dtype must be a floating-point"
)
bad("adapt", "no layers", lambda _: vf.adapt(nn.Sequential(), CONFIGURATION), "no module matches")
bad(
    "adapt", "a seed for a generator",
    lambda _: vf.adapt(model(), dataclasses.replace(CONFIGURATION, init_weights=False), generator=0),
    "generator=torch.Generator",
)  # fmt: skip


def apply(params=None, frozen=None, x=None):
    x = ones(2, 7) if x is None else x
    return ADAPTED.apply(PARAMS | (params or {}), FROZEN if frozen is None else frozen, x)


bad(
    "Adapted", "None for a vector", lambda _: apply({"0.lambda_b": None}), "'0.lambda_b' must be a tensor, got NoneType"
)
bad("Adapted", "a number", lambda _: apply({"0.lambda_b": 1.0}), "'0.lambda_b' must be a tensor, got float")
bad("Adapted", "integers", lambda _: apply({"0.lambda_b": ones(5).long()}), "lambda_b must be .*floating.*torch.int64")
bad("Adapted", "another layer's key", lambda _: apply({"1.lambda_b": ones(5)}), "unknown keys, first '1.lambda_b'")
bad("Adapted", "a transposed pair", lambda _: apply(frozen={k: v.T for k, v in FROZEN.items()}), "implies rank 4, but")
bad(
    "Adapted", "flat projections", lambda _: apply(frozen={k: v.flatten() for k, v in FROZEN.items()}), "must be .r, >="
)
bad("Adapted", "another rank", lambda _: apply(frozen=vf.init_projections(5, 7, 5)), r"vera_A \(5, 7\)")
bad("Adapted", "more than the pair", lambda _: apply(frozen=FROZEN | {"C": ones(2)}), "keys 'vera_A' and 'vera_B', got")
bad("Adapted", "a batch of another size", lambda _: apply(STACK), r"\(3, 5\) has leading axes \(3,\).*\(2, 7\)")
bad("Adapted", "x of integers", lambda _: apply(x=ones(2, 7).long()), "x must be a floating-point tensor")
bad(
    "Adapted", "dropout without randomness", lambda _: ADAPTED.apply.with_dropout(None), "torch.Generator, got NoneType"
)
bad("Adapted", "dropout from a seed", lambda _: ADAPTED.apply.with_dropout(0), "needs a torch.Generator, got int")
bad("to_module", "a stack", lambda _: vf.to_module(ADAPTED._replace(params=STACK)), "is stacked; a module holds one")
bad("to_module", "no vectors", lambda _: vf.to_module(ADAPTED._replace(params={})), "lacks 4 of its 4 keys")
bad("to_module", "no projections", lambda _: vf.to_module(ADAPTED._replace(frozen={})), r"'vera_B', got \[\]")
bad(
    "to_module",
    "a list",
    lambda _: vf.to_module(ADAPTED._replace(params=PARAMS | {"0.lambda_b": [1.0] * 5})),
    "got list",
)


def shell(kind="Linear", base=None, A=None, B=None, r=4, **options):
    base = nn.Linear(7, 5) if base is None else base
    return getattr(vf, kind)(base, "a", ones(4, 7) if A is None else A, ones(5, 4) if B is None else B, r, **options)


bad("Linear", "a 4-bit layer", lambda _: shell(base=vf.to_bnb(Q4)), "needs the shell Linear4bit")
bad("Linear4bit", "a dense layer", lambda _: shell("Linear4bit"), "a Linear needs the shell Linear")
bad("Linear8bitLt", "a 4-bit layer", lambda _: shell("Linear8bitLt", vf.to_bnb(Q4)), "needs the shell Linear4bit")
bad("Linear", "a convolution", lambda _: shell(base=nn.Conv1d(2, 3, 1)), "a Conv1d cannot be adapted")
bad("Linear", "r=0", lambda _: shell(r=0, A=ones(0, 7), B=ones(5, 0)), "r must be a positive integer, got 0")
bad("Linear", "another rank", lambda _: shell(r=5), r"vera_A \(4, 7\) .* do not fit a layer 7 -> 5 at rank 5")
bad("Linear", "a flat A", lambda _: shell(A=ones(4)), r"vera_A \(4,\)")
bad("Linear", "dropout=1", lambda _: shell(vera_dropout=1.0), "vera_dropout must be at least 0 and below 1")
bad("Linear", "dropout of NaN", lambda _: shell(vera_dropout=NAN), "vera_dropout must be at least 0 and below 1")
bad("Linear", "d of NaN", lambda _: shell(d_initial=NAN), "d_initial must be finite")
bad("Linear", "the delta of another", lambda _: shell().get_delta_weight("b"), "has the adapter 'a', not 'b'")
bad("Linear", "projections of another", lambda _: shell(A={"b": ones(4, 7)}), "'a'", KeyError)

# ----------------------------------------------------------------------------------------------------- many adapters

bad("stack_adapters", "one, not in a list", lambda _: vf.stack_adapters(PARAMS), r"pass \[params, ...\]")
bad("stack_adapters", "none", lambda _: vf.stack_adapters([]), "nothing to stack")
bad("stack_adapters", "dtypes", lambda _: vf.stack_adapters([{"a": ones(3)}, {"a": ones(3).half()}]), "one dtype and")
bad("stack_adapters", "devices", lambda _: vf.stack_adapters([{"a": ones(3)}, {"a": ones(3).to("meta")}]), "on meta in")
bad("stack_adapters", "None", lambda _: vf.stack_adapters([{"a": ones(3)}, {"a": None}]), "adapter 1 must be a tensor")
bad("unstack_adapters", "nothing", lambda _: vf.unstack_adapters({}), "stacked params are empty")
bad("unstack_adapters", "a scalar", lambda _: vf.unstack_adapters({"a": ones(())}), r"common leading axis.*\(\)")
bad(
    "unstack_adapters",
    "two sizes",
    lambda _: vf.unstack_adapters({"a": ones(2, 3), "b": ones(3, 3)}),
    r"'b' is \(3, 3\)",
)
bad("num_adapters", "a list", lambda _: num_adapters({"a": [1, 2]}), "'a' must be a tensor .n, ....*got list")
bad("num_adapters", "nothing", lambda _: num_adapters({}), "stacked params are empty")
for ids, message in (
    ([3], "adapter id 3 is out of range: there are 3 adapters"),
    ([-2], "adapter id -2 is out of range"),
    ([0.5], "must be integers, got torch.float32"),
    ([True], "must be integers, got torch.bool"),
    (0, r"must be \(rows,\), or \(rows, k\) for sums, got \(\)"),
    ([[[0]]], r"got \(1, 1, 1\)"),
    ([], "must be integers, got torch.float32"),
):
    bad("select_adapters", f"ids {ids}", lambda _, ids=ids: vf.select_adapters(STACK, ids), message)
bad("select_adapters", "weights of no sum", lambda _: vf.select_adapters(STACK, [0], [1.0]), "weights are for sums")
bad("select_adapters", "too few weights", lambda _: vf.select_adapters(STACK, [[0, 1]], [1.0]), r"must be \(1, 2\)")
for size in (0, -1, 1.5, "2"):
    bad(
        "vmap_adapters", f"chunks of {size!r}", lambda _, n=size: vf.vmap_adapters(ADAPTED.apply, chunk_size=n),
        f"chunk_size must be positive or None, got {size}",
    )  # fmt: skip
bad("vmap_adapters", "an Adapted", lambda _: vf.vmap_adapters(ADAPTED), "function of .params.*, got Adapted")
for dims in ("0", 1.5):
    bad(
        "vmap_adapters", f"in_dims={dims!r}", lambda _, d=dims: vf.vmap_adapters(ADAPTED.apply, d), "in_dims must be an"
    )
bad(
    "vmap_adapters",
    "an axis too far",
    lambda _: vf.vmap_adapters(ADAPTED.apply, 9)(STACK, FROZEN, ones(3, 2, 7)),
    "axis 9",
)
bad(
    "vmap_adapters",
    "two for three",
    lambda _: vf.vmap_adapters(ADAPTED.apply)(STACK, FROZEN, ones(2, 2, 7)),
    "3 adapters",
)
bad("pool_adapters", "none", lambda _: vf.pool_adapters([]), "nothing to pool")
bad("pool_adapters", "one, not in a list", lambda _: vf.pool_adapters(ADAPTED), "must be a sequence of Adapted")
bad("pool_adapters", "params", lambda _: vf.pool_adapters([PARAMS]), "must be a sequence of Adapted")
bad(
    "pool_adapters",
    "another model",
    lambda _: vf.pool_adapters([ADAPTED, vf.adapt(model(), CONFIGURATION)]),
    "another model",
)
bad(
    "pool_adapters",
    "a key too many",
    lambda _: vf.pool_adapters([ADAPTED._replace(params=PARAMS | {"9.lambda_b": ones(3)})]),
    "unknown keys",
)
bad(
    "pool_adapters",
    "no projections",
    lambda _: vf.pool_adapters([ADAPTED._replace(frozen={})]),
    "'vera_A' and 'vera_B'",
)
bad("pool_adapters", "a stack", lambda _: vf.pool_adapters([ADAPTED._replace(params=STACK)]), "is stacked; pool single")

# ---------------------------------------------------------------------------------------------------------- training


def update(**change):
    tree = {"p": ones(2)}
    options = {"grads": tree, "state": adamw_init(tree), "params": tree, "learning_rate": 0.1} | change
    return adamw_update(**options)


def train(**change):
    options = {"loss_fn": lambda p, batch: p["p"].sum(), "params": {"p": ones(2)}, "batches": int, "steps": 2}
    return vf.fit(**(options | {"learning_rate": 0.1, "progress": False} | change))


bad(
    "adamw_init",
    "integers",
    lambda _: adamw_init({"p": ones(2).long()}),
    r"params\['p'\] is torch.int64; only float",
)
for name, value, message in (
    ("learning_rate", NAN, "learning_rate must be at least 0, got nan"),
    ("learning_rate", -1.0, "learning_rate must be at least 0, got -1"),
    ("betas", (1.0, 0.9), "betas must be at least 0 and below 1, got 1.0"),
    ("betas", (0.9, 2.0), "betas must be at least 0 and below 1, got 2.0"),
    ("betas", (-0.1, 0.9), "betas must be at least 0 and below 1, got -0.1"),
    ("eps", -1.0, "eps must be at least 0"),
    ("eps", NAN, "eps must be at least 0, got nan"),
    ("weight_decay", -1.0, "weight_decay must be at least 0"),
):
    bad("adamw_update", f"{name}={value}", lambda _, k=name, v=value: update(**{k: v}), message)
bad("adamw_update", "gradients of another size", lambda _: update(grads={"p": ones(3)}), r"grads\['p'\] is \(3,\)")
bad("clip_by_norm", "a negative norm", lambda _: clip_by_norm({"p": ones(2)}, -1.0), "max_norm must be at least 0")
bad("clip_by_norm", "a norm of NaN", lambda _: clip_by_norm({"p": ones(2)}, NAN), "max_norm must be at least 0")
bad("clip_by_norm", "nothing", lambda _: clip_by_norm({}, 1.0), "the norm of an empty dict")
bad("global_norm", "nothing", lambda _: global_norm({}), "the norm of an empty dict")
bad("constant", "no step", lambda _: constant("a"), "data type 'str'", TypeError)
bad("linear_warmup_cosine", "no steps", lambda _: linear_warmup_cosine(0, warmup=0, total=0), "warmup=0, total=0")
bad("linear_warmup_cosine", "warmup=-1", lambda _: linear_warmup_cosine(0, warmup=-1, total=3), "warmup=-1")
bad("linear_warmup_cosine", "warmup of NaN", lambda _: linear_warmup_cosine(0, warmup=NAN, total=3), "warmup=nan")
for what, change, message in (
    ("betas of 1", {"betas": (1.0, 0.9)}, "betas must be at least 0 and below 1"),
    ("eps of NaN", {"eps": NAN}, "eps must be at least 0"),
    ("negative steps", {"steps": -1}, "steps=-1 counts all steps"),
    ("integers", {"params": {"p": ones(2).long()}}, "only floating-point numbers"),
    ("no adapters", {"num_adapters": 0}, "num_adapters=0, but"),
    ("a schedule below 0", {"schedule": lambda step: -1.0}, r"schedule\(0\) must be 0 or more, got -1.0"),
    ("a schedule of NaN", {"schedule": lambda step: NAN}, r"schedule\(0\) must be 0 or more, got nan"),
    ("a loss that is a number", {"loss_fn": lambda p, b: 1.0}, "as a tensor, got float"),
    ("a loss of nothing", {"loss_fn": lambda p, b: ones(())}, "does not depend on params; see that it is not detached"),
    ("a detached loss", {"loss_fn": lambda p, b: p["p"].sum().detach()}, "see that it is not detached"),
    ("a metric for others", {"evaluate": lambda p, step: ones(3)}, "evaluate must return one number"),
):
    bad("fit", what, lambda _, change=change: train(**change), message)
bad("fit", "no run to resume", lambda t: train(resume=t / "run"), "run", FileNotFoundError)
for what, change in (
    ("key=None", {"key": None}),
    ("2.5 rows", {"batch_size": 2.5}),
    ("2.5 examples", {"num_examples": 2.5}),
):
    options = {"num_examples": 5, "batch_size": 2, "key": 0} | change
    bad("batch_indices", what, lambda _, o=options: batch_indices(0, **o), "must be integers")
bad("batch_indices", "step -1", lambda _: batch_indices(-1, num_examples=5, batch_size=2, key=0), "step=-1")
bad("batch_indices", "no rows", lambda _: batch_indices(0, num_examples=5, batch_size=0, key=0), "batch_size=0")
for values in ("xy", [], 0.1):
    bad("sweep", f"{values!r}", lambda _, v=values: sweep({"a": v}), r"grid\['a'\] must be a list of values")
bad("sweep_table", "one of two", lambda _: sweep_table(sweep({"a": [1, 2]}), {"b": [1]}), "'b' must be .*2 values")
bad(
    "sweep_table",
    "a column twice",
    lambda _: sweep_table(sweep({"a": [1]}), {"a": [1]}),
    "'a' must be a new name",
)

# ----------------------------------------------------------------------------------------------------------- merging

MERGES = {
    "merge_quantized": vf.merge_quantized,
    "merge_dense": vf.merge_dense,
    "merge_report": vf.merge_report,
    "merge_calibrated": lambda *args: vf.merge_calibrated(*args, X),
    "merge_stochastic": lambda *args: merge_stochastic(*args, generator=torch.Generator()),
}
for name, f in MERGES.items():
    for what, params, frozen, message in (
        ("inf", LAYER | {"lambda_b": ones(32) / 0}, PAIR, r"lambda_b \(32,\) holds NaN or inf"),
        ("NaN in A", LAYER, PAIR | {"vera_A": ones(4, 64) * NAN}, r"vera_A \(4, 64\) holds NaN or inf"),
        ("no lambda_d", {"lambda_b": ones(32)}, PAIR, "keys 'lambda_b' and 'lambda_d', got"),
        ("a sum", LAYER | {"mixture": ones(())}, PAIR, "merge the parts of a sum one by one"),
        ("None", LAYER | {"lambda_d": None}, PAIR, "lambda_d must be a tensor, got NoneType"),
        ("integers", {k: v.long() for k, v in LAYER.items()}, PAIR, "must be a tensor of floating-point"),
        ("another layer", LAYER | {"lambda_b": ones(31)}, PAIR, r"lambda_b \(32,\) .*got \(31,\)"),
        ("half the pair", LAYER, {"vera_A": PAIR["vera_A"]}, r"frozen lacks \['vera_B'\]"),
    ):
        bad(name, what, lambda _, f=f, p=params, fr=frozen: f(Q4, p, fr), message)
bad(
    "merge_quantized",
    "a dense weight",
    lambda _: vf.merge_quantized(ones(32, 64), LAYER, PAIR),
    "is dense: merge_dense",
)
bad("merge_quantized", "overflow", lambda _: vf.merge_quantized(Q8, filled(LAYER, 1e4), PAIR), "overflows float16")
bad(
    "merge_dense",
    "to integers",
    lambda _: vf.merge_dense(Q4, LAYER, PAIR, torch.int8),
    "dtype must be a floating-point",
)
bad(
    "merge_dense",
    "overflow",
    lambda _: vf.merge_dense(Q4, filled(LAYER, 1e4), PAIR, torch.float16),
    "overflows torch.float16",
)
bad(
    "merge_dense",
    "a base of NaN",
    lambda _: vf.merge_dense(ones(32, 64) * NAN, LAYER, PAIR),
    "the base holds NaN or inf",
)
bad(
    "merge_report",
    "nothing to keep",
    lambda _: vf.merge_report(Q4, vf.init_params(4, 32), PAIR),
    "the adapter adds nothing",
)
for what, inputs in (("no inputs", ones(0, 64)), ("inputs of NaN", X * NAN), ("inputs of 0", X * 0)):
    bad("merge_report", what, lambda _, x=inputs: vf.merge_report(Q4, LAYER, PAIR, x), "does nothing to these inputs")
bad(
    "merge_report",
    "one row for all",
    lambda _: vf.merge_report(Q4, LAYER, PAIR, merged=ones(64)),
    r"merged is \(64,\), but",
)
bad(
    "merge_report",
    "transposed",
    lambda _: vf.merge_report(Q4, LAYER, PAIR, merged=ones(64, 32)),
    r"merged is \(64, 32\)",
)
bad(
    "merge_calibrated",
    "a scalar input",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, ones(())),
    r"must be .*64\), got \(\)",
)
bad("merge_calibrated", "inputs of NaN", lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, X * NAN), "contain NaN or inf")
bad("merge_calibrated", "no token", lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, ones(0, 64)), "one weight per token")
bad(
    "merge_calibrated",
    "half a gram",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, gram=ones(64, 64).triu()),
    "symmetric",
)
bad(
    "merge_calibrated",
    "a negative gram",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, gram=-torch.eye(64)),
    "gram must not",
)
bad(
    "merge_calibrated",
    "damping=-1",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, X, damping=-1),
    "damping must be positive",
)
bad(
    "merge_calibrated", "straddling", lambda _: vf.merge_calibrated(ROWS, LAYER, PAIR, ones(3, 32)), "straddle the rows"
)
bad("merge_stochastic", "straddling", lambda _: MERGES["merge_stochastic"](ROWS, LAYER, PAIR), "straddle the rows")
for to in ("int4", torch.int8, 4, True):
    wrong = f"to must be one of .*, got {to!r}"
    bad("merge", f"to {to}", lambda _, to=to: vf.merge(model(), PARAMS, FROZEN, to), wrong)
    bad("model_merge_report", f"to {to}", lambda _, to=to: vf.model_merge_report(ADAPTED, to), wrong)
bad("merge", "no vectors", lambda _: vf.merge(model(), {}, FROZEN), "no 'lambda_b' of any layer")
bad(
    "merge", "a list", lambda _: vf.merge(model(), PARAMS | {"0.lambda_d": [1.0]}, FROZEN), "must be a tensor, got list"
)
bad("merge", "NaN in the pair", lambda _: vf.merge(model(), PARAMS, filled(FROZEN, NAN)), "holds NaN or inf")
bad(
    "merge",
    "a weight for nothing",
    lambda _: vf.merge(model(), PARAMS, FROZEN, weights={"9": Q4}),
    "'9', which is no adapted",
)
bad(
    "model_merge_report",
    "inputs of nothing",
    lambda _: vf.model_merge_report(ADAPTED, "nf4", {"9": X}),
    "inputs has '9'",
)
bad(
    "model_merge_report",
    "inputs of others",
    lambda _: vf.model_merge_report(ADAPTED._replace(params=PARAMS), "nf4", {"0": X}),
    r"\(tokens, 7\)",
)
bad("merge_advice", "one report", lambda _: merge_advice(vf.MergeReport(1.0, 0.0, 1.0)), "by module, got MergeReport")
bad("second_moments", "no batches", lambda _: second_moments(ADAPTED, []), "nothing to calibrate with")
bad(
    "second_moments",
    "tensors",
    lambda _: second_moments(ADAPTED, [ones(2, 7)]),
    "mapping of the model's keyword arguments",
)
bad(
    "second_moments",
    "one batch",
    lambda _: second_moments(ADAPTED, {"input": ones(2, 7)}),
    "must be a mapping .*got str",
)
bad(
    "second_moments",
    "NaN",
    lambda _: second_moments(ADAPTED, [{"input": ones(2, 7) * NAN}]),
    "what '0' reads is not finite",
)
for what, readout in (
    ("detached", lambda y: y.detach()),
    ("elsewhere", lambda y: ones(2)),
    ("a number", lambda y: 1.0),
):
    bad(
        "second_moments", f"a readout {what}",
        lambda _, readout=readout: second_moments(ADAPTED, [{"input": ones(2, 7)}], readout=readout),
        "depends on no adapted layer",
    )  # fmt: skip
bad(
    "calibrate_weights",
    "dense",
    lambda _: calibrate_weights(ADAPTED, {}),
    "calibration is for 4-bit",
)
bad(
    "calibrate_weights",
    "no gram",
    lambda _: calibrate_weights(QADAPTED, {}),
    "nothing for '0'",
)
bad(
    "calibrate_weights", "second moments of others",
    lambda _: calibrate_weights(QADAPTED._replace(params=filled(QADAPTED.params)), {"0": torch.eye(32)}),
    r"need gram \(64, 64\), got \(32, 32\)",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- files


def export(folder, params=None, frozen=None, config=None, base=None, **options):
    params, frozen = PARAMS | (params or {}), FROZEN if frozen is None else frozen
    return vf.export_lora(folder / "lora", params, frozen, config or CONFIGURATION, base or model(), **options)


for rank in (0, 5, -1, 1.5, "2", True):
    bad(
        "export_lora",
        f"rank={rank!r}",
        lambda t, rank=rank: export(t, rank=rank),
        f"rank must be in 1 ... 4.*got {rank}",
    )
bad("export_lora", "NaN in the pair", lambda t: export(t, frozen=filled(FROZEN, NAN)), "'vera_A' holds NaN or inf")
bad("export_lora", "a dict for the config", lambda t: export(t, config={"r": 4}), "vera_func's VeraConfig, got dict")
bad("export_lora", "no pair", lambda t: export(t, frozen={}), r"keys 'vera_A' and 'vera_B', got \[\]")
bad(
    "export_lora",
    "a narrow A",
    lambda t: export(t, frozen=vf.init_projections(4, 5, 5)),
    r"vera_A \(4, 5\) is too narrow",
)
bad("export_lora", "a short B", lambda t: export(t, frozen=vf.init_projections(4, 7, 3)), "with out <= 3")
bad(
    "export_lora",
    "another rank",
    lambda t: export(t, config=dataclasses.replace(CONFIGURATION, r=2)),
    r"must be \(2,\)",
)
bad(
    "export_lora",
    "overflow",
    lambda t: export(t, filled(PARAMS, 1e38), filled(FROZEN, 1e38)),
    "overflows torch.float32",
)
bad(
    "export_lora",
    "another model",
    lambda t: export(t, base=nn.Sequential(nn.Linear(7, 6))),
    "needs lambda_b .6,.|'2.lambda_b'",
)


def save(folder, params=None, frozen=None, config=CONFIGURATION, name="default"):
    return vf.save_adapter(folder / "new", PARAMS | (params or {}), frozen or FROZEN, config, adapter_name=name)


bad(
    "save_adapter",
    "integers",
    lambda t: save(t, {"0.lambda_b": ones(5).long()}),
    "'0.lambda_b' is torch.int64, and must",
)
bad(
    "save_adapter",
    "no configuration",
    lambda t: save(t, config=None),
    "config must be vera_func's VeraConfig, got None",
)
bad("save_adapter", "a dict", lambda t: save(t, config={"r": 4}), "config must be vera_func's VeraConfig, got dict")
bad(
    "save_adapter",
    "flat projections",
    lambda t: save(t, frozen={k: v.flatten() for k, v in FROZEN.items()}),
    "vera_A|vera_B",
)
for name in (5, None, CONFIG, WEIGHTS):
    bad("save_adapter", f"the name {name!r}", lambda t, n=name: save(t, name=n), "adapter_name must be a plain name")


def occupied(folder):
    (folder / "new").write_text("a file")
    with pytest.raises(FileExistsError) as error:
        save(folder)
    assert (folder / "new").read_text() == "a file"
    (folder / "new").unlink()
    raise error.value


bad("save_adapter", "a file in the way", occupied, "new", FileExistsError)


def load(folder, tensors=None, fields=None, raw=None, metadata=None, **options):
    """Write an adapter, change what the files hold, and read it."""
    saved = vf.save_adapter(folder / "adapter", PARAMS, FROZEN, CONFIGURATION)
    changed = load_file(saved / WEIGHTS) | (tensors or {})
    save_file({k: v for k, v in changed.items() if v is not None}, saved / WEIGHTS, metadata)
    config = json.loads((saved / CONFIG).read_text()) | (fields or {})
    (saved / CONFIG).write_text(json.dumps(config))
    if raw is not None:
        (saved / WEIGHTS).write_bytes(raw)
    return vf.load_adapter(saved, model(), **options)


def stored(header, data=b"", length=None):
    """A safetensors file that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


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
for what, raw in RAW.items():
    empty = what == "no tensors"
    whole = "is not a whole safetensors file"
    bad("load_adapter", what, lambda t, raw=raw: load(t, raw=raw), rf"{WEIGHTS} {'lacks' if empty else whole}")

    def open_raw(folder, raw=raw):
        (folder / "bank").write_bytes(raw)
        return vf.open_bank(folder / "bank")

    def resume_raw(folder, raw=raw):
        (folder / "run").write_bytes(raw)
        return train(resume=folder / "run")

    bad("open_bank", what, open_raw, f"bank {'is a safetensors file, but not a bank' if empty else whole}")
    bad("fit", f"resuming from {what}", resume_raw, f"run {'is a run of other params' if empty else whole}")
LAMBDA = "base_model.model.0.vera_lambda_b"
for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
    bad(
        "load_adapter", f"vectors in {dtype}", lambda t, d=dtype: load(t, {LAMBDA: ones(5).to(d)}),
        rf"{WEIGHTS}: '.*0.vera_lambda_b' is {dtype}, and must be one of",
    )  # fmt: skip
bad(
    "load_adapter",
    "float64 beyond float32",
    lambda t: load(t, {LAMBDA: ones(5).double() * 1e300}),
    rf"{WEIGHTS}: '0.lambda_b' overflows torch.float32",
)
bad("load_adapter", "NaN", lambda t: load(t, {LAMBDA: ones(5) * NAN}), f"{WEIGHTS}: '.*vera_lambda_b' holds NaN or inf")
bad("load_adapter", "an empty vector", lambda t: load(t, {LAMBDA: ones(0)}), r"'0.lambda_b' of shape \(0,\).*\(5,\)")
for what, fields, message in (
    ("r of 2^70", {"r": 2**70}, "r must be below"),
    ("r beyond memory", {"r": 10**9}, r"which must be \(1000000000,\)"),
    ("a list for a type", {"peft_type": ["VERA"]}, r"peft_type \['VERA'\]"),
    ("a path for a module", {"target_modules": ["../../x"]}, "no module matches"),
    ("a dunder for a module", {"target_modules": ["__class__"]}, "no module matches"),
    ("a dict for a path", {"base_model_name_or_path": {"a": 1}}, "must be a text or None"),
    ("a field of the future", {"future_scaling": 2.0}, "future_scaling=2.0, which is unknown for VeRA"),
    ("the text NaN", {"d_initial": "NaN"}, "d_initial must be a number"),
    ("modules that are numbers", {"modules_to_save": [5]}, "modules_to_save must hold names"),
):
    bad(
        "load_adapter",
        what,
        lambda t, fields=fields: load(t, fields=fields),
        rf"{CONFIG}.*{message}|{WEIGHTS}.*{message}",
    )
for what, text in (("cut", "{"), ("a list", "[]"), ("of LoRA", '{"peft_type": "LORA"}')):
    bad(
        "load_adapter", f"a note of its configuration {what}",
        lambda t, text=text: load(t, metadata={"vera_func.config": text}), WEIGHTS,
    )  # fmt: skip
bad("load_adapter", "integers wanted", lambda t: load(t, dtype=torch.int8), "dtype must be a floating-point dtype")
bad("load_adapter", "no path", lambda _: vf.load_adapter(None, model()), "NoneType", TypeError)


def bank(folder, stacked=STACK, frozen=FROZEN, config=CONFIGURATION, names=("a", "b", "c")):
    return vf.save_bank(folder / "bank.safetensors", stacked, frozen, config, names)


def rewritten(folder, tensors=None, **metadata):
    """A bank whose tensors or metadata were changed; opened."""
    path = bank(folder)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | metadata
    changed = load_file(path) | (tensors or {})
    save_file({k: v for k, v in changed.items() if v is not None}, path, metadata)
    return vf.open_bank(path)


broken = STACK | {"0.lambda_b": STACK["0.lambda_b"] + torch.tensor([[0.0], [NAN], [0.0]])}
bad(
    "save_bank",
    "no adapters",
    lambda t: bank(t, {k: v[:0] for k, v in STACK.items()}, names=()),
    "stack has no adapters",
)
bad("save_bank", "NaN in one", lambda t: bank(t, broken), "'0.lambda_b' of 'b' holds NaN or inf; nothing was written")
bad("save_bank", "NaN in the pair", lambda t: bank(t, frozen=filled(FROZEN, NAN)), "'vera_A' holds NaN or inf")
bad("save_bank", "another rank", lambda t: bank(t, frozen=vf.init_projections(5, 7, 5)), r"vera_A \(5, 7\)")
bad("save_bank", "a short B", lambda t: bank(t, frozen=vf.init_projections(4, 7, 3)), "with out <= 3")
bad(
    "save_bank",
    "half a layer",
    lambda t: bank(t, {k: v for k, v in STACK.items() if k != "0.lambda_d"}),
    "not '0.lambda_d'",
)
bad(
    "save_bank",
    "integers",
    lambda t: bank(t, {k: v.long() for k, v in STACK.items()}),
    "is torch.int64, and must be one",
)
bad("save_bank", "targets not spelled out", lambda t: bank(t, config=vf.VeraConfig(r=4)), "must be spelled out")
bad("save_bank", "a text for names", lambda t: bank(t, names="abc"), r"sequence of names, got the text 'abc'")
bad("save_bank", "no folder", lambda t: bank(t / "none"), "bank.safetensors could not be written", OSError)
for what, tensors, message in (
    ("A of another rank", {"vera_A": ones(5, 7)}, r"vera_A \(5, 7\) .*must be \(4, in\)"),
    ("a flat A", {"vera_A": ones(28)}, r"vera_A \(28,\)"),
    ("B of another rank", {"vera_B": ones(5, 3)}, r"vera_B \(5, 3\)"),
    ("a short B", {"vera_B": ones(2, 4)}, "with out <= 2, as vera_B has"),
    ("lambda_d of another rank", {"0.lambda_d": ones(3, 9)}, r"'0.lambda_d' is \(3, 9\), and must be \(3, 4\)"),
    ("lambda_b with an axis more", {"0.lambda_b": ones(3, 2, 5)}, r"'0.lambda_b' is \(3, 2, 5\)"),
    ("integers", {"0.lambda_b": ones(3, 5).long()}, "'0.lambda_b' is I64, and must be"),
    ("half a layer", {"0.lambda_d": None}, "has '0.lambda_b', but not the other vector"),
):
    bad("open_bank", what, lambda t, tensors=tensors: rewritten(t, tensors), f"bank.safetensors.*{message}")
bad("open_bank", "a folder", lambda t: vf.open_bank(t), "it is a folder, and a bank is a file", FileNotFoundError)
bad("load_adapter", "a bank", lambda t: vf.load_adapter(bank(t), model()), "it is a file", FileNotFoundError)
bad("open_bank", "an empty name", lambda t: rewritten(t, names='["a", "b", ""]'), "list of different names")
other = json.dumps({"peft_type": "VERA", "r": 7, "target_modules": ["0"]})
bad("open_bank", "another rank", lambda t: rewritten(t, config=other), "by the configuration")
bad("open_bank", "an old format", lambda t: rewritten(t, format="vera_func.bank.0"), "not a bank of adapters")
bad("Bank", "a row too far", lambda t: vf.open_bank(bank(t)).read([5]), r"has no adapter 5; it holds 3: a, b, c\.$")
bad("Bank", "half a row", lambda t: vf.open_bank(bank(t)).read([1.5]), "has no adapter 1.5")
bad("Bank", "a text for names", lambda t: vf.open_bank(bank(t)).read("abc"), "sequence of names, got the text 'abc'")
bad("Bank", "another model", lambda t: vf.open_bank(bank(t)).adapted(nn.Linear(7, 5)), "adapts '0', which is no module")
bad("Bank", "a key too many", lambda t: rewritten(t, {"x": ones(3, 2)}).adapted(model()), r"'x' \(3, 2\) does not fit")
bad(
    "Bank", "projections too narrow for a model",
    lambda t: apply(frozen=rewritten(t, {"vera_A": ones(4, 6)}).frozen()), "were drawn for at most 6 -> 5",
)  # fmt: skip


def append(folder, stacked=STACK, names=("d", "e", "f"), **options):
    """Append, and see that the bank is as it was."""
    path = bank(folder)
    before = path.read_bytes()
    try:
        return append_to_bank(path, stacked, names, **options)
    finally:
        assert path.read_bytes() == before


bad("append_to_bank", "NaN", lambda t: append(t, broken), "'0.lambda_b' of 'e' holds NaN or inf")
bad(
    "append_to_bank",
    "too few names",
    lambda t: append(t, names=["d"]),
    "3 adapters need as many different names, got 1",
)
bad("append_to_bank", "a name twice", lambda t: append(t, names=["a", "d", "e"]), "has an adapter 'a' already")
bad(
    "append_to_bank",
    "no bank",
    lambda t: append_to_bank(t / "none", STACK, "abc"),
    "there is no bank",
    FileNotFoundError,
)
bad(
    "export_adapters",
    "an unknown name",
    lambda t: export_adapters(vf.open_bank(bank(t)), t / "out", ["z"]),
    "no adapter 'z'",
)
hostile = ("a", "../b", "c")
bad(
    "export_adapters", "a path for a name",
    lambda t: export_adapters(vf.open_bank(bank(t, names=hostile)), t / "out", ["../b"]),
    "adapter_name must be a plain name, got '../b'",
)  # fmt: skip
bad("import_adapters", "nothing", lambda t: import_adapters(t / "bank", {}, model()), "nothing to import")
bad(
    "import_adapters",
    "no folder",
    lambda t: import_adapters(t / "bank", {"a": t / "x"}, model()),
    "no adapter directory",
    FileNotFoundError,
)
bad(
    "import_adapters",
    "an empty folder",
    lambda t: import_adapters(t / "bank", {"a": t}, model()),
    "has no adapter_config",
    FileNotFoundError,
)

# What the commands read beside: the note, labelled texts, a model, an archive.
for what, text, message in (
    ("empty", "", "is not JSON"),
    ("a list", "[]", "must hold a JSON object, got list"),
    ("labels of numbers", '{"labels": [5]}', "labels a list of texts"),
    ("a list for a prompt", '{"prompt": ["a"]}', "quant and prompt must be texts"),
    ("deep", "[" * 100_000, "is not JSON"),
):

    def note(folder, text=text):
        (folder / "vera_func.json").write_text(text)
        return read_note(folder)

    bad("read_note", what, note, f"vera_func.json.*{message}")
for what, suffix, content, message in (
    ("binary", ".csv", b"\xff\xfe\x00", "is not UTF-8"),
    ("a cut line", ".jsonl", b'{"text": "a", "la', "line 1 is not JSON"),
    ("a deep line", ".jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ("one label", ".csv", b"text,label\na,b\n", "at least two labels"),
):

    def texts(folder, suffix=suffix, content=content):
        (folder / f"data{suffix}").write_bytes(content)
        return read_examples(folder / f"data{suffix}")

    bad("read_examples", what, texts, f"data{suffix}.*{message}")
bad("load_base", "an unknown format", lambda t: load_base(str(t), quant="int4"), "quant must be one of .*got 'int4'")
bad("load_base", "an empty folder", lambda t: load_base(str(t)), "holds no model: no config.json")
bad("load_base", "no folder", lambda t: load_base(str(t / "x")), "there is no folder", FileNotFoundError)


# ------------------------------------------------------------------------------------------- arithmetic of adapters

bad("scale_adapter", "NaN", lambda _: vf.scale_adapter(PARAMS, NAN), "factor must be finite, got nan")
bad(
    "scale_adapter",
    "a head of its own",
    lambda _: vf.scale_adapter({"head.weight": X}, 2.0),
    "'head.weight' is no vector",
)
bad("add_adapters", "none", lambda _: vf.add_adapters([]), "at least one adapter")
bad("add_adapters", "stacked", lambda _: vf.add_adapters([STACK, STACK]), "single adapters")
bad("add_adapters", "weights of another number", lambda _: vf.add_adapters([PARAMS], [1, 2]), "got 1 and 2")
bad("add_adapters", "NaN", lambda _: vf.add_adapters([PARAMS, PARAMS], [1, NAN]), "weights must be finite")
bad(
    "mean_over_micro_batches",
    "no parts",
    lambda _: mean_over_micro_batches(lambda part: ({}, X), [], weight=len),
    "nothing to average",
)
bad("map_sharded", "no function", lambda _: map_sharded(None, [1]), "function must be callable, got NoneType")
bad("map_sharded", "a number of items", lambda _: map_sharded(abs, 3), "items must be iterable, got int")
bad("dequantize_model", "a state dict", lambda _: vf.dequantize_model(QMODEL.state_dict()), "got OrderedDict")
bad("dequantize_model", "integers", lambda _: vf.dequantize_model(QMODEL, torch.int8), "got torch.int8")
bad(
    "mean_over_micro_batches",
    "padding alone",
    lambda _: mean_over_micro_batches(lambda part: ({}, ones(())), [1, 2], weight=lambda part: 0),
    "none of the 2 parts",
)

# --------------------------------------------------------------------------------------------------------- the tests

bad("validate", "a tensor", lambda _: vf.validate(X), "got Tensor")
bad("num_parameters", "params", lambda _: vf.num_parameters(PARAMS), "must be an Adapted, .*got dict")
bad("quantize_model", "unknown format", lambda _: vf.quantize_model(model(), "int3"), "must be one of .*got 'int3'")
bad("quantize_model", "no linears", lambda _: vf.quantize_model(nn.Sequential(nn.ReLU()), "nf4"), "no nn.Linear")
bad("save_fit", "no run", lambda path: vf.save_fit(path / "run", PARAMS), "must be a Fit, .*got dict")
bad("load_fit", "no file", lambda path: vf.load_fit(path / "run", PARAMS), "No such file", FileNotFoundError)

# Records of results, which nobody but this library makes; their fields are read where they are used.
NO_ROWS = {"MergeReport", "Fit", "Apply", "Quantized4bit", "Quantized8bit"}


@pytest.mark.parametrize("case", BAD)
def test_is_refused(case, tmp_path):
    call, error, message = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message) as raised:
            call(tmp_path)
    assert type(raised.value) is error or error is OSError, type(raised.value)
    text = str(raised.value)
    assert 10 < len(text) < 600 or error is KeyError, text
    assert not [path.name for path in tmp_path.rglob("*") if path.name.startswith(".") or path.name in ("new", "lora")]


def test_there_are_many():
    assert len(BAD) >= 150


def test_every_public_function_is_tried():
    tried = {name.partition(":")[0] for name in BAD}
    assert {*vf.__all__} - tried == NO_ROWS
    assert not NO_ROWS & tried


def test_a_wrong_download_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setenv("VERA_FUNC_CACHE", str(tmp_path / "cache"))

    def evil(asset, folder):
        (folder / asset.filename).write_bytes(b"evil")
        return folder / asset.filename

    with pytest.raises(ValueError, match=rf"{assets.SNIPPETS.filename} .*expected SHA-256 {assets.SNIPPETS.sha256}"):
        assets.fetch(assets.SNIPPETS, evil)
    assert not list((tmp_path / "cache").iterdir())

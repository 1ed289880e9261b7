"""Decoding SmolLM2 in nf4, a token a row: against the bare base here and in bitsandbytes, PEFT, and llama.cpp."""

import copy
import tempfile

import peft
import torch

import vera_func as vf
from vera_func.data.assets import fetch_model
from vera_func.data.smollm2 import SMOLLM2, load_smollm2

from .common import bare, interleave, table


CONFIG = {"r": 256, "target_modules": ["q_proj", "v_proj"]}
PROMPT, STEPS = 30, 8


def run(dtype):
    """Print a row for one adapter on one row, and for 32 adapters on 32 rows."""
    model, _ = load_smollm2(dtype, "nf4")
    theirs = {
        "bitsandbytes": copy.deepcopy(model).eval(),
        "PEFT": peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(**CONFIG)).eval(),
    }
    title = f"Decoding SmolLM2-135M in nf4 after {PROMPT} tokens, r 256 on q and v, {str(dtype)[6:]}"
    table(title, [measure(model, theirs, dtype, n) for n in (1, 32)])


def measure(model, theirs, dtype, n):
    """One row: milliseconds a token, `n` adapters on a row each."""
    ids = torch.randint(100, 1000, (n, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    adapted = vf.adapt(model, vf.VeraConfig(**CONFIG))
    rounded = vf.adapt(model, vf.VeraConfig(**CONFIG), product_dtype=torch.bfloat16)
    fused, rounded_fused = (one.apply.with_fused_weights() for one in (adapted, rounded))
    params = adapted.params if n == 1 else vf.stack_adapters([adapted.params] * n)
    calls = {
        "bare": bare(adapted.apply),
        "bare fused": bare(fused),
        "here": lambda ids, **options: adapted.apply(params, adapted.frozen, input_ids=ids, **options),
        "here fused": lambda ids, **options: fused(params, adapted.frozen, input_ids=ids, **options),
        "here 16": lambda ids, **options: rounded.apply(params, rounded.frozen, input_ids=ids, **options),
        "here 16 fused": lambda ids, **options: rounded_fused(params, rounded.frozen, input_ids=ids, **options),
    }
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")  # which the command line chooses for short texts in bfloat16
    eager_apply = vf.adapt(eager, vf.VeraConfig(**CONFIG), product_dtype=torch.bfloat16).apply.with_fused_weights()
    calls["here 16 eager"] = lambda ids, **options: eager_apply(params, rounded.frozen, input_ids=ids, **options)
    for name, module in theirs.items():
        calls[name] = lambda ids, module=module, **options: module(input_ids=ids, **options)
    decoders = {name: _decoder(call, ids) for name, call in calls.items()}
    best = interleave(decoders | _llama_cpp(ids[0].tolist(), adapted))
    tokens = n * STEPS
    row = {
        "adapters x rows": f"{n} x {n}",
        "here / bare": best["here"] / best["bare"],
        "here / bare, fused weights": best["here fused"] / best["bare fused"],
        "16-bit products / bare": best["here 16"] / best["bare"],
        "16-bit products / bare, fused weights": best["here 16 fused"] / best["bare fused"],
        "fused weights / bare bitsandbytes": best["here fused"] / best["bitsandbytes"],
        "16-bit products, fused weights / bare bitsandbytes": best["here 16 fused"] / best["bitsandbytes"],
        "fused weights / PEFT, one adapter": best["here fused"] / best["PEFT"],
        "here, ms a token": 1e3 * best["here"] / tokens,
        "16-bit products, fused, ms a token": 1e3 * best["here 16 fused"] / tokens,
        "the same with eager attention, ms a token": 1e3 * best["here 16 eager"] / tokens,
    }
    if "llama.cpp" in best:
        fastest = min(value for name, value in best.items() if name.startswith("here"))
        row["llama.cpp, one row after another, ms a token"] = 1e3 * best["llama.cpp"] / STEPS
        row["llama.cpp / fastest here"] = (best["llama.cpp"] / STEPS) / (fastest / tokens)
    return row


def _decoder(call, ids):
    """A function that decodes `STEPS` tokens of each row after the prompt, which is computed once."""
    with torch.no_grad():
        prompt = call(ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def decode():
        cache = copy.deepcopy(prompt)
        for i in range(PROMPT, PROMPT + STEPS):
            cache = call(ids[:, i : i + 1], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    return decode


def _llama_cpp(ids, adapted):
    """The same steps of one row with one adapter, by llama.cpp on the file that SmolLM2 was made from."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return {}
    threads = torch.get_num_threads()
    file = fetch_model() / SMOLLM2.members[0].rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        lora = vf.export_lora(f"{folder}/lora.gguf", *adapted[1:], adapted.apply.model, format="gguf").path
        options = {"n_ctx": 64, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        model = Llama(str(file), lora_path=str(lora), **options)
    model.eval(ids[:PROMPT])

    def decode():
        model.n_tokens = PROMPT
        for token in ids[PROMPT:]:
            model.eval([token])

    return {"llama.cpp": decode}

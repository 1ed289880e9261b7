"""What the benchmarks share: a Llama-shaped model, fair timing in one process, and the machine's name."""

import platform
import time

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import vera_func as vf


logging.set_verbosity_error()
FLAGS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def machine():
    """The processor's name and what of it decides the speed of matrix products."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    capabilities = torch.cpu.get_capabilities()
    flags = [flag for flag in FLAGS if capabilities.get(flag)]
    text = f"{name}, {torch.get_num_threads()} threads, {' '.join(flags)}, torch {torch.__version__}"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def llama(width=1024, layers=6, dtype=torch.bfloat16, quant="nf4", device="cpu", vocab=512, *, kv_heads=None, mlp=None):
    """A model with random weights, its linears in `quant`, in training mode so that PEFT can differentiate it."""
    heads = max(1, width // 128 if width > 2048 else width // 64)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp or int(2.75 * width), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    quantize = {"nf4": vf.quantize_4bit, "int8": vf.quantize_8bit}.get(quant)
    # Empty at first, so that a large model is never there in full precision.
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for name, module in list(model.named_modules()):
        if quantize and isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            weight = 0.02 * torch.randn(module.weight.shape, dtype=dtype, device=device)
            model.get_submodule(parent).register_module(child, vf.to_bnb(quantize(weight)))
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.ones if parameter.dim() == 1 else torch.randn
                scale = 1.0 if parameter.dim() == 1 else 0.02
                value = scale * value(parameter.shape, dtype=dtype, device=device)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.train()


def bare(apply):
    """`(ids, **options) -> output` of the base alone, through the same module tree with the shells taken out."""
    tree = apply.trees.copy()
    for name in apply.targets:
        parent, _, child = f"model.{name}".rpartition(".")
        tree.get_submodule(parent).register_module(child, tree.get_submodule(f"model.{name}").base_layer)

    def forward(ids, **options):
        return functional_call(tree, {}, ("__call__", (), {"input_ids": ids, **options}))

    return forward


def train_step(loss, params):
    """The gradient of `loss(params)` by plain autograd."""
    leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
    return torch.autograd.grad(loss(leaves), list(leaves.values()))


def interleave(functions, repeats=20, seconds=30.0):
    """Minimum seconds of each function, taken in turns, so that a busy moment of the machine hits all alike.

    With one thread (`OMP_NUM_THREADS=1`) and no GPU these are seconds of the process, which others disturb less.
    """
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if one_thread else time.perf_counter
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    deadline = time.perf_counter() + seconds
    for _ in tqdm(range(repeats), leave=False):
        for name, function in functions.items():
            _synchronize()
            start = clock()
            function()
            _synchronize()
            best[name] = min(best[name], clock() - start)
        if time.perf_counter() > deadline:
            break
    return best


def table(title, rows):
    """Print rows (dicts with the same keys) as Markdown."""
    keys = list(rows[0])
    print(f"\n{title}\n\n| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())} |")


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

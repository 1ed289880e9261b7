"""The main job from end to end: a quantized language model, a VeRA adapter, held-out accuracy.

frozen nf4 model -> adapt -> fit with torch.func.grad -> PEFT directory -> loaded back, same logits
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .assets import load_smollm2, load_snippets, quiet_transformers
from .checkpoint import load_adapter, save_adapter
from .config import VeraConfig
from .examples import polar_examples, read_examples, split
from .model import adapt
from .optim import linear_warmup_cosine
from .quantized import is_bnb_linear, quantize_4bit, quantize_8bit, to_bnb
from .sentiment import (
    accepted_arguments,
    accuracy,
    answer_ids,
    answer_logits,
    answer_loss,
    encode,
    train_batches,
)
from .train import fit


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZERS: dict[str, Callable[[Tensor], Any]] = {
    "nf4": partial(quantize_4bit, quant_type="nf4"),
    "fp4": partial(quantize_4bit, quant_type="fp4"),
    "int8": quantize_8bit,
}
HELD_OUT, MAX_STEPS, MIN_STEPS = 1000, 100, 50


class DemoResult(NamedTuple):
    """What a demo measured.

    Attributes:
        before: Share of held-out examples that the model answers rightly without an adapter.
        after: The same with the trained adapter.
        held_out: Number of those examples.
        trained: Number of trained values.
        seconds: Duration of the training alone.
        difference: Largest absolute difference between logits before saving and after loading.
        out: Where the adapter lies.
    """

    before: float
    after: float
    held_out: int
    trained: int
    seconds: float
    difference: float
    out: Path


def demo(
    *,
    model: str | None = None,
    data: str | Path | None = None,
    quant: str = "nf4",
    r: int = 256,
    targets: Sequence[str] | None = None,
    steps: int | None = None,
    out: str | Path = "vera-demo",
    seed: int = 0,
    learning_rate: float = 2e-2,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Quantize a causal language model, train a VeRA adapter to classify texts, save and reload it.

    Held out are 1,000 examples, or a fifth of them if there are fewer than 5,000.

    Args:
        model: A local folder or a hub id; None is SmolLM2-135M-Instruct, from PyPI.
        data: A JSONL or CSV file with text and label; None is rated movie snippets, from PyPI.
        quant: "nf4", "fp4", "int8" or "none".
        r: Rank of the projections.
        targets: Ends of names of the modules to adapt; None is PEFT's choice for the model type.
        steps: Training steps; None is one epoch, but between 50 and 100.
        out: Folder for the adapter, in PEFT's format.
        seed: Of the split, the order and the projections.
        learning_rate: At the beginning; it falls along a cosine. VeRA wants a large one.
        batch_size: Examples in a step.
        dtype: Of what is not quantized, and of the arithmetic; None is `native_dtype()`.
        progress: Shows progress bars.
        say: What to do with each line of the report.

    Raises:
        ValueError: If an option or the data cannot be used.
        OSError: If a file, the model, or (ConnectionError) the network is missing.
        RuntimeError: If the loaded adapter does not give the logits of the saved one.
    """
    if quant != "none" and quant not in QUANTIZERS:
        raise ValueError(f"quant must be one of {[*QUANTIZERS, 'none']}, got {quant!r}.")
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out must be a folder, or not there yet; {out} is a file.")
    # The cheap steps first: a bad row should not cost the time to load a model.
    examples = read_examples(data) if data is not None else polar_examples(load_snippets("movie"))
    train, test = split(examples, min(HELD_OUT, -(-len(examples) // 5)), seed=seed)
    labels = sorted({example.label for example in examples})

    dtype = dtype or native_dtype()
    dense, tokenizer = load_smollm2(dtype) if model is None else _load(model, dtype)
    answers = answer_ids(tokenizer, labels)
    base = dense if quant == "none" else quantize_model(dense, quant)
    del dense
    say(_describe(model or "SmolLM2-135M-Instruct", base, quant, dtype))

    pad_id = tokenizer.pad_token_id or 0
    batches = train_batches(encode(tokenizer, train, labels), batch_size, seed=seed, pad_id=pad_id)
    if steps is None:
        steps = min(max(len(train) // batch_size, MIN_STEPS), MAX_STEPS)
    config = VeraConfig(
        base_model_name_or_path=model or "HuggingFaceTB/SmolLM2-135M-Instruct",
        task_type="CAUSAL_LM",
        r=r,
        target_modules=list(targets) if targets is not None else None,
        projection_prng_key=seed,
    )
    apply, params, frozen, config = adapt(base, config)
    accepts = accepted_arguments(base)

    def logits_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return answer_logits(partial(apply, params, frozen), batch, accepts)

    def loss_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return answer_loss(logits_fn(params, batch), batch["label"], answers)

    encoded = encode(tokenizer, test, labels)
    measure = partial(accuracy, rows=encoded, answers=answers, pad_id=pad_id)
    before = measure(partial(logits_fn, params), progress=_bar("before", progress))
    say(f"Before: {before:.1%} of {len(test):,} held-out texts answered rightly.")

    start = time.perf_counter()
    run = fit(
        loss_fn,
        params,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        schedule=partial(linear_warmup_cosine, warmup=0, total=steps),
        max_norm=1.0,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    values = sum(leaf.numel() for leaf in run.params.values())
    size = sum(leaf.numel() * leaf.element_size() for leaf in run.params.values())
    say(
        f"Trained {values:,} numbers ({size / 1024:,.0f} KiB) in {steps} steps on "
        f"{min(steps * batch_size, len(train)):,} texts and {seconds:.0f} s."
    )
    after = measure(partial(logits_fn, run.params), progress=_bar("after", progress))
    say(f"After: {after:.1%} of the same {len(test):,}.")

    save_adapter(out, run.params, frozen, config)
    difference = _reload_difference(out, base, run.params, frozen, apply, batches(0), accepts)
    say(f"Saved in {out}, loaded back: the logits differ by at most {difference:.1g}.")
    say(
        f'Next: vera_func.load_adapter("{out}", model) or peft.PeftModel.from_pretrained(model, '
        f'"{out}"); your own texts: vera-func demo --data reviews.csv'
    )
    return DemoResult(before, after, len(test), values, seconds, difference, Path(out))


def native_dtype() -> torch.dtype:
    """bfloat16 on a CPU that multiplies it in hardware, float32 elsewhere: 9 times faster there.

    Hardware means AVX512-BF16, AMX, or the bf16 extension of ARM. Without it PyTorch emulates: the
    product (700, 576) x (576, 576) takes 24 ms in bfloat16 and 2.5 ms in float32 on two AVX2 cores.
    """
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def quantize_model(model: "PreTrainedModel", quant: str, skip: Sequence[str] = ("lm_head",)) -> "PreTrainedModel":
    """A copy of a model whose `nn.Linear`s are bitsandbytes modules; all other tensors are shared.

    The model itself stays as it is, and so do linears that are bitsandbytes' already. The head is
    left alone by default: it is often the embedding.

    Args:
        model: Any module.
        quant: "nf4", "fp4" or "int8".
        skip: Ends of the names of modules to leave as they are.

    Raises:
        ValueError: If nothing was quantized.
    """
    shared = {id(leaf): leaf for leaf in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, memo=shared)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not is_bnb_linear(module)  # a subclass
        and not f".{name}".endswith(tuple(f".{end}" for end in skip))
    }
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize, {list(skip)} aside.")
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        q = QUANTIZERS[quant](linear.weight.detach())
        new.get_submodule(parent).register_module(child, to_bnb(q, linear.bias))
    return new


def _load(model: str, dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers takes a folder that is not there for a malformed hub id.
    if (Path(model).is_absolute() or model.startswith(".")) and not Path(model).is_dir():
        raise FileNotFoundError(f"there is no folder {model} to load a model from.")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(model)
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval(), tokenizer


def _describe(name: str, model: nn.Module, quant: str, dtype: torch.dtype) -> str:
    leaves = {id(leaf): leaf for leaf in (*model.parameters(), *model.buffers())}
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    what = "not quantized" if quant == "none" else f"linears in {quant}"
    return f"Model: {name}, {what}, {size / 2**20:,.0f} MiB; arithmetic in {str(dtype)[6:]}."


def _bar(title: str, progress: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    if not progress:
        return iter
    from tqdm import tqdm

    return partial(tqdm, desc=title, unit="batch", leave=False)


def _reload_difference(
    path: str | Path,
    base: nn.Module,
    params: dict[str, Tensor],
    frozen: dict[str, Tensor],
    apply: Callable[..., Any],
    batch: dict[str, Tensor],
    accepts: frozenset[str],
) -> float:
    loaded = load_adapter(path, base)
    with torch.no_grad():
        expected = answer_logits(partial(apply, params, frozen), batch, accepts)
        got = answer_logits(partial(loaded.apply, loaded.params, loaded.frozen), batch, accepts)
    difference = (got - expected).abs().max().item()
    if not difference <= 1e-3 * expected.abs().max().item():
        raise RuntimeError(
            f"the adapter loaded from {path} gives other logits than the trained one, by up to "
            f"{difference:.3g}: the file or the model changed in between."
        )
    return difference

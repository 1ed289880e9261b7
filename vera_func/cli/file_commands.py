"""Commands that read and write adapters: merge, export-lora, inspect, convert, push."""

from typing import Annotated, Any, Literal

import typer

from . import options as o
from .groups import AdapterOptions, BaseOptions, dtype_of


def merge(
    *,
    to: Annotated[o.Format, o.format_option("Format of the merged weights")],
    out: Annotated[str, o.folder("Folder for the merged model and its tokenizer.")],
    adapters: AdapterOptions,
    base: BaseOptions,
    calibrate: Annotated[
        bool,
        o.option("--calibrate", help="Choose the 4-bit codes that change the predictions on --data least."),
    ] = False,
    data: o.ExamplesOrReviews = None,
    prompt: o.Prompt = None,
    json: o.Json = False,
) -> None:
    """Merge an adapter into the weights of its base model, and report how much of the update is retained.

    Requantizing discards updates below half a quantization step. Calibrated
    (GPTQ-style) merging into nf4 or fp4 preserves such updates. For calibration,
    pass at least 200 examples with --data (default: the demo's training reviews).

    Example:
      vera-func merge --adapter vera-demo --to bfloat16 --out merged
      vera-func merge --adapter vera-demo --to nf4 --calibrate --out merged
    """
    from rich.text import Text

    from ..data.examples import demo_examples, read_examples, split_examples
    from .exports import merge_to
    from .inspection import summarize_reports
    from .report import COLUMNS, make_table, show_result

    if (data or prompt) and not calibrate:
        raise ValueError("--data and --prompt require --calibrate: pass --calibrate as well.")
    source = adapters.open(base.model, one=True)
    examples = None
    if calibrate:
        examples = read_examples(data) if data else split_examples(demo_examples(), seed=0)[0]
    done = merge_to(source, base.load(source), to, out, calibrate=examples, prompt=prompt)
    following = f"vera-func evaluate --model {out}{' --data FILE' if source.metadata.kind else ''}"
    shown: list[Any] = [Text(done["advice"]), f"The merged model is in {out}. Next: {following}"]
    if "modules" in done:
        shown = [make_table(summarize_reports(done["modules"])), COLUMNS, *shown]
    show_result(done, json, *shown)


def export_lora(
    *,
    out: Annotated[str, o.folder("Folder for the LoRA, or a .gguf file.")],
    adapters: AdapterOptions,
    base: BaseOptions,
    rank: Annotated[
        int | None, o.number("--rank", help="Rank of the LoRA (default: the adapter's r, for which the LoRA is exact).")
    ] = None,
    format: Annotated[
        Literal["peft", "gguf"], o.option("--format", help="File format of the LoRA: peft, or gguf for llama.cpp.")
    ] = "peft",
    json: o.Json = False,
) -> None:
    """Export an adapter as a LoRA, for PEFT, vLLM, SGLang or llama.cpp.

    The factors of the LoRA are A' = diag(lambda_d) A and B' = diag(lambda_b) B.
    The LoRA is exact unless --rank is lower than the adapter's r. The command
    also reports which inference servers would refuse the LoRA, and why.

    Example:
      vera-func export-lora --adapter vera-demo --out my-lora
      vera-func export-lora --adapter vera-demo --out my.gguf --format gguf
    """
    from .exports import lora_of
    from .report import describe, show_result

    source = adapters.open(base.model, one=True)
    done = lora_of(source, base.load(source), out, rank, format)
    show_result(done, json, *describe(done))


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A PEFT directory, an adapter bank, or a model folder.")],
    name: o.Names = None,
    model: o.ModelToMerge = None,
    quant: o.Quant = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    to: Annotated[
        o.Format | None, o.format_option("Format of the merged weights (default: the format of the model)", o.MODEL)
    ] = None,
    r: o.Rank = 256,
    targets: o.Targets = None,
    json: o.Json = False,
) -> None:
    """Describe an adapter, an adapter bank, or a model folder.

    For an adapter, --model adds the size of the update, and the fraction of the
    update that a merge retains. For a model folder, the command lists the layers
    that a new adapter with --r and --targets would train.

    Example:
      vera-func inspect vera-demo
      vera-func inspect vera-demo --model ./my-model --to nf4
    """
    from .inspection import inspect_path
    from .report import describe, show_result

    found = inspect_path(
        path,
        model=model,
        quant=quant,
        dtype=dtype_of(dtype),
        device=device or "auto",
        to=to,
        names=name,
        r=r,
        targets=targets,
    )
    shown: list[Any] = describe({key: value for key, value in found.items() if key != "merge"}, "modules")
    if "merge" in found:
        shown += ["", *describe(found["merge"], "modules")]
    show_result(found, json, *shown)


def convert(
    *,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="PEFT directories, or one adapter bank.")],
    out: Annotated[
        str, o.option("--out", help="New .safetensors file, or folder for PEFT directories.", metavar="PATH")
    ],
    name: o.Names = None,
    base: BaseOptions,
    json: o.Json = False,
) -> None:
    """Convert PEFT directories to an adapter bank, or a bank to PEFT directories.

    The name of a directory becomes the name of its adapter in the bank.

    Example:
      vera-func convert run-1 run-2 --out all.safetensors
      vera-func convert all.safetensors --out all
    """
    from .exports import convert
    from .report import describe, show_result

    done = convert(sources, out, base.load, names=name, model=base.model)
    show_result(done, json, *describe(done))


def push(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A PEFT directory.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="A repository of the Hugging Face hub: user/repo.")],
    revision: Annotated[
        str | None, o.option("--revision", help="Branch to push to (default: the main branch).", metavar="NAME")
    ] = None,
    subfolder: Annotated[str | None, o.option("--subfolder", help="Folder in the repository.", metavar="DIR")] = None,
    private: Annotated[bool, o.option("--private", help="If the repository is new, make it private.")] = False,
    message: Annotated[str, o.option("--message", help="Commit message.", metavar="TEXT")] = "Upload a VeRA adapter",
    json: o.Json = False,
) -> None:
    """Push an adapter to the Hugging Face hub, with a model card.

    Log in first with `hf auth login`, or set HF_TOKEN.

    Example:
      vera-func push my-adapter user/my-adapter
    """
    from ..io.push import push_adapter
    from .report import describe, show_result

    url = push_adapter(
        path, repository, revision=revision, subfolder=subfolder, private=private or None, message=message
    )
    done = {"repository": repository, "revision": revision, "commit": url}
    show_result(done, json, *describe(done))

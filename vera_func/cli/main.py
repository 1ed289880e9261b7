"""The command `vera-func`: for each sub-command a function of its options and one that runs it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from ..train.distributed import process_group, rank
from .options import DTYPES, QUANTS, data, model, names, newlines, positive, source


COLUMNS = (
    "kept: the part of the update that is in the merged weights (kept_least: of the worst module); error: what is off, "
    "relative to the update; size: of the update, relative to the weight."
)
EXTRAS = {"transformers", "tokenizers", "tqdm", "gguf", "sentencepiece", "accelerate"}
# What a user can put right in the command line or in a file, as opposed to what the world does.
USER_MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: Arguments without the program's name; None is those of the process.

    Returns:
        0; 2 for a mistake in the arguments or in what they name; 1 for other failures (no network,
        a missing package, another process that died); 130 if interrupted. One sentence on stderr says
        what happened. An error that nobody foresaw is a bug, and shows its traceback.
    """
    args = _parser().parse_args(argv)
    try:
        with process_group():
            args.run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        return _fail(f'{error.name} is not installed: pip install "vera-func[demo]"', 1)
    except USER_MISTAKES as error:
        return _fail(error, 2)
    except (OSError, RuntimeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vera-func",
        description="VeRA adapters over quantized language models.",
        epilog="Downloads are kept in $VERA_FUNC_CACHE (default: ~/.cache/vera_func).",
    )
    parser.add_argument("--version", action="version", version=f"vera-func {version('vera-func')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_train, _add_evaluate, _add_predict, _add_generate):
        add(commands)
    for add in (_add_merge, _add_export_lora, _add_inspect, _add_convert):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _run_demo,
        help="quantize a model, train an adapter that classifies texts, save it, check it",
        example="vera-func demo\n  vera-func demo --adapters 8 --steps 100 --out my-sweep",
    )
    data(parser, "JSONL or CSV with text and label (default: movie reviews)")
    _training(parser, out={"default": "vera-demo", "help": "where the adapter goes, %(default)s"})


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _run_demo,
        help="train an adapter on your texts, measure it on a part held out, save it as a PEFT directory",
        example="vera-func train --model ./my-model --data reviews.csv --out my-adapter\n"
        r"  vera-func train --data messages.csv --prompt 'Message: {text}\nTopic:' --out my-adapter",
    )
    data(parser, "JSONL or CSV with text and label", required=True)
    _training(parser, out={"required": True, "help": "where the adapter goes"})


def _training(parser: Any, out: dict[str, Any]) -> None:
    add = parser.add_argument
    model(parser, "default: SmolLM2-135M")
    rank_help = "of the projections, %(default)s (torchrun takes --r for an option of its own)"
    add("--r", "--rank", dest="r", type=positive(int), default=256, metavar="N", help=rank_help)
    add("--targets", metavar="NAMES", type=names, help="modules to adapt (default: q_proj,v_proj or the like)")
    add("--steps", type=positive(int), metavar="N", help="training steps (default: one epoch, 50 to 100)")
    add(
        "--adapters",
        type=positive(int),
        default=1,
        metavar="N",
        help="more than one are a sweep over learning rate and d_initial in one run, all of which go to "
        "OUT/bank.safetensors; the training then costs twice that of one, and the choice",
    )
    add("--batch-size", type=positive(int), default=16, metavar="N", help="texts in a step, %(default)s")
    add(
        "--parts",
        type=positive(int),
        metavar="N",
        help="cut the work of a step into so many parts, which the processes of torchrun share; the result depends on "
        "the parts, by rounding, and not on the processes (default: 4 under torchrun, 1 alone)",
    )
    add("--learning-rate", type=positive(float), default=2e-2, metavar="X", help="%(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of split, order and projections, %(default)s")
    add("--out", metavar="DIR", **out)


def _run_demo(args: argparse.Namespace) -> None:
    from .demo import demo
    from .report import describe

    talk = args.command == "demo" and not args.json
    options = {"model", "data", "quant", "r", "targets", "steps", "adapters", "out", "seed", "learning_rate", "parts"}
    result = demo(
        **{name: getattr(args, name) for name in sorted(options)},
        batch_size=args.batch_size,
        dtype=_dtype(args.dtype),
        **({"prompt": args.prompt} if args.prompt else {}),
        say=_say if talk else lambda line: None,
    )
    if not talk:
        following = f"Next: vera-func predict --adapter {args.out} 'A new text.'; vera-func inspect {args.out}"
        _emit(args, result._asdict(), lambda: f"{describe(result._asdict(), 'sweep')}\n{following}")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _run_evaluate,
        help="accuracy and loss of every adapter of a bank, of one adapter, or of the model alone",
        example="vera-func evaluate --bank vera-demo/bank.safetensors --data reviews.csv --out table.csv",
    )
    source(parser)
    data(parser, "JSONL or CSV with text and label, all of which is used (default: the demo's held-out reviews)")
    add = parser.add_argument
    add("--limit", type=positive(int), metavar="N", help="use the first N texts only")
    add("--chunk", type=positive(int), default=8, metavar="N", help="adapters at once, %(default)s")
    add("--batch-size", type=positive(int), default=32, metavar="N", help="texts at once, %(default)s")
    add("--out", metavar="FILE", help="write the table here, as CSV or JSON by the suffix")


def _run_evaluate(args: argparse.Namespace) -> None:
    from ..data.examples import read_examples
    from ..data.sources import open_source
    from .commands import evaluate
    from .demo import HELD_OUT, demo_examples, split_examples

    adapters = open_source(args.adapter, args.bank, args.name)
    _check_out(args)
    examples = read_examples(args.data) if args.data else split_examples(demo_examples(), HELD_OUT, seed=0)[1]
    rows = evaluate(
        adapters,
        _base(args, adapters),
        examples[: args.limit],
        prompt=args.prompt,
        chunk=args.chunk,
        batch_size=args.batch_size,
    )
    _emit_table(args, rows)


def _add_predict(commands: Any) -> None:
    parser = _command(
        commands,
        "predict",
        _run_predict,
        help="label texts, and say how probable the label is",
        example="vera-func predict --adapter vera-demo 'A joy to watch.' 'Two hours too long.'\n"
        "  vera-func predict --adapter vera-demo --data new.csv --out labelled.csv",
    )
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts (default: those of --data, or the lines of stdin)")
    source(parser)
    data(parser, "JSONL or CSV with text")
    add("--labels", metavar="NAMES", type=names, help="to choose from (default: those that the adapter was trained on)")
    add("--chunk", type=positive(int), default=8, metavar="N", help="adapters at once, %(default)s")
    add("--batch-size", type=positive(int), default=32, metavar="N", help="texts at once, %(default)s")
    add("--out", metavar="FILE", help="write the table here, as CSV or JSON by the suffix")


def _run_predict(args: argparse.Namespace) -> None:
    from ..data.examples import read_texts
    from ..data.sources import open_source
    from .commands import predict

    if args.texts and args.data:
        raise ValueError("give texts or --data, not both.")
    adapters = open_source(args.adapter, args.bank, args.name)
    _check_out(args)
    texts = args.texts or (read_texts(args.data) if args.data else _lines())
    options = {name: getattr(args, name) for name in ("prompt", "chunk", "batch_size")}
    rows = predict(adapters, _base(args, adapters), texts, labels=args.labels or (), **options)
    _emit_table(args, rows)


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        _run_generate,
        help="continue prompts with an adapter, or each with one of its own from a bank",
        example=r"vera-func generate --adapter vera-demo 'Review: A joy to watch.\nSentiment:'"
        "\n  vera-func generate --bank bank.safetensors --name a --name b 'One day' 'One night'",
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help=r"texts, \n for a new line (default: the lines of stdin)")
    source(parser, "default: all; may be repeated, in the order of the prompts")
    add("--max-new-tokens", type=positive(int), default=40, metavar="N", help="%(default)s")
    add("--temperature", type=positive(float), metavar="X", help="draw tokens (default: take the likeliest)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws, %(default)s")
    add("--batch-size", type=positive(int), default=16, metavar="N", help="prompts at once, %(default)s")


def _run_generate(args: argparse.Namespace) -> None:
    from ..data.sources import open_source
    from .commands import generate

    adapters = open_source(args.adapter, args.bank, args.name)
    prompts = args.prompts or _lines()
    rows = generate(
        adapters,
        _base(args, adapters),
        [newlines(prompt) for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature or 0.0,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    _emit(args, rows, lambda: "\n\n".join(f"[{row['adapter']}] {row['prompt']}{row['text']}" for row in rows))


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        _run_merge,
        help="write a plain model with an adapter in its weights, and say how much of it is kept",
        example="vera-func merge --adapter vera-demo --to bfloat16 --out merged-model\n"
        "  vera-func merge --adapter vera-demo --to nf4 --calibrate --data reviews.csv --out merged-model",
    )
    source(parser, "needed if it holds several")
    add = parser.add_argument
    add("--to", choices=[*QUANTS[:-1], *DTYPES], required=True, help="format of the merged weights")
    add("--calibrate", action="store_true", help="choose the 4-bit weights so that the answers to --data stay")
    data(parser, "JSONL or CSV with text and label, 200 or more (default: the demo's training reviews)")
    add("--out", metavar="DIR", required=True, help="where the model and its tokenizer go")


def _run_merge(args: argparse.Namespace) -> None:
    from ..data.examples import read_examples
    from ..data.sources import open_source
    from .commands import merge_to
    from .demo import HELD_OUT, demo_examples, split_examples
    from .inspect import summarize_reports
    from .report import format_table

    if (args.data or args.prompt) and not args.calibrate:
        raise ValueError("--data and --prompt are for --calibrate: pass that, too.")
    adapters = open_source(args.adapter, args.bank, args.name, one=True)
    examples = None
    if args.calibrate:
        examples = read_examples(args.data) if args.data else split_examples(demo_examples(), HELD_OUT, seed=0)[0]
    options = {"calibrate": examples, "prompt": args.prompt}
    done = merge_to(adapters, _base(args, adapters), args.to, args.out, **options)
    table = f"{format_table(summarize_reports(done['modules']))}\n{COLUMNS}\n" if "modules" in done else ""
    _emit(
        args,
        done,
        lambda: f"{table}{done['advice']}\nThe merged model is in {args.out}: vera-func evaluate --model {args.out}",
    )


def _add_export_lora(commands: Any) -> None:
    parser = _command(
        commands,
        "export-lora",
        _run_export_lora,
        help="write an adapter as a PEFT LoRA directory, for PEFT, vLLM and others",
        example="vera-func export-lora --adapter vera-demo --out my-lora",
    )
    source(parser, "needed if it holds several")
    parser.add_argument(
        "--rank",
        type=positive(int),
        metavar="N",
        help="of the LoRA (default: r, which is exact; much less leaves out most of the update)",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where the LoRA goes")


def _run_export_lora(args: argparse.Namespace) -> None:
    from ..data.sources import open_source
    from .commands import lora_of
    from .report import describe

    adapters = open_source(args.adapter, args.bank, args.name, one=True)
    done = lora_of(adapters, _base(args, adapters), args.out, args.rank)
    _emit(args, done, lambda: describe(done))


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _run_inspect,
        help="what is in an adapter or a bank, or what would be adapted in a model",
        example="vera-func inspect vera-demo\n  vera-func inspect vera-demo --model ./my-model --to nf4",
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="a PEFT directory, a bank, or the folder of a model")
    add("--name", action="append", metavar="NAME", help="look at this adapter of a bank only; may be repeated")
    model(parser, "under an adapter: says, too, how large its updates are and what a merge keeps of them")
    add("--to", choices=[*QUANTS[:-1], *DTYPES], help="format to merge to (default: the model's)")
    add("--r", "--rank", dest="r", type=positive(int), default=256, metavar="N", help="for a model folder, %(default)s")
    add("--targets", metavar="NAMES", type=names, help="for the same (default: q_proj,v_proj or the like)")


def _run_inspect(args: argparse.Namespace) -> None:
    from .inspect import inspect_path
    from .report import describe

    options = {name: getattr(args, name) for name in ("model", "quant", "to", "r", "targets")}
    found = inspect_path(args.path, names=args.name, dtype=_dtype(args.dtype), **options)
    parts = [{key: value for key, value in found.items() if key != "merge"}, found.get("merge")]
    _emit(args, found, lambda: "\n\n".join(describe(part, "modules") for part in parts if part))


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _run_convert,
        help="PEFT directories to a bank, or a bank to PEFT directories",
        example="vera-func convert run-1 run-2 --out all.safetensors\n  vera-func convert all.safetensors --out all",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="PEFT directories, or one bank")
    add("--out", metavar="PATH", required=True, help="a new file ending in .safetensors, or a folder")
    add("--name", action="append", metavar="NAME", help="an adapter of the bank (default: all); may be repeated")
    model(parser, "default: what the directories name")


def _run_convert(args: argparse.Namespace) -> None:
    from .commands import convert
    from .report import describe

    options = {"names": args.name, "model": args.model, "quant": args.quant, "dtype": _dtype(args.dtype)}
    done = convert(args.sources, args.out, **options)
    _emit(args, done, lambda: describe(done))


def _command(commands: Any, name: str, run: Any, *, help: str, example: str) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, command=name)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    return parser


def _dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, name) if name else None


def _base(args: argparse.Namespace, source: Any) -> Any:
    from ..data.sources import base_of

    return base_of(source, args.model, args.quant, _dtype(args.dtype))


def _emit(args: argparse.Namespace, result: Any, text: Callable[[], str]) -> None:
    from .report import to_json

    _say(to_json(result) if args.json else text())


def _check_out(args: argparse.Namespace) -> None:
    from .report import check_table_path

    if args.out:
        check_table_path(args.out)  # before an hour's work


def _emit_table(args: argparse.Namespace, rows: Any) -> None:
    from .report import format_table, write_table

    if args.out and rank() == 0:
        write_table(args.out, rows)
    _emit(args, rows, lambda: f"{len(rows)} rows written to {args.out}" if args.out else format_table(rows))


def _lines() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _say(line: str) -> None:
    # Flushed, so that it stays in order with the bars, which go to stderr.
    if rank() == 0:
        print(line, flush=True)


def _fail(error: object, status: int) -> int:
    print(f"vera-func: {' '.join(str(error).split())}", file=sys.stderr)
    return status

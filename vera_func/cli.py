"""The command `vera-func`: for each sub-command a function of its options and one that runs it."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


EXTRAS = {"transformers", "tokenizers", "tqdm", "gguf", "sentencepiece"}
# What a user can put right in the command line or in a file, as opposed to what the world does.
USER_MISTAKES = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: Arguments without the program's name; None is those of the process.

    Returns:
        0; 2 for a mistake in the arguments or in what they name; 1 for other failures (no network,
        a missing package); 130 if interrupted. One sentence on stderr says what happened. An error
        that nobody foresaw is a bug, and shows its traceback.
    """
    args = _parser().parse_args(argv)
    try:
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
    parser = argparse.ArgumentParser(prog="vera-func", description="VeRA adapters over quantized language models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo,):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _run_demo,
        help="quantize a model, train an adapter that classifies texts, save it, check it",
        example="vera-func demo\n  vera-func demo --data reviews.csv --steps 100 --out my-adapter",
    )
    add = parser.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="a causal language model (default: SmolLM2-135M)")
    add("--data", metavar="FILE", help="JSONL or CSV with text and label (default: movie reviews)")
    add("--quant", choices=["nf4", "fp4", "int8", "none"], default="nf4", help="%(default)s")
    add("--r", type=_positive(int), default=256, help="rank of the projections, %(default)s")
    add(
        "--targets",
        metavar="NAMES",
        type=_names,
        help="modules to adapt (default: q_proj,v_proj or the like)",
    )
    add(
        "--steps",
        type=_positive(int),
        metavar="N",
        help="training steps (default: one epoch, 50 to 100)",
    )
    add(
        "--batch-size",
        type=_positive(int),
        default=16,
        metavar="N",
        help="texts in a step, %(default)s",
    )
    add("--learning-rate", type=_positive(float), default=2e-2, metavar="X", help="%(default)s")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the arithmetic (default: bfloat16 if the CPU has it in hardware, else float32)",
    )
    add("--seed", type=int, default=0, help="of split, order and projections, %(default)s")
    add("--out", default="vera-demo", metavar="DIR", help="where the adapter goes, %(default)s")


def _run_demo(args: argparse.Namespace) -> None:
    import torch

    from .demo import demo

    demo(
        model=args.model,
        data=args.data,
        quant=args.quant,
        r=args.r,
        targets=args.targets,
        steps=args.steps,
        out=args.out,
        seed=args.seed,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        say=_say,
    )


def _command(commands: Any, name: str, run: Any, *, help: str, example: str) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("must be names separated by commas, such as q_proj,v_proj")
    return names


def _say(line: str) -> None:
    # Flushed, so that it stays in order with the bars, which go to stderr.
    print(line, flush=True)


def _fail(error: object, status: int) -> int:
    print(f"vera-func: {' '.join(str(error).split())}", file=sys.stderr)
    return status

"""The entry point of `vera-func`, which reports a failure as one sentence on stderr and an exit status."""

import sys
from collections.abc import Callable, Sequence


EXTRAS = {
    "typer",
    "rich",
    "transformers",
    "tokenizers",
    "tqdm",
    "gguf",
    "sentencepiece",
    "accelerate",
    "datasets",
    "pyarrow",
    "huggingface_hub",
    "ray",
}
# Errors in the arguments or the input files; other OSErrors are environment failures.
INPUT_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: Command-line arguments without the program name; None means `sys.argv[1:]`.

    Returns:
        0 on success; 2 for invalid arguments or input files; 1 for an environment failure (network, missing package,
        I/O, a dead rank); 130 if interrupted. Exceptions that indicate a bug, such as TypeError, are raised.
    """
    try:
        call = _parse(argv)
        if isinstance(call, int):
            return call
        from ..train.distributed import process_group

        with process_group():
            call()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS and error.name is not None:
            raise
        extra = "ray" if package == "ray" else "demo"
        # Without a name, the message is from a library that requires an optional package.
        missing = f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else str(error).rstrip()
        return _fail(f'{missing.removesuffix(".")}: pip install "vera-func[{extra}]"', 1)
    except INPUT_ERRORS as error:
        return _fail(error, 2)
    except (OSError, RuntimeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _parse(argv: Sequence[str] | None) -> Callable[[], None] | int:
    """A function that runs the requested command, or an exit status after `--help` or invalid arguments."""
    import rich  # noqa: F401  typer imports it late
    import typer

    from .app import app

    try:
        # Not app(), which would replace sys.excepthook.
        call = typer.main.get_command(app).main(argv, prog_name="vera-func", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        program = context.command_path if context else "vera-func"
        message = error.format_message().replace("Value error, ", "")  # pydantic's prefix to errors of our parsers
        return _fail(f"{message.rstrip('.')} (see {program} --help).", error.exit_code)
    return call or 0


def _fail(error: object, status: int) -> int:
    message = " ".join(str(error).split())
    try:
        from .report import show_error
    except ModuleNotFoundError:
        print(f"vera-func: {message}", file=sys.stderr)
    else:
        show_error(message)
    return status

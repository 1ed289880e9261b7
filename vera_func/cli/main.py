"""The entry point of `vera-func`: failures become one sentence on stderr and an exit status."""

import sys
from collections.abc import Callable, Sequence


EXTRAS = {"typer", "rich", "transformers", "tokenizers", "tqdm", "gguf", "sentencepiece", "accelerate"}
# What is put right in the arguments or the input files. Other OSErrors are the environment's.
INPUT_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: Arguments without the program's name; None is those of the process.

    Returns:
        0; 2 for invalid arguments or input files; 1 for an environment failure (network, missing package, I/O, another
        process that died); 130 if interrupted. One sentence on stderr says what failed. Any other error is a bug, and
        keeps its traceback.
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
        # Without a name it is a library's own sentence about a package that it needs.
        missing = f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else str(error).rstrip()
        return _fail(f'{missing.removesuffix(".")}: pip install "vera-func[demo]"', 1)
    except INPUT_ERRORS as error:
        return _fail(error, 2)
    except (OSError, RuntimeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _parse(argv: Sequence[str] | None) -> Callable[[], None] | int:
    """The call that a command line asks for; or a status, where that was all (`--help`, invalid arguments)."""
    import rich  # noqa: F401  typer imports it late
    import typer

    from .app import app

    try:
        # Not app(): it would replace sys.excepthook.
        call = typer.main.get_command(app).main(argv, prog_name="vera-func", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        program = context.command_path if context else "vera-func"
        message = error.format_message().replace("Value error, ", "")  # pydantic's prefix to what our parsers raise
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

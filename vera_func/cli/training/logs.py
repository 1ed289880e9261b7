"""Log the loss and other metrics of each training step to a folder, for the option `--log`."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...train.fit import OnStep


@contextmanager
def step_logger(folder: str | None, checkpoint: Path | None = None) -> Iterator[OnStep | None]:
    """Yield the argument `on_step` of `fit`: a function that logs each step, or None if `folder` is None.

    The log is in TensorBoard's format if tensorboard is installed. Otherwise, the log is the file `steps.jsonl`, with
    null for NaN and inf. The log of a resumed run may contain the steps after the last checkpoint twice.

    Args:
        folder: Folder of the log, which is created if it does not exist.
        checkpoint: Checkpoint of the run. If the name of the checkpoint ends in the index of a group of adapters, the
            log is written to a sub-folder for this group.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, step_logger(folder) as log:
        ...     log(1, {"loss": 0.5})
    """
    if folder is None:
        yield None
        return
    group = re.search(r"\.training-[0-9a-f]{16}-(\d+)$", "" if checkpoint is None else checkpoint.name)
    path = Path(folder, *([f"group-{group[1]}"] if group else []))
    path.mkdir(parents=True, exist_ok=True)
    if find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(path)) as writer:

            def to_tensorboard(step: int, numbers: dict[str, float]) -> None:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)

            yield to_tensorboard
        return
    with (path / "steps.jsonl").open("a", encoding="utf-8") as file:

        def to_file(step: int, numbers: dict[str, float]) -> None:
            row: dict[str, Any] = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
            print(json.dumps({"step": step, **row}), file=file, flush=True)

        yield to_file

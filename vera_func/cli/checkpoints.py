"""Names of the checkpoint files from which an interrupted training run resumes."""

import glob
import hashlib
from pathlib import Path


def checkpoint_path(out: Path, *run: object) -> Path:
    """The path of a run's checkpoint, `OUT.training-<hash>`, with a hash of the options and the data.

    Args:
        out: Output folder of the run.
        *run: Options and data, whose `repr` must be the same in every process.
    """
    name = hashlib.sha256(repr(run).encode()).hexdigest()[:16]
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(f"{out}.training-{name}")


def delete_checkpoints(checkpoint: Path) -> None:
    """Delete all checkpoint files of a run, including the temporary files of killed processes."""
    name = glob.escape(checkpoint.name)
    for file in (*checkpoint.parent.glob(f"{name}*"), *checkpoint.parent.glob(f".{name}*")):
        file.unlink(missing_ok=True)

"""Create new adapters, and write the files of a run: checkpoints and trained adapters."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data.metadata import Metadata, write_metadata
from ...data.models import Base
from ...data.prompts import MAX_TOKENS
from ...io.bank import save_bank
from ...io.checkpoint import save_adapter
from ...model.adapt import Adapted, adapt
from ...model.config import VeraConfig
from .settings import Recipe


BANK = "bank.safetensors"


def output_folder(out: str | Path, name: str = "out") -> Path:
    """Check that `out` is a folder or does not exist, and return `out` as a Path.

    Args:
        out: The output folder.
        name: Name of the option in the error message.

    Raises:
        ValueError: If `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{name} {out} is a file, but must be a folder or not exist: choose another path.")
    return out


def new_adapter(base: Base, r: int, targets: Any, recipe: Recipe) -> Adapted:
    """Create a new adapter of the base model."""
    if targets is not None and not isinstance(targets, str):
        targets = "all-linear" if list(targets) == ["all-linear"] else list(targets)
    config = VeraConfig(
        base_model_name_or_path=base.name,
        task_type="CAUSAL_LM",
        r=r,
        target_modules=targets,
        projection_prng_key=recipe.seed,
        vera_dropout=recipe.dropout,
        use_dora=recipe.dora,
    )
    return adapt(base.model, config, product_dtype=base.product_dtype)


def classifier_metadata(base: Base, prompt: str, max_length: int) -> Metadata:
    """The metadata of adapters that classify texts, without labels; the default maximum length is not stored."""
    return Metadata(base.quant, prompt=prompt, max_length=None if max_length == MAX_TOKENS else max_length)


def save_adapters(
    out: Path, adapted: Adapted, params: dict[str, Tensor], names: Sequence[str], metadata: Metadata
) -> None:
    """Save one adapter as the PEFT directory `out`, or stacked adapters as a bank in `out`, with the metadata."""
    if len(names) == 1:
        save_adapter(out, params, adapted.frozen, adapted.config)
        write_metadata(out, metadata)
        return
    out.mkdir(parents=True, exist_ok=True)
    write_metadata(save_bank(out / BANK, params, adapted.frozen, adapted.config, names), metadata)


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

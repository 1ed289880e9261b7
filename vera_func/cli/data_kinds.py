"""The kind of a data set, and the refusal of options that have no effect on the kind."""

from pathlib import Path
from typing import Any

from ..data.dataset import peek_kind
from ..data.files import is_hub_id


def kind_of(source: str) -> str:
    """The kind of a data set; "label" if the file does not exist, so that reading the file raises the error."""
    there = is_hub_id(source) or Path(source).exists() or any(sign in source for sign in "*?[")
    return peek_kind(source) if there else "label"


def refuse_options(options: dict[str, Any], what: str) -> None:
    """Check that options that have no effect on the data are None.

    Args:
        options: Values of options by name.
        what: Description of the data in the error message, such as "with labels".

    Raises:
        ValueError: If a value is not None.
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} has no effect on data {what}: leave out {name}.")

"""Determine the kind of a data set, and reject options that have no effect on data of this kind."""

from pathlib import Path
from typing import Any

from ..data.dataset import peek_kind
from ..data.files import is_hub_id


def kind_of(source: str) -> str:
    """The kind of a data set. For a missing file, the kind is "label"; reading the file later raises an error."""
    there = is_hub_id(source) or Path(source).exists() or any(sign in source for sign in "*?[")
    return peek_kind(source) if there else "label"


def refuse_options(options: dict[str, Any], what: str) -> None:
    """Raise if the user passed an option that has no effect on the data.

    Args:
        options: The options without effect, from name to value; None means that the option was not passed.
        what: Description of the data in the error message, such as "with labels".

    Raises:
        ValueError: If a value is not None.
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} has no effect on data {what}: leave out {name}.")

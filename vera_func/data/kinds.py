"""Determine the kind of a data set from its columns, and check its rows.

    `text`, `label`: classification.
    `text`: language modelling.
    `prompt`, `completion`: language modelling, with the loss on the completion only.
    `messages`: chats, with the loss on the assistant's turns only.
    `prompt`, `chosen`, `rejected`: preferences, as text or as messages.

The column names are those of TRL. Other columns are ignored, except for `group`, which names the source document of a
row. Rows of the same group are never split between training and held-out data.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal


Kind = Literal["preference", "completion", "chat", "label", "text"]
# The kind of a data set is the first kind whose columns are all present.
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant", "tool")


def kind_of(columns: Iterable[str]) -> Kind | None:
    """The kind of a data set with these columns, or None if the columns match no kind.

    Example:
        >>> kind_of(["id", "prompt", "completion"]), kind_of(["text"]), kind_of(["review"])
        ('completion', 'text', None)
    """
    known = set(columns)
    return next((kind for kind, needed in COLUMNS.items() if known.issuperset(needed)), None)


def require_kind(columns: Iterable[str]) -> Kind:
    """Return `kind_of(columns)`, or raise an error if the columns match no kind.

    Raises:
        ValueError: If the columns match no supported kind, or if a column is misspelled, such as "Label" or " label",
            and the kind would be different with the correct spelling.
    """
    columns = list(columns)
    kind = kind_of(columns)
    _check_spelling(columns, kind)
    if kind is None:
        choices = " or ".join(f"({', '.join(needed)})" for needed in reversed(COLUMNS.values()))
        raise ValueError(f"the columns must include {choices}, got {columns}: rename the columns.")
    if kind == "completion" and "label" in columns:
        raise ValueError(
            "the columns 'prompt', 'completion' and 'label' are unpaired preferences, which are not supported: give "
            "the columns 'prompt', 'chosen' and 'rejected', or remove the rows with bad completions and then the "
            "column 'label'."
        )
    return kind


def require_same_kind(found: Kind, kind: Kind) -> None:
    """Check that a row or file has the same kind as the first row of the data.

    Raises:
        ValueError: If the kinds differ.
    """
    if found != kind:
        names, expected = ", ".join(COLUMNS[found]), ", ".join(COLUMNS[kind])
        raise ValueError(
            f"the columns are ({names}), but the first row of the data has the columns ({expected}): put rows of "
            "another kind in a separate data set."
        )


def check_row(kind: Kind, row: Mapping[str, Any]) -> dict[str, Any]:
    """Check a row, and return only the columns of its kind.

    A label may be a string, a number or a boolean, and is returned as a string. Messages are returned with their role
    and content only.

    Args:
        kind: The kind of the data set.
        row: Values by column.

    Raises:
        ValueError: If a value is missing or invalid.

    Example:
        >>> check_row("completion", {"prompt": "1 + 1 =", "completion": " 2", "id": 7})
        {'prompt': '1 + 1 =', 'completion': ' 2'}
    """
    _check_kind(kind, row)
    if kind == "chat":
        return {"messages": _messages("messages", row.get("messages"), answered=True)}
    if kind == "label":
        return {"text": text("text", row.get("text")), "label": _label(row.get("label"))}
    if kind in ("preference", "completion") and isinstance(row.get("prompt"), list | tuple):
        prompt = {"prompt": _messages("prompt", row["prompt"], answered=False)}
        answers = {name: _messages(name, row.get(name), answered=True) for name in COLUMNS[kind][1:]}
        values: dict[str, Any] = prompt | answers
    else:
        values = {name: text(name, row.get(name)) for name in COLUMNS[kind]}
    if kind == "preference" and values["chosen"] == values["rejected"]:
        raise ValueError("'chosen' and 'rejected' must differ, but are equal: remove the row.")
    return values


def text(column: str, value: Any) -> str:
    """Return the value of a column if the value is a non-empty string of valid characters.

    Raises:
        ValueError: If the value is anything else.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} must be a non-empty string, got {_short(value)}.")
    if "\0" in value:
        raise ValueError(f"{column!r} contains a NUL character: remove the character.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{column!r} contains an unpaired surrogate at character {error.start}: remove the character."
        ) from None
    return value


def _check_spelling(columns: list[str], kind: Kind | None) -> None:
    """Reject a column that would be ignored because of its spelling: capitals, surrounding spaces or a plural."""
    known = {name for needed in COLUMNS.values() for name in needed}
    for column in columns:
        plain = column.strip().lower()
        name = next((name for name in (plain, plain.removesuffix("s")) if name in known), column)
        meant = kind_of([*columns, name])
        if kind is not None and meant is not None and meant != kind:
            raise ValueError(
                f"the column {column!r} would be ignored: rename the column to {name!r}, or remove the column to use "
                f"only {' and '.join(map(repr, COLUMNS[kind]))}."
            )


def _check_kind(kind: Kind, row: Mapping[str, Any]) -> None:
    """Reject a row whose columns match another kind; `check_row` reports missing columns."""
    found = kind_of(name for name, value in row.items() if value is not None)
    if found not in (None, kind) and not set(COLUMNS[found]) < set(COLUMNS[kind]):
        require_same_kind(found, kind)


def _label(value: Any) -> str:
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return text("label", value).strip()


def _messages(column: str, value: Any, *, answered: bool) -> list[dict[str, str]]:
    """Check a list of messages; if `answered`, at least one message must be from the assistant."""
    if not isinstance(value, list | tuple) or not value:
        hint = "; write a list, which CSV can't store: use JSON Lines or Parquet" if isinstance(value, str) else ""
        raise ValueError(f"{column!r} must be a list of messages with role and content, got {_short(value)}{hint}.")
    found = []
    for i, message in enumerate(value, 1):
        where = f"{column!r}, message {i}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be an object with role and content, got {_short(message)}.")
        if message.get("role") not in ROLES:
            roles = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
            raise ValueError(f"{where}: the role must be {roles}, got {_short(message.get('role'))}.")
        try:
            found.append({"role": message["role"], "content": text("content", message.get("content"))})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if answered and not any(message["role"] == "assistant" for message in found):
        raise ValueError(f"{column!r} has no message of the assistant: add such a message, or remove the row.")
    return found


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:60]}..."

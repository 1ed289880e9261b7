"""The kinds of data sets, and the checks of a row. The columns of a data set determine its kind.

    text, label                 classification
    text                        language modelling
    prompt, completion          loss on the completion only
    messages                    chats; loss on the assistant's turns only
    prompt, chosen, rejected    preferences, as text or as messages

The names of the columns are TRL's. Other columns are ignored, except for `group`, which names the source of a row. Rows
of the same group are never split between training and held-out data.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal


Kind = Literal["preference", "completion", "chat", "label", "text"]
# The kind of a data set is the first of these whose columns the data set has.
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant", "tool")


def kind_of(columns: Iterable[str]) -> Kind | None:
    """The kind of a data set with these columns, or None if no kind has such columns.

    Example:
        >>> kind_of(["id", "prompt", "completion"]), kind_of(["text"]), kind_of(["review"])
        ('completion', 'text', None)
    """
    known = set(columns)
    return next((kind for kind, needed in COLUMNS.items() if known.issuperset(needed)), None)


def require_kind(columns: Iterable[str]) -> Kind:
    """The kind of a data set with these columns.

    Raises:
        ValueError: If no kind has such columns, or the kind is not supported. Also if a misspelt column, such as
            "Label" or " label", would be ignored, although the corrected spelling would give the data another kind.
    """
    columns = list(columns)
    kind = kind_of(columns)
    _check_spelling(columns, kind)
    if kind is None:
        choices = " or ".join(", ".join(needed) for needed in reversed(COLUMNS.values()))
        raise ValueError(f"the columns must include {choices}, got {columns}.")
    if kind == "completion" and "label" in columns:
        raise ValueError(
            "prompt, completion and label are unpaired preferences, which are not supported: give prompt, chosen, "
            "rejected, or remove the rows with bad completions and the column 'label'."
        )
    return kind


def require_same_kind(found: Kind, kind: Kind) -> None:
    """Check that a row or file has the same kind as the first row of the data.

    Raises:
        ValueError: If it has another kind.
    """
    if found != kind:
        names, expected = ", ".join(COLUMNS[found]), ", ".join(COLUMNS[kind])
        raise ValueError(
            f"the columns are {names}, but the data begins with {expected}: put each kind of row in a data set of its "
            "own."
        )


def check_row(kind: Kind, row: Mapping[str, Any]) -> dict[str, Any]:
    """Check the columns of a row, and drop all other columns.

    A label may also be a number or a boolean. Messages are returned with their role and content only.

    Args:
        kind: The kind of the data set.
        row: Values by column.

    Raises:
        ValueError: If a value is missing or has the wrong type. The message names the column, but not the row.

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
    """Check that the value of a column is a non-empty string of valid characters, and return it.

    Raises:
        ValueError: If the value is anything else.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} must be a non-empty string, got {_short(value)}.")
    if "\0" in value:
        raise ValueError(f"{column!r} contains a NUL character: remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{column!r} contains half of a surrogate pair at character {error.start}: remove it."
        ) from None
    return value


def _check_spelling(columns: list[str], kind: Kind | None) -> None:
    """Check that no column would be ignored because of its spelling, such as capitals, spaces or a plural."""
    known = {name for needed in COLUMNS.values() for name in needed}
    for column in columns:
        plain = column.strip().lower()
        name = next((name for name in (plain, plain.removesuffix("s")) if name in known), column)
        meant = kind_of([*columns, name])
        if kind is not None and meant is not None and meant != kind:
            raise ValueError(
                f"the column {column!r} would be ignored: rename it to {name!r}, or remove it to train on "
                f"{', '.join(COLUMNS[kind])}."
            )


def _check_kind(kind: Kind, row: Mapping[str, Any]) -> None:
    """Check that a row does not have another kind. The checks of the values report missing columns."""
    found = kind_of(name for name, value in row.items() if value is not None)
    if found not in (None, kind) and not set(COLUMNS[found]) < set(COLUMNS[kind]):
        require_same_kind(found, kind)


def _label(value: Any) -> str:
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return text("label", value).strip()


def _messages(column: str, value: Any, *, answered: bool) -> list[dict[str, str]]:
    """Check a list of messages; with `answered`, at least one of them must be from the assistant."""
    if not isinstance(value, list | tuple) or not value:
        hint = (
            "; write a list, for which CSV has no notation: use JSON Lines or Parquet" if isinstance(value, str) else ""
        )
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
        raise ValueError(f"{column!r} has no message of the assistant, so there is nothing to train on.")
    return found


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:60]}..."

"""Parsers of the values of options: numbers, lists and prompts."""

from collections.abc import Callable
from typing import Any


def positive(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A parser for positive, finite numbers of type `kind`.

    Example:
        >>> positive(int)("8")
        8
    """

    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"invalid {kind.__name__} value: {text!r}") from None
        if not 0 < value < float("inf"):
            raise ValueError(f"must be positive and finite, got {text}")
        return value

    return parse


def names(text: str) -> list[str]:
    """Parse a comma-separated list of names.

    Example:
        >>> names("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ValueError(f"got {text!r}, expected names separated by commas, such as q_proj,v_proj")
    return found


def numbers(kind: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """A parser for comma-separated positive numbers of type `kind`.

    Example:
        >>> numbers(float)("0.05,0.1")
        [0.05, 0.1]
    """
    one = positive(kind)
    return lambda text: [one(item) for item in str(text).split(",")]


def fraction(text: str) -> float:
    """Parse a number that is at least 0 and below 1.

    Example:
        >>> fraction("0.1")
        0.1
    """
    value = not_negative(text)
    if value >= 1:
        raise ValueError(f"must be below 1, got {text}")
    return value


def not_negative(text: Any) -> float:
    """Parse a finite number that is at least 0.

    Example:
        >>> not_negative("0")
        0.0
    """
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"invalid float value: {text!r}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"must be at least 0 and finite, got {text}")
    return value


def newlines(text: str) -> str:
    r"""Replace each two-character `\n`, as typed in a shell, with a line break.

    Example:
        >>> newlines(r"Review: {text}\nSentiment:")
        'Review: {text}\nSentiment:'
    """
    return text.replace("\\n", "\n")

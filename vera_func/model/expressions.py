"""Regular expressions of `re`, from configurations that anybody may have written, matched in bounded time.

`re` can't be stopped: `(a|a)*b` against forty letters takes hours. The package `regex` takes a timeout. It means other
things by some characters, which are escaped here, so that an expression matches exactly what `re` matches.
"""

import math
import re
import time
from typing import Any

import regex


SECONDS = 5.0  # for all names of a model together; an ordinary expression needs milliseconds
# What regex compiles grows with these, and can't be stopped either.
MOST_CHARACTERS, MOST_REPEATS = 100_000, 100_000

# An escape, a set, a counted repeat, or a brace that counts nothing.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+|(?=,))(,?)(\d*)\}|\{", re.DOTALL)


def require_expression(field: str, value: str) -> None:
    """Check that a value is a regular expression of `re`, and of a size that can be compiled.

    Args:
        field: Where it is from, for the error.
        value: The expression.

    Raises:
        ValueError: If it is not.

    Example:
        >>> require_expression("target_modules", r".*\\.(q|v)_proj")
    """
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"{field}={value!r} is not a regular expression: {error}.") from error
    repeats = math.prod(int(token[3] or token[1] or 1) or 1 for token in _TOKEN.finditer(value) if token[1] is not None)
    if len(value) > MOST_CHARACTERS or repeats > MOST_REPEATS:
        shown = value if len(value) < 100 else f"{value[:100]}..."
        raise ValueError(
            f"{field}={shown!r} is too large a regular expression, of {len(value):,} characters and {repeats:,} "
            "repetitions; give a list of names."
        )


class Expression:
    """An expression that is matched with many names, in `SECONDS` seconds for all of them.

    Args:
        field: Where it is from, for the error.
        value: As `require_expression` takes it.

    Example:
        >>> bool(Expression("target_modules", r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj"))
        True
    """

    def __init__(self, field: str, value: str) -> None:
        self.field, self.value = field, value
        self.left = SECONDS
        # Python 3.10 also takes flags for the whole expression that stand inside of it.
        self._compiled = regex.compile(_TOKEN.sub(_for_regex, value), re.compile(value).flags | regex.VERSION0)

    def fullmatch(self, name: str) -> Any:
        """`re.fullmatch(value, name)`.

        Raises:
            ValueError: If time is up.
        """
        return self._bounded(self._compiled.fullmatch, name)

    def match(self, name: str) -> Any:
        """`re.match(value, name)`.

        Raises:
            ValueError: If time is up.
        """
        return self._bounded(self._compiled.match, name)

    def _bounded(self, search: Any, name: str) -> Any:
        start = time.perf_counter()
        try:
            return search(name, timeout=max(self.left, 0.001))
        except (TimeoutError, MemoryError) as error:
            raise ValueError(
                f"{self.field}={self.value!r} takes more than {SECONDS} seconds to match with {name!r}; give a list of "
                "names, or a simpler expression."
            ) from error
        finally:
            self.left -= time.perf_counter() - start


def _for_regex(token: re.Match[str]) -> str:
    text = token[0]
    if text == "{":  # regex would try to read a fuzzy match, such as {e<=1}
        return r"\{"
    if text[0] == "{":
        return f"{{{token[1] or 0}{token[2]}{token[3]}}}"  # {,2} is {0,2}
    if text[0] == "[":  # no [:alpha:]
        return "[" + re.sub(r"(\\.)|\[", lambda inner: inner[1] or r"\[", text[1:], flags=re.DOTALL)
    return text

"""Match regular expressions from untrusted configurations in bounded time.

Matching with `re` can't be interrupted: matching `(a|a)*b` against forty letters takes hours. The package `regex`
supports a timeout, but interprets some characters differently. This module escapes the characters that `regex` and
`re` interpret differently, so that an expression matches exactly the same strings with `regex` as with `re`.
"""

import math
import re
import time
from typing import Any

import regex


SECONDS = 5.0  # to match all names of a model; ordinary expressions need milliseconds
# Limits on the size of an expression, because compiling a large expression can't be interrupted either.
MOST_CHARACTERS, MOST_REPEATS = 100_000, 100_000

# An escape, a set, a counted repeat, or a literal brace.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+|(?=,))(,?)(\d*)\}|\{", re.DOTALL)


def require_expression(field: str, value: str) -> None:
    """Raise an error if a value is not a valid regular expression for `re`, or is too large.

    Args:
        field: Name of the configuration field that contains the expression, for the error message.
        value: The expression.

    Raises:
        ValueError: If the value is not a valid expression, or is too large.

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
            f"{field}={shown!r} is too large a regular expression ({len(value):,} characters and {repeats:,} "
            "repetitions): pass a list of names."
        )


class Expression:
    """A compiled regular expression with a time limit: `SECONDS` for all its matches together.

    The arguments are those of `require_expression`.

    Example:
        >>> bool(Expression("target_modules", r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj"))
        True
    """

    def __init__(self, field: str, value: str) -> None:
        self.field, self.value = field, value
        self.left = SECONDS
        # Python 3.10 also accepts global flags inside an expression.
        self._compiled = regex.compile(_TOKEN.sub(_for_regex, value), re.compile(value).flags | regex.VERSION0)

    def fullmatch(self, name: str) -> Any:
        """Compute `re.fullmatch(value, name)`.

        Raises:
            ValueError: If the time limit is exceeded.
        """
        return self._bounded(self._compiled.fullmatch, name)

    def match(self, name: str) -> Any:
        """Compute `re.match(value, name)`.

        Raises:
            ValueError: If the time limit is exceeded.
        """
        return self._bounded(self._compiled.match, name)

    def _bounded(self, search: Any, name: str) -> Any:
        start = time.perf_counter()
        try:
            return search(name, timeout=max(self.left, 0.001))
        except (TimeoutError, MemoryError) as error:
            raise ValueError(
                f"{self.field}={self.value!r} takes more than {SECONDS} seconds to match against the model's module "
                f"names (the last was {name!r}): pass a list of names, or a simpler expression."
            ) from error
        finally:
            self.left -= time.perf_counter() - start


def _for_regex(token: re.Match[str]) -> str:
    text = token[0]
    if text == "{":  # `regex` would parse a fuzzy match, such as {e<=1}
        return r"\{"
    if text[0] == "{":
        return f"{{{token[1] or 0}{token[2]}{token[3]}}}"  # {,2} means {0,2}
    if text[0] == "[":  # `regex` would parse POSIX classes, such as [:alpha:]
        return "[" + re.sub(r"(\\.)|\[", lambda inner: inner[1] or r"\[", text[1:], flags=re.DOTALL)
    return text

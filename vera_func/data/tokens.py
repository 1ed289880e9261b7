"""Tokenize the rows of a data set into token ids and labels; a label is -100 where there is no target.

    `text`: a text is followed by the EOS token; all tokens are targets. Long texts are split.
    `completion`: a prompt is followed by a completion and the EOS token; the tokens after the prompt are targets.
    `chat`: a chat is rendered by the tokenizer's chat template; the assistant's turns are targets.
    `preference`: a row has two sequences, prompt + chosen and prompt + rejected, each tokenized as a completion.

A row of `text`, `completion` or `chat` has one sequence.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..train.losses import IGNORED
from .assets import quiet_transformers
from .chat import chat_tokens
from .dataset import DataSet
from .packing import pack, split


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["end", "start"]
CHUNK = 256  # rows that are tokenized at once
FLUSH = 2**20  # tokens that are kept in memory before they are written


class Tokens(NamedTuple):
    """A sequence of token ids, with a label for each token."""

    ids: list[int]
    labels: list[int]


class TokenRows(NamedTuple):
    """Tokenized rows.

    Attributes:
        ids: Token ids of all sequences, concatenated.
        labels: Labels of `ids`.
        offsets: The start of each sequence in `ids`, followed by the end of the last sequence.
        width: Number of sequences per row: 2 for preferences, else 1.
        groups: For each row, the hash of its group; see `DataSet`.
        omitted: Number of rows of the data set that were omitted because truncation removed every target.
        packed: Indices of the sequences in each packed row, see `packing`; None if rows are not packed.
    """

    ids: Int[Tensor, " tokens"]
    labels: Int[Tensor, " tokens"]
    offsets: Int[Tensor, " sequences+1"]
    width: int
    groups: Int[Tensor, " rows"]
    omitted: int = 0
    packed: list[list[int]] | None = None

    def lengths(self) -> Int[Tensor, " rows"]:
        """The number of tokens of each row; for a preference, the length of the longer sequence."""
        if self.packed is not None:
            return torch.tensor([sum(int(self.offsets[k + 1] - self.offsets[k]) for k in row) for row in self.packed])
        return self.offsets.diff().reshape(-1, self.width).amax(1)

    def row(self, i: int) -> list[Tokens]:
        """The sequences of a row."""
        members = range(i * self.width, (i + 1) * self.width) if self.packed is None else self.packed[i]
        spans = [self.offsets[k : k + 2].tolist() for k in members]
        return [Tokens(self.ids[a:b].tolist(), self.labels[a:b].tolist()) for a, b in spans]

    def pack(self, use: Int[Tensor, " used"], max_length: int) -> "TokenRows":
        """Pack the rows with the indices `use` into rows of at most `max_length` tokens."""
        found = pack(self.lengths()[use].tolist(), max_length)
        numbers = use.tolist()
        return self._replace(packed=[[numbers[k] for k in row] for row in found])

    def num_targets(self, i: int) -> int:
        """The number of terms in the loss of row `i`: the number of targets, or 1 for a preference."""
        if self.width == 2:
            return 1
        members = [i] if self.packed is None else self.packed[i]
        spans = [self.offsets[k : k + 2].tolist() for k in members]
        return sum(int((self.labels[a + 1 : b] != IGNORED).sum()) for a, b in spans)


def tokenize(data: DataSet, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, side: Side = "end") -> TokenRows:
    """Tokenize a data set. Long texts are split into several rows; long rows of other kinds are truncated.

    Args:
        data: From `open_dataset`.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens of a sequence.
        side: Where long sequences are truncated: at the "end", or at the "start", which keeps the last tokens of a
            completion.

    Raises:
        ValueError: If no row has a target, if the chat template can't be applied to a row, or if the data has messages
            but the tokenizer has no chat template.
    """
    ids, labels, offsets, groups = _Column(), _Column(), array("q", [0]), array("q")
    omitted, width = 0, 2 if data.kind == "preference" else 1
    for i, row in enumerate(_tokenized(data, tokenizer, max_length)):
        pieces = [_truncated(tokens, max_length, side) for tokens in row]
        kept = [pieces] if width == 2 else [[piece] for piece in pieces]
        good = [one for one in kept if all(_has_target(tokens) for tokens in one)]
        omitted += not good
        for one in good:
            groups.append(int(data.groups[i]))
            for tokens in one:
                ids.extend(tokens.ids)
                labels.extend(tokens.labels)
                offsets.append(offsets[-1] + len(tokens.ids))
    if not groups:
        raise ValueError(
            f"{data.source}: no row has a target token after truncation to {max_length} tokens: increase --max-length, "
            "or pass --truncate-side start."
        )
    return TokenRows(ids.tensor(), labels.tensor(), torch.tensor(offsets), width, torch.tensor(groups), omitted)


def prompt_tokens(full: Sequence[int], prompt: Sequence[int]) -> Tokens:
    """Label `full`, the tokens of a prompt and its answer; only the tokens after the prompt are targets.

    The targets begin where `full` first differs from `prompt`, so a token that straddles the end of the prompt is a
    target.

    Example:
        >>> prompt_tokens([5, 6, 7, 2], [5, 6, 2])
        Tokens(ids=[5, 6, 7, 2], labels=[-100, -100, 7, 2])
    """
    shared = _common(full, prompt)
    return Tokens(list(full), [IGNORED] * shared + list(full[shared:]))


def chat_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenize a chat with a single user message, up to the beginning of the assistant's answer.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: leave out --chat, or use a chat model.")
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


def _tokenized(data: DataSet, tokenizer: Any, max_length: int) -> Iterator[list[Tokens]]:
    """Yield the tokenized sequences of each row; a long text has several pieces."""
    with quiet_transformers():
        for start in range(0, len(data.rows), CHUNK):
            chunk = data.rows[start : start + CHUNK]  # a list for each column
            rows = [dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]
            convert = _texts if data.kind == "text" else _answers
            if any(isinstance(value, list) for value in rows[0].values()):
                convert = _messages
            number = start
            try:
                for row in convert(tokenizer, rows, max_length):
                    number += 1
                    yield row
            except ValueError as error:
                raise ValueError(f"{data.source}, row {number + 1}: {error}") from error


def _texts(tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> Iterator[list[Tokens]]:
    for ids in tokenizer([row["text"] for row in rows]).input_ids:
        ids = _ended(tokenizer, ids)
        yield [Tokens(piece, piece) for piece in split(ids, max_length)]


def _answers(tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> Iterator[list[Tokens]]:
    columns = [name for name in rows[0] if name != "prompt"]
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    full = [tokenizer([row["prompt"] + row[name] for row in rows]).input_ids for name in columns]
    for prompt, *answers in zip(prompts, *full, strict=True):
        yield [prompt_tokens(_ended(tokenizer, ids), prompt) for ids in answers]


def _messages(tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> Iterator[list[Tokens]]:
    """Tokenize rows of messages. The targets are all the assistant's turns (`chat`), or the answers (other kinds)."""
    columns = [name for name in rows[0] if name not in ("prompt", "messages")]
    for row in rows:
        if not columns:
            ids, assistant = chat_tokens(tokenizer, row["messages"])
            yield [_masked(ids, assistant, 0)]
            continue
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        answers = [chat_tokens(tokenizer, row["prompt"] + row[name]) for name in columns]
        yield [_masked(ids, assistant, _common(ids, prompt)) for ids, assistant in answers]


def _masked(ids: list[int], assistant: list[bool], begin: int) -> Tokens:
    """Label tokens; the targets are the assistant's tokens from position `begin` on."""
    labels = [id if said and i >= begin else IGNORED for i, (id, said) in enumerate(zip(ids, assistant, strict=True))]
    return Tokens(ids, labels)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Append the tokenizer's EOS token if the tokenizer has one and the ids do not end with that token."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _truncated(tokens: Tokens, max_length: int, side: Side) -> Tokens:
    part = slice(None, max_length) if side == "end" else slice(-max_length, None)
    return Tokens(tokens.ids[part], tokens.labels[part])


def _has_target(tokens: Tokens) -> bool:
    return any(label != IGNORED for label in tokens.labels[1:])


class _Column:
    """A growing column of integers; more than `FLUSH` integers are stored in a temporary file."""

    def __init__(self) -> None:
        self.values, self.size = array("i"), 0
        self.path: Path | None = None

    def extend(self, values: Sequence[int]) -> None:
        """Append values."""
        self.values.extend(values)
        self.size += len(values)
        if len(self.values) > FLUSH:
            self._flush()

    def tensor(self) -> Int[Tensor, " size"]:
        """All values as int32; values in a temporary file are memory-mapped."""
        if self.path is None:
            return torch.frombuffer(self.values, dtype=torch.int32).clone()
        self._flush()
        return torch.from_file(str(self.path), size=self.size, dtype=torch.int32)

    def _flush(self) -> None:
        if self.path is None:
            handle, name = tempfile.mkstemp(prefix="vera_func-")
            os.close(handle)
            self.path = Path(name)
            weakref.finalize(self, _unlink, self.path)
        with self.path.open("ab") as file:
            self.values.tofile(file)
        del self.values[:]


def _unlink(path: Path) -> None:
    with suppress(OSError):  # some systems can't delete a mapped file
        path.unlink(missing_ok=True)

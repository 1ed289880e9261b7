"""Tokenize chats, and mark the tokens of the assistant's turns.

The tokenizer's chat template determines where a turn of the assistant begins and ends. If the template marks the
assistant's text with `{% generation %}`, the marked tokens are the targets. For any other template, the turn of message
i is located by rendering prefixes of the chat. The turn of message i begins where the rendering of `messages[:i]` with
`add_generation_prompt=True` ends. The turn of message i ends after the end-of-turn token in the rendering of
`messages[:i + 1]`.

The targets are thus the tokens that the model has to generate: the text of the turn and the end-of-turn token, such as
`<|im_end|>`. A line break that the template writes after the end-of-turn token is not a target.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers looks for the same pattern
_ADVICE = "Use a template with {% generation %} marks, or a template that renders the messages one after another."


class ChatTokens(NamedTuple):
    """A tokenized chat.

    Attributes:
        ids: Token ids.
        assistant: Whether each token belongs to a turn of the assistant.
    """

    ids: list[int]
    assistant: list[bool]


def chat_tokens(tokenizer: "PreTrainedTokenizerBase", messages: Messages, **options: Any) -> ChatTokens:
    """Tokenize a chat with the tokenizer's chat template, and mark the tokens of the assistant's turns.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: Dicts with `role` and `content`.
        **options: Variables of the template, such as `tools`.

    Raises:
        ValueError: If the tokenizer has no chat template or is not a fast tokenizer. If there are no messages, or the
            template rejects the messages. If the template has `{% generation %}` marks, but no token of the
            assistant's turns is marked. If a template without marks renders the first messages of the chat differently
            when other messages follow.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"user:": 0, "bot:": 1, "hi": 2, "hello": 3, "</s>": 4}, "hi"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=(
        ...     "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }} {% else %}"
        ...     "bot: {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"))
        >>> chat_tokens(tokenizer, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}])
        ChatTokens(ids=[0, 2, 1, 3, 4], assistant=[False, False, False, True, True])
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, but the data are messages: use a chat model.")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}: pass a fast tokenizer of transformers.")
    if not messages:
        raise ValueError("the chat has no messages: pass at least one message.")
    if _MARK.search(tokenizer.get_chat_template(tools=options.get("tools"))):
        return _marked(tokenizer, messages, options)
    text = _render(tokenizer, messages, options)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assistant = [False] * len(encoded["input_ids"])
    for begin, end in _turns(tokenizer, messages, text, options):
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin]
        if inside:
            assistant[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
    return ChatTokens(encoded["input_ids"], assistant)


def _marked(tokenizer: Any, messages: Messages, options: dict[str, Any]) -> ChatTokens:
    """Tokenize a chat whose template has `{% generation %}` marks."""
    found = _apply(tokenizer, messages, options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assistant = [bool(mark) for mark in found["assistant_masks"]]
    if not any(assistant) and any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            "the chat template has {% generation %} marks, but marks no token of the assistant's turns: put the "
            "content of the assistant's messages between {% generation %} and {% endgeneration %}."
        )
    return ChatTokens(found["input_ids"], assistant)


def _turns(tokenizer: Any, messages: Messages, text: str, options: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each turn of the assistant in the rendered chat."""
    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}, key=len, reverse=True)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _prompt(tokenizer, messages[:i], message, options)
        until = _render(tokenizer, messages[: i + 1], options)
        ends = [end for end in _ends(until, len(prompt), special) if text.startswith(until[:end])]
        if not until.startswith(prompt) or not ends:
            raise ValueError(
                f"the assistant's turn in message {i + 1} can't be located: the chat template renders the first "
                f"messages of a chat differently when other messages follow. {_ADVICE}"
            )
        yield len(prompt), ends[min(1, len(ends) - 1)]


def _ends(text: str, begin: int, special: Sequence[str]) -> list[int]:
    """The possible ends of a turn: the end of its content, then the end of each special token after the content."""
    # Without a special token, the turn ends with the text. The last special tokens may end the whole chat.
    position, ends = len(text), list[int]()
    while True:
        end = max(len(text[:position].rstrip()), begin)
        token = next((token for token in special if text.endswith(token, begin, end)), None)
        if token is None:
            return [end, *reversed(ends or [len(text)])]
        ends.append(end)
        position = end - len(token)


def _prompt(tokenizer: Any, before: Messages, message: dict[str, Any], options: dict[str, Any]) -> str:
    """Render the chat up to the content of an assistant's message."""
    if before:
        return _render(tokenizer, before, options, add_generation_prompt=True)
    # A template can't render an empty chat. The prompt is the common beginning of two chats with different first turns.
    one, other = (_render(tokenizer, [{**message, "content": content}], options) for content in ("0", "1"))
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)]


def _render(tokenizer: Any, messages: Messages, options: dict[str, Any], **more: Any) -> str:
    return _apply(tokenizer, messages, options, tokenize=False, **more)


def _apply(tokenizer: Any, messages: Messages, options: dict[str, Any], **more: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), **options, **more)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}.") from error

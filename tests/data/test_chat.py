"""The assistant's tokens of a chat are those that the template marks, or would mark."""

import pytest

from vera_func.data.chat import chat_tokens


# As the models' own templates write them; `{GEN}` and `{END}` stand where marks may be.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{GEN}{{ message['content'] + '<|im_end|>' }}{END}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}{GEN}{{ message['content'] | trim + '<|eot_id|>' }}{END}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{{ bos_token }}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{GEN}{{ ' ' + message['content'] + eos_token }}{END}{% endif %}{% endfor %}"
)
# What follows the last turn alone ends the chat.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{GEN}{{ message['content'] + '<|im_end|>' }}{END}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' }}{GEN}{{ message['content'] + '\n\n' }}{END}"
    "{% else %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA3, "mistral": MISTRAL, "phi 3": PHI3, "plain": PLAIN}


def marked(template):
    return template.replace("{GEN}", "{% generation %}").replace("{END}", "{% endgeneration %}")


def unmarked(template):
    return template.replace("{GEN}", "").replace("{END}", "")


def say(*contents, first="user"):
    """Turns of the user and the assistant."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


SYSTEM = {"role": "system", "content": "Answer in one word."}
CHATS = {
    "one turn": say("What is the capital of France?", "Paris."),
    "three turns": say("Hello", "Good day to you.", "Who are you?", "A model, née 2024: déjà vu 日本語!", "So?", "So."),
    "a system": [SYSTEM, *say("2 + 2?", "4", "And 3 + 3?", "6")],
    "the last word is the user's": say("Hi", "Hello", "Bye"),
    "one answer twice": say("Hi", "Hi", "Hi", "Hi"),
    "lines": say("List", "a\nb\n\nc", "More", "1.\n2."),
    "an empty answer": say("Say nothing", "", "Thanks", "ok"),
    "nothing of the assistant": say("Hi"),
}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of a few hundred merges, with the special tokens of the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    corpus = [message["content"] for chat in CHATS.values() for message in chat]
    bpe.train_from_iterator([*corpus, "user assistant system [INST] [/INST] ### Response: Instruction:"] * 3, trainer)
    # As Llama 3 has it: the tokens begin with <s> unless told otherwise.
    bpe.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistant_is_found_without_marks(tokenizer, name, chat):
    messages = CHATS[chat]
    oracle = with_template(tokenizer, marked(TEMPLATES[name])).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    right = [bool(mark) for mark in oracle["assistant_masks"]]
    if any(message["content"] for message in messages if message["role"] == "assistant"):
        found = chat_tokens(tokenizer, messages)
        assert (found.ids, found.assistant) == (oracle["input_ids"], right)
    found = chat_tokens(with_template(tokenizer, unmarked(TEMPLATES[name])), messages)
    assert (found.ids, found.assistant) == (oracle["input_ids"], right)
    said = "".join(tokenizer.decode([id]) for id, mark in zip(*found, strict=True) if mark)
    if name == "llama 3" and "日" not in said:
        answers = [message["content"] + "<|eot_id|>" for message in messages if message["role"] == "assistant"]
        assert said == "".join(answers)


@pytest.mark.parametrize("name", ["chatml", "llama 3", "plain"])
def test_a_chat_that_the_assistant_begins(tokenizer, name):
    messages = say("Welcome!", "Hi", "How can I help?", first="assistant")
    oracle = with_template(tokenizer, marked(TEMPLATES[name])).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    found = chat_tokens(with_template(tokenizer, unmarked(TEMPLATES[name])), messages)
    assert found == (oracle["input_ids"], [bool(mark) for mark in oracle["assistant_masks"]])


def test_words_like_special_tokens_end_nothing(tokenizer):
    """A user who writes special tokens does not move the assistant's turn."""
    messages = say("<|im_start|>assistant\nNo<|im_end|>", "Yes", "<|im_end|>", "Fine")
    found = chat_tokens(with_template(tokenizer, unmarked(CHATML)), messages)
    said = "".join(tokenizer.decode([id]) for id, mark in zip(*found, strict=True) if mark)
    assert said == "Yes<|im_end|>Fine<|im_end|>"


def test_options_reach_the_template(tokenizer):
    template = "{{ greeting }}" + unmarked(CHATML)
    ids = chat_tokens(with_template(tokenizer, template), say("Hi", "Hello"), greeting="Good morning.").ids
    assert tokenizer.decode(ids).startswith("Good morning.")


# The system's message goes with the last turn of the user (Mistral v0.3), thoughts only with the last answer (Qwen 3).
LAST_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content if loop.last else '' }}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTED = "{{ messages | length }} messages: {% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
NO_MARK = "<s><s>{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"

SPLIT = r"can't be located: .* differently when other messages follow.*Use a template with \{% generation"
TWO = say("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (LAST_SYSTEM, [SYSTEM, *TWO], SPLIT),
        (THOUGHTS, TWO, SPLIT),
        (COUNTED, TWO, SPLIT),
        (
            unmarked(MISTRAL),
            [*say("a", "b"), *say("c", first="assistant")],
            "refuses the messages: roles must alternate",
        ),
        (NO_MARK, TWO, "marks no token of the assistant"),
        (unmarked(CHATML), [], "has no messages"),
        (None, TWO, "has no chat template"),
    ],
)
def test_refused(tokenizer, template, messages, message):
    with pytest.raises(ValueError, match=message):
        chat_tokens(with_template(tokenizer, template), messages)


def test_a_template_may_think_in_the_last_turn_alone(tokenizer):
    """As long as no earlier turn is rendered otherwise."""
    found = chat_tokens(with_template(tokenizer, THOUGHTS), say("a", "b"))
    said = "".join(tokenizer.decode([id]) for id, mark in zip(*found, strict=True) if mark)
    assert said == "<think>b<|im_end|>"

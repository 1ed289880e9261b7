"""Data and base models for adapters of language models, for the command line and the notebooks.

Rows: `files` reads rows, `kinds` checks them, and `dataset` does both. `assets` downloads the data of the demo and the
notebooks; `examples` and `samples` convert them to rows.

Tokens: `tokens`, `chat`, `packing`, `batches` and `objective` are for texts, chats and preferences; `prompts`, `task`
and `answers` are for texts with labels.

Models: `models` loads a base model, and `smollm2` loads the model of the demo. `sources` loads adapters with their
`metadata`. `harness` evaluates adapters with lm-evaluation-harness.
"""

"""Data and base models for adapters of language models, for the command line and the notebooks.

Rows: `files` reads them, `kinds` checks them, and `dataset` combines both. `examples` and `samples` are the data of
the demo and the notebooks, and `assets` downloads it.

Tokens: `tokens`, `chat`, `packing`, `batches` and `objective` are for texts, chats and preferences; `prompts`, `task`
and `answers` for texts with labels.

Models: `models` loads a base model, `smollm2` the one of the demo, and `sources` the adapters over it, with their
`metadata`. `harness` evaluates them with lm-evaluation-harness.
"""

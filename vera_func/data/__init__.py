"""Load data sets, base models and adapters for the command line and the notebooks.

Rows: `files` reads rows, `kinds` checks rows, and `dataset` reads and checks a data set. `assets` downloads the data of
the demo and the notebooks; `examples` and `samples` convert the data to rows.

Tokens: `tokens`, `chat`, `packing`, `batches` and `objective` implement language modelling and preferences (DPO).
`prompts`, `task` and `answers` implement text classification.

Models: `models` loads a base model, and `smollm2` loads the model of the demo. `sources` loads adapters with their
`metadata`. `harness` evaluates adapters with lm-evaluation-harness.
"""

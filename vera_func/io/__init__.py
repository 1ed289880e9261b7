"""Read and write files: PEFT adapter directories, adapter banks, LoRA directories, quantized models.

PEFT's format: `checkpoint` (with `config`, `check`, `peft_keys` and `card`), `peft` for a model in memory, `hub` and
`push` for the Hugging Face hub, `module` for transformers' Trainer. Many adapters in one file: `bank` (with
`bank_header`). LoRA for other tools: `lora`, `gguf_lora`, `servers`. Quantized models: `quantized`. `files` contains
the atomic file writes.
"""

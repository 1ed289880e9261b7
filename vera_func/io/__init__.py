"""Read and write files: PEFT adapter directories, adapter banks, LoRA directories, quantized models.

`checkpoint` reads and writes PEFT directories, with the helpers `config`, `check`, `peft_keys` and `card`. `peft`
converts a `PeftModel` in memory. `hub` downloads from the Hugging Face hub, and `push` uploads to it. `module` makes an
`nn.Module` for transformers' Trainer. `bank` (with `bank_header`) stores many adapters in one file. `lora` and
`gguf_lora` export LoRAs, and `servers` checks which inference servers refuse a LoRA. `quantized` stores quantized
models. `files` writes files atomically.
"""

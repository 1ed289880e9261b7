"""Read and write files: PEFT adapter directories, adapter banks, LoRA directories, quantized models."""

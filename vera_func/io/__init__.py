"""Files: PEFT's adapter directories, adapter banks, LoRA directories."""

"""What a user of a language model has: texts with labels, prompts, models, and the adapters that a command names."""

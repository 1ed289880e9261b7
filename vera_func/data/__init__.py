"""Language-model data: labelled examples, prompts, base models, and adapters with their metadata."""

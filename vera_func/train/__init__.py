"""Training: a pure AdamW, the loop `fit`, sweeps, and the processes of torchrun."""

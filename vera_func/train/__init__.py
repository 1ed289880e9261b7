"""Training: optimizers, the training loop, sweeps, and several processes under torchrun."""

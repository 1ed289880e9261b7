"""Training: losses, optimizers, the training loop, sweeps, and several processes under torchrun.

`fit` contains the training loop, and `run` the state of a run. `gradient` computes the gradient of a training step, and
`optim` the update. `losses` and `chunked` compute losses of language models. `checkpointing` saves memory. `sweep`,
`best` and `schedules` support runs of several adapters. `distributed` supports several processes. `per_example`
computes the per-example gradients for `privacy` and `influence`. `evolve` trains without gradients.
"""

"""Training: losses, optimizers, the training loop, sweeps, and several processes under torchrun.

`fit` contains the training loop, and `run` the state of a run. `gradient` computes the gradient of a training step, and
`optim` the update. `schedules` contains learning-rate schedules, and `order` the order of the examples. `losses`,
`preferences` and `chunked` compute losses of language models. `checkpointing` saves memory. `sweep` builds grids of
hyper-parameters and tables of results. `best` keeps the params with the lowest metric. `distributed` supports several
processes. `per_example` computes the per-example gradients for `privacy` and `influence`. `evolve` trains without
gradients.
"""

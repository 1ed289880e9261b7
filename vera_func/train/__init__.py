"""Training: losses, optimizers, the training loop, sweeps, and several processes under torchrun.

`fit` is the loop and `run` its state. A step computes its gradient in `gradient`, and its update in `optim`. `losses`
(with `chunked`) has the losses of language models, and `checkpointing` saves memory. `sweep`, `best` and `schedules`
are for runs of several adapters, and `distributed` is for several processes. `per_example`, `privacy` and `influence`
use the gradient of each example; `evolve` needs no gradients.
"""

"""Small training runs that the tests of `fit` share."""

from functools import partial

import torch

import vera_func as vf
from vera_func.private import tree_leaves
from vera_func.train.fit import batch_indices
from vera_func.train.optim import linear_warmup_cosine


N = 8
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
GENERATOR = torch.Generator().manual_seed(0)
A, B, W = (torch.randn(*s, generator=GENERATOR) for s in ((3, 5), (7, 3), (7, 5)))
INPUTS, TARGETS = torch.randn(11, 5, generator=GENERATOR), torch.randn(11, 7, generator=GENERATOR)
fit = partial(vf.fit, progress=False)


def loss_of_one(params, batch):
    x, y = batch
    hidden = params["lambda_d"] * (x @ A.T)
    return (x @ W.T + params["lambda_b"] * (hidden @ B.T) - y).square().mean()


def loss_of_many(in_dims):
    return torch.func.vmap(loss_of_one, in_dims=(0, in_dims))


def start(*n):
    return {"lambda_b": torch.zeros(*n, 7), "lambda_d": torch.full((*n, 3), 0.1)}


def row(tree, i):
    return {k: leaf[i] for k, leaf in tree.items()}


def shared(step):
    rows = batch_indices(step, num_examples=11, batch_size=4, key=0)
    return INPUTS[rows], TARGETS[rows]


def own(step, adapter):
    rows = batch_indices(step, num_examples=11, batch_size=4, key=adapter)
    return INPUTS[rows], TARGETS[rows]


def everyones_own(step):
    x, y = zip(*(own(step, i) for i in range(N)), strict=True)
    return torch.stack(x), torch.stack(y)


def same(a, b):
    """Bit for bit, NaN included."""
    return all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(123.0), y.nan_to_num(123.0))
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


def metric_of(best_at):
    """Falls until `best_at[i]` updates, then rises; a plateau and NaN are no progress."""
    best_at = torch.tensor(best_at)
    return lambda params, step: (step - best_at).abs().float()


OPTIONS = {
    "learning_rate": RATES[-3:],
    "weight_decay": 0.1,
    "max_norm": 0.3,
    "num_adapters": 3,
    "schedule": partial(linear_warmup_cosine, warmup=2, total=12),
    "evaluate": metric_of([2, 7, 99]),
    "evaluate_every": 2,
    "patience": 2,
}

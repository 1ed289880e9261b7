"""Rows are followed through operations: what `Follower` says is held against tensors that hold the row's number."""

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, pad, softmax

from vera_func.model.rows.follow import NOWHERE, Follower, Lost, Place, mark, place_of
from vera_func.private import fake_tensors, watch_operations


B = 7
ORDER = torch.tensor([2, 0, 1, 4, 3, 6, 5])


def numbered(*shape, axis=0):
    """A tensor whose entries are the row that they belong to."""
    sizes = [1] * len(shape)
    sizes[axis] = B
    return torch.arange(B, dtype=torch.float64).reshape(sizes).expand(shape).clone()


def followed(function, *inputs, axis=0):
    for x in inputs:
        mark(x, Place(axis, 1))
    with torch.no_grad(), watch_operations(Follower(B)):
        return function(*inputs)


def by_data(x, order=ORDER):
    """An index that depends on the rows: the numbers of `order`, by way of `x`."""
    return (x.reshape(B, -1)[:, 0] * 0).long() + order


# Functions of a tensor (7, 3, 4) whose result holds each row's number where that row is.
KEPT = {
    "an activation": torch.relu,
    "a sum with a constant": lambda x: x + torch.zeros(3, 4, dtype=x.dtype),
    "a transposition": lambda x: x.transpose(0, 1),
    "a permutation": lambda x: x.permute(2, 0, 1),
    "t": lambda x: x[:, 0].t(),
    "flattened": lambda x: x.flatten(0, 1),
    "flattened, seq first": lambda x: x.transpose(0, 1).reshape(21, 4),
    "flattened and back": lambda x: x.flatten(0, 1).relu().view(B, 3, 4),
    "heads": lambda x: x.view(B, 3, 2, 2).transpose(1, 2).reshape(2 * B, 3, 2),
    "heads and back": lambda x: x.view(B, 3, 2, 2).transpose(1, 2).reshape(2 * B, 3, 2).view(B, 2, 3, 2),
    "windows": lambda x: x.view(B, 3, 2, 2).permute(0, 2, 1, 3).reshape(-1, 3, 2),
    "squeezed": lambda x: x.unsqueeze(1).unsqueeze(0).squeeze(0),
    "expanded": lambda x: x.unsqueeze(1).expand(B, 5, 3, 4),
    "repeated": lambda x: x.repeat(1, 2, 1),
    "tiled": lambda x: x.repeat(2, 1, 1),
    "tiled and cut": lambda x: x.repeat(2, 1, 1).chunk(2)[1],
    "repeated row by row": lambda x: x.repeat_interleave(3, 0),
    "selected": lambda x: x[:, 1],
    "sliced": lambda x: x[:, 1:],
    "all rows": lambda x: x[:],
    "unbound": lambda x: x.unbind(1)[2],
    "split": lambda x: x.split([1, 2], 1)[1],
    "joined": lambda x: torch.cat([x, x]),
    "joined and cut": lambda x: torch.cat([x, x, x]).chunk(3)[1],
    "joined and taken apart": lambda x: torch.cat([x, x]).view(2, B, 3, 4),
    "concatenated": lambda x: torch.cat([x, x], -1),
    "stacked": lambda x: torch.stack([x, x], 1),
    "split by rows and joined": lambda x: torch.cat(x.split([2, 4, 1])),
    "cut within rows and joined": lambda x: torch.cat(x.flatten(0, 1).split([5, 7, 9])),
    "row by row, flattened": lambda x: torch.cat(x.unbind()),
    "row by row": lambda x: torch.stack([x[i] for i in range(B)]),
    "a mean": lambda x: x.mean(1),
    "a maximum": lambda x: x.max(-1).values,
    "an argmax": lambda x: x.mean(-1)[torch.arange(B), x.argmax(1)[:, 0]],
    "padded": lambda x: pad(x, (1, 1))[..., 1:-1],
    "an embedding": lambda x: embedding(x.long(), torch.arange(8.0)[:, None].expand(8, 5)),
    "a linear layer": lambda x: nn.functional.linear(x, torch.eye(4, dtype=x.dtype)),
    "a batch of products": lambda x: torch.einsum("bsf,bst->bft", x, torch.eye(3, dtype=x.dtype).expand(B, 3, 3)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "eager attention": lambda x: softmax(torch.bmm(x, x.mT), -1) @ x,
    "a convolution": lambda x: nn.functional.conv1d(x, torch.eye(3, dtype=x.dtype)[..., None]),
    "a new tensor": lambda x: torch.zeros_like(x).copy_(x),
    "written to": lambda x: x.new_zeros(5, *x.shape).index_copy(0, torch.tensor([3]), x[None])[3],
    "sorted along the sequence": lambda x: x.sort(1).values.flip(1).roll(1, 1),
    "picked along the sequence": lambda x: x[:, by_data(x)[:3] % 3].gather(1, torch.zeros_like(x).long()),
    "picked by a constant": lambda x: x.index_select(0, torch.arange(B).flip(0).flip(0)),
    "repeated by a constant": lambda x: x[torch.arange(B).repeat_interleave(2)],
    "one hot": lambda x: nn.functional.one_hot(x.long(), 8).argmax(-1),
    "moved and put back": lambda x: put_back(x, lambda order: order.argsort()),
    "put back by a sort": lambda x: put_back(x, lambda order: order.sort().indices),
    "put back by an inverse": lambda x: put_back(x, inverse),
    "put back by the index": lambda x: put_back_by_the_index(x),
    "put back by a mask": lambda x: put_back_by_a_mask(x),
    "picked by experts": lambda x: experts(x, lambda y: y),
    "picked by a mask, as many of each": lambda x: x[x[..., 0] > -1][: 3 * B].view(B, -1, 4),
    "chunks": lambda x: x.unfold(1, 2, 1),
    "strides": lambda x: x.as_strided((B, 2, 4), (12, 4, 1)),
}


def order_of(x):
    return (-x[:, 0, 0]).argsort()


def put_back(x, inverse):
    order = order_of(x)
    return x.index_select(0, order).relu()[inverse(order)]


def inverse(order):
    out = torch.empty_like(order)
    out[order] = torch.arange(len(order))
    return out


def put_back_by_the_index(x):
    order = order_of(x)
    return torch.zeros_like(x).index_copy(0, order, x[order] * 1.0)


def put_back_by_a_mask(x):
    mask, out = x[..., 0] > 2, x.clone()
    out[mask] = x[mask].relu()
    return out


# Results in which rows are in another order, or in one that no shape and no name of an operation tells.
MOVED = {
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(2, 0),
    "rolled by hand": lambda x: torch.cat([x[1:], x[:1]]),
    "halves exchanged": lambda x: torch.cat([x[4:], x[:4]]),
    "sorted": lambda x: x.sort(0, descending=True).values,
    "moved by data": lambda x: x[by_data(x)],
    "moved by an argsort": lambda x: x.index_select(0, (-x[:, 0, 0]).argsort()),
    "moved by a constant": lambda x: x[torch.arange(B).flip(0)],
    "moved by random numbers": lambda x: x[torch.randperm(B)],
    "gathered": lambda x: x.gather(0, by_data(x)[:, None, None].expand(x.shape)),
    "put elsewhere": lambda x: torch.zeros_like(x).index_copy(0, by_data(x), x),
    "moved in a view": lambda x: moved_in_a_view(x),
    "moved while flattened": lambda x: x.flatten(0, 1)[by_data(x).repeat(3)],
    "moved, and something done": lambda x: (x[by_data(x)] * 2).transpose(0, 1).softmax(-1),
    "between rows": lambda x: (x[:, 0] @ x[:, 0].T) * 1.0,
    "what experts get": lambda x: picked(x),
    "windows of rows": lambda x: pad(x.unfold(0, 2, 1).movedim(-1, 0), (0, 0, 0, 0, 0, 1)),
    "parts joined in another order": lambda x: torch.cat(x.split([2, 4, 1])[::-1]),
    "a part in place of another": lambda x: torch.cat([x.split(1)[0], *x.split(1)[:-1]]),
    "parts of two tensors": lambda x: torch.cat([*x.split([2, 5])[:1], *x.flip(0).split([2, 5])[1:]]),
    "parts overwritten": lambda x: torch.cat([part.copy_(x[by_data(x)][:1]) for part in x.split(1)]),
    "joined with others": lambda x: torch.cat([x, x[:1], x[1:]]),
    "moved twice": lambda x: x[order_of(x)][order_of(x)],
    "moved twice, by data": lambda x: x[by_data(x)][by_data(x, ORDER.argsort())],
    "put back as if it were a permutation": lambda x: x[by_data(x)][by_data(x).argsort()],
    "put back the wrong way round": lambda x: put_back(x, lambda order: order.argsort(descending=True)),
    "put back by another mask": lambda x: x.clone().masked_scatter(x > 2, x[x > 1]),
}


def moved_in_a_view(x):
    out = torch.zeros_like(x)
    out[:, 0] = x[by_data(x)][:, 0]
    return out + 0


def picked(x):
    tokens = x.flatten(0, 1)
    return tokens[(tokens[:, 0] % 2 == 0).nonzero()[:, 0]]


def experts(x, expert):
    """Tokens go to one of two experts, and back to where they were."""
    tokens = x.flatten(0, 1)
    out = torch.zeros_like(tokens)
    for odd in (0, 1):
        (where,) = torch.where(tokens[:, 0] % 2 == odd)
        out.index_add_(0, where, expert(tokens[where]))
    return out.view(x.shape)


@pytest.mark.parametrize("case", KEPT)
def test_the_place_is_where_the_rows_are(case):
    out = followed(KEPT[case], numbered(B, 3, 4))
    place = place_of(out)
    assert isinstance(place, Place)
    assert place.axis >= 0, place
    size = out.shape[place.axis]
    assert place.inner is not None or size == B
    expected = torch.arange(size) // (place.inner or 1) % B
    numbers = out.double().movedim(place.axis, 0).reshape(size, -1)
    assert torch.equal(numbers.round(), expected.double()[:, None].expand_as(numbers))


@pytest.mark.parametrize("case", MOVED)
def test_rows_in_another_order_are_lost(case):
    assert isinstance(place_of(followed(MOVED[case], numbered(B, 3, 4))), Lost)


NEED_VALUES = {
    "put back by a mask",
    "picked by experts",
    "picked by a mask, as many of each",
    "repeated by a constant",
    "picked by a constant",
}


@pytest.mark.parametrize("case", [case for case in KEPT if case not in NEED_VALUES])
def test_tensors_without_values_are_followed_alike(case):
    real = place_of(followed(KEPT[case], numbered(B, 3, 4)))
    with fake_tensors():
        fake = place_of(followed(KEPT[case], numbered(B, 3, 4)))
    assert fake == real


@pytest.mark.parametrize("case", sorted(MOVED.keys() - {"what experts get", "put back by another mask"}))
def test_lost_rows_are_lost_without_values(case):
    with fake_tensors():
        assert isinstance(place_of(followed(MOVED[case], numbered(B, 3, 4))), Lost)


@pytest.mark.parametrize(
    ("function", "place"),
    [
        (lambda x: x.mean(), NOWHERE),
        (lambda x: x[0], NOWHERE),
        (lambda x: x[:1].expand(3, 3, 4), NOWHERE),
        (lambda x: torch.arange(3), None),
    ],
)
def test_other_places(function, place):
    found = place_of(followed(function, numbered(B, 3, 4)))
    assert found == place
    for function in (lambda x: x[x[..., 0] > 2], lambda x: x[x[..., 0] > 2].relu()):
        found = place_of(followed(function, numbered(B, 3, 4)))
        assert isinstance(found, Lost)
        assert found.by_mask


@pytest.mark.parametrize("case", ["flattened", "attention", "a mean", "eager attention", "selected", "an argmax"])
def test_rows_on_another_axis(case):
    turned = lambda x: KEPT[case](x.transpose(0, 1))
    out = followed(turned, numbered(3, B, 4, axis=1), axis=1)
    assert place_of(out) == place_of(followed(KEPT[case], numbered(B, 3, 4)))


def test_an_empty_cache():
    out = followed(lambda x: torch.cat([x[:, :0].transpose(1, 2), x.transpose(1, 2)], 2), numbered(B, 3, 4))
    assert place_of(out) == Place(0, 1)
    assert isinstance(place_of(followed(lambda x: x[:, :0].reshape(B, 0, 2, 2), numbered(B, 3, 4))), Place)

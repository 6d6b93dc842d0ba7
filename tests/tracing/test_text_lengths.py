"""Texts of other lengths than the example's: batches that are padded to their longest one."""

import copy

import pytest
import torch
from support import laws
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan

PLAN = Plan(local=LocalPrefix("last", Freeze()))


def ids(rows, length):
    return torch.randint(0, 7, (rows, length))


def mask(rows, length):
    return torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1))


class Text(nn.Module):
    """Embeds token ids; ``body`` says what follows."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.embed, self.places = nn.Embedding(7, 6), nn.Embedding(16, 6)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)
        self.register_buffer("table", torch.arange(16)[None])
        self.embed.requires_grad_(False)

    def forward(self, ids, *others):
        if not isinstance(ids.shape[1], (int, torch.SymInt)):  # a proxy is neither: export follows
            raise TypeError
        return self.last(torch.tanh(self.first(self.body(self, self.embed(ids), *others))))


def masked(net, h, mask):
    weight = mask[:, None, None, :].expand(-1, 1, h.shape[1], -1)
    q = h[:, None]
    return F.scaled_dot_product_attention(q, q, q, attn_mask=weight)[:, 0]


def causal(net, h):
    length = h.shape[1]
    places = torch.arange(length)
    later = torch.full((length, length), float("-inf")).triu(1)
    scores = h @ h.mT + later + (places[None] - places[:, None]).abs()
    return scores.softmax(-1) @ h


def sliced(net, h):
    return h + net.places(net.table[:, : h.shape[1]])


def expanded(net, h):
    table = net.table[:, : h.shape[1]]
    return h + net.places(table.expand(h.shape[0], -1))


def by_length(net, h):
    return h * 2 if h.shape[1] > 4 else h


def joined(net, h, other):
    h = torch.cat([h, net.embed(other)], 1)
    return h.view(h.shape[0] * h.shape[1], -1).view_as(h)


def in_chunks(net, h):
    return h.view(h.shape[0], -1, 4, 6).cumsum(2).view_as(h) if h.shape[1] % 4 == 0 else h


def odd(net, h):
    return h * 2 if h.shape[1] % 100 == 0 else h


def in_hundreds(net, h):
    return h * 2 if h.shape[1] % 100 == 0 and h.shape[1] > 7 else h


def one_apart(net, h):
    return h if h.shape[1] == 100 else h * 2


def in_parts(net, h):
    return sum(part.mean(1) for part in h.chunk(4, 1))


def in_time(net, h):
    state = h[:, 0]
    for i in range(h.shape[1]):
        state = torch.tanh(state + h[:, i])
    return state[:, None] + h


def windowed(net, h):
    window = h[:, : min(h.shape[1], 16)]
    return h + window.reshape(window.shape[0] * window.shape[1], -1).view(h.shape)


def squeezed(net, h):
    return h + h.sum(2).squeeze()[..., None]


def steps_agree(net, model, eager, *batch):
    with torch.no_grad():
        h = torch.tanh(eager.first(eager.body(eager, eager.embed(batch[0]), *batch[1:])))
    wanted = eager.last(h)
    output = net(*batch)
    laws.assert_equal(output, wanted, "output")
    for one in (output, wanted):
        one.square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        laws.assert_equal(mine.grad, theirs.grad, name)


ANY = {
    "mask": (masked, lambda rows, length: (ids(rows, length), mask(rows, length))),
    "causal": (causal, lambda rows, length: (ids(rows, length),)),
    "two texts": (joined, lambda rows, length: (ids(rows, length), ids(rows, length + 2))),
    "two alike": (joined, lambda rows, length: (ids(rows, length), ids(rows, length))),
}


def made(body):
    torch.manual_seed(0)
    model = Text(body)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("example", [(2, 9), (1, 5)], ids=str)
@pytest.mark.parametrize("name", ANY)
def test_every_length_is_right(name, example):
    if name == "mask" and example[0] == 1 and torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 lets no other mask stand for a mask of one row")
    body, batch = ANY[name]
    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, *batch(*example))
    for rows, length in (example, (3, 14), (1, 9), (1, 2), (5, 3)):
        steps_agree(net, model, eager, *batch(rows, length))


BOUNDED = {
    "a table's slice": (sliced, (2, 9), [(3, 16), (1, 2)], (2, 17), "0 to 16 in dimension 1"),
    "a table's rows": (expanded, (2, 9), [(3, 16), (1, 3)], (2, 17), "to 16 in dimension 1"),
    "a window": (windowed, (2, 9), [(3, 16), (1, 2)], (2, 17), "to 16 in dimension 1"),
    "longer ones": (by_length, (2, 9), [(2, 5), (1, 40)], (2, 4), "5 to any in dimension 1"),
    "shorter ones": (by_length, (2, 3), [(2, 4), (1, 2)], (2, 5), "to 4 in dimension 1"),
    "chunks": (in_chunks, (2, 8), [(3, 8), (1, 8)], (2, 9), "a size of 8 in dimension 1"),
    "no hundreds": (odd, (2, 9), [(3, 99), (1, 2)], (2, 100), "to 99 in dimension 1"),
    "above a hundred": (odd, (2, 130), [(3, 199)], (2, 100), "101 to 199 in dimension 1"),
    "hundreds": (in_hundreds, (2, 100), [(1, 100)], (2, 99), "a size of 100 in dimension 1"),
    "one apart": (one_apart, (2, 9), [(3, 99), (1, 2)], (2, 100), "to 99 in dimension 1"),
    "below one": (one_apart, (2, 130), [(3, 300)], (2, 100), "101 to any in dimension 1"),
    "a long example": (by_length, (2, 3000), [(1, 5)], (2, 4), "5 to any in dimension 1"),
    "parts": (in_parts, (2, 6), [(3, 5)], (2, 4), "5 to 6 in dimension 1"),
    "a loop": (in_time, (2, 5), [(3, 5), (1, 5)], (2, 6), "a size of 5 in dimension 1"),
    "squeeze": (squeezed, (2, 5), [(3, 5), (2, 8)], (1, 5), "2 to any in dimension 0"),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_lengths_that_the_model_treats_otherwise_are_refused(name):
    if name == "a window" and torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 fixes the length by the reshape of a window")
    body, example, right, wrong, told = BOUNDED[name]
    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(*example))
    for rows, length in (example, *right):
        steps_agree(net, model, eager, ids(rows, length))
    with pytest.raises(RuntimeError, match=told):
        net(ids(*wrong))


def test_inputs_that_were_alike_have_to_be():
    model, _ = made(masked)
    net = fxlocal.transform(model, PLAN, ids(2, 9), mask(2, 9))
    with pytest.raises(RuntimeError, match=r"is the 7 in dimension 1 of one of shape \(2, 7\)"):
        net(ids(2, 7), mask(2, 6))


def budget(net, h, other):
    h = torch.cat([h, net.embed(other)], 1)
    return h[:, -20:] if h.shape[1] > 20 else h


def as_many(net, h, other):
    other = net.embed(other)
    return h + other.mean(1, keepdim=True) * (2 if h.numel() == other.numel() else 1)


@pytest.mark.parametrize("body", [budget, as_many])
def test_what_is_asked_of_two_lengths_fixes_both(body):
    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(2, 9), ids(2, 7))
    steps_agree(net, model, eager, ids(3, 9), ids(3, 7))
    with pytest.raises(RuntimeError, match=r"a size of (9|7) in dimension 1"):
        net(ids(2, 12), ids(2, 12))


def test_images_stay_as_large_as_the_example():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, labels):
            if not isinstance(x.shape[2], (int, torch.SymInt)):
                raise TypeError
            return F.cross_entropy(self.conv(x), labels)

    net = fxlocal.transform(Image(), Plan(), torch.rand(2, 3, 8, 8), torch.zeros(2, 6, 6).long())
    with pytest.raises(RuntimeError, match="a size of 8 in dimension 2"):
        net(torch.rand(2, 3, 9, 9), torch.zeros(2, 7, 7).long())

"""What a forward does by torch.func: masks of indices are written out, all else is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask

import fxlocal
from fxlocal import CaptureError, Freeze, LocalPrefix, Plan


class Masked(nn.Module):
    """Mixes the rows of a text as far as the mask that ``body`` makes lets it."""

    def __init__(self, body):
        super().__init__()
        self.body, self.a, self.b, self.c = body, *(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, padding):
        if x.shape[0] < 1:  # so that torch.export captures
            raise ValueError
        y = self.b(self.a(x).relu())
        return self.c(self.body(y, padding).float() @ y)


def by_flex_attention(x, padding):
    def allowed(b, h, q, k):
        return padding[b, k] & (k <= q) | (padding[0, 0] & (q - k < 2))

    return create_mask(allowed, x.shape[0], 1, x.shape[1], x.shape[1], device="cpu")[:, 0]


def without_a_batch(x, padding):
    def allowed(b, h, q, k):
        return torch.where(k > q, k, 0) < q.new_ones((), dtype=torch.int64) * 2

    return create_mask(allowed, 1, 1, x.shape[1], x.shape[1], device="cpu")[0, 0].view(5, 5)


def by_vmap(x, padding):
    places = torch.arange(x.shape[1])
    rows = torch.vmap(torch.vmap(lambda q, k: (k == q) | (k == 2), (None, 0)), (0, None))
    with torch.no_grad():
        return rows(places, places) & padding[:, None]


@pytest.mark.parametrize("body", [by_flex_attention, without_a_batch, by_vmap])
def test_a_mask_of_indices_is_that_of_the_model(body):
    model = Masked(body)
    net = fxlocal.capture(model, torch.randn(2, 5, 8), torch.rand(2, 5) > 0.5)
    assert not any(
        "_functorch" in str(getattr(n.target, "__module__", "")) for n in net.graph.nodes
    )
    for rows in (2, 3, 1):
        x, padding = torch.randn(rows, 5, 8), torch.rand(rows, 5) > 0.5
        wanted = torch.autograd.grad(model(x, padding).sum(), list(model.parameters()))
        found = torch.autograd.grad(net(x, padding).sum(), list(net.parameters()))
        assert torch.equal(net(x, padding), model(x, padding))
        assert all(map(torch.equal, found, wanted))


def test_layers_before_a_mask_learn_locally():
    model, x = Masked(by_flex_attention), (torch.randn(2, 5, 8), torch.rand(2, 5) > 0.5)
    net = fxlocal.transform(copy.deepcopy(model), Plan(local=LocalPrefix("b", Freeze())), *x)
    net(*x).sum().backward()
    learns = {n for n, p in net.source_model.named_parameters() if p.grad is not None}
    assert learns == {"b.weight", "b.bias", "c.weight", "c.bias"}


class Uses(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.a = function, nn.Linear(8, 8)

    def forward(self, x):
        if x.shape[0] < 1:  # so that torch.export captures
            raise ValueError
        x = self.a(x)
        return self.function(x)


OF_MORE = {
    "rows": lambda x: torch.vmap(lambda row: row.softmax(0))(x),
    "floats": lambda x: torch.vmap(lambda v: v * 2)(x[0]),
    "between": lambda x: torch.vmap(lambda q: torch.vmap(lambda k: k + q)(q + P).sum())(P),
    "of two dtypes": lambda x: torch.vmap(lambda v: v + (x > 0).sum())(P.int()),
    "random": lambda x: torch.vmap(lambda v: v + torch.randint(9, ()), randomness="same")(P),
    "in place": lambda x: torch.vmap(lambda v: v.add_(1))(P.clone()),
    "within no_grad": torch.no_grad()(lambda x: torch.vmap(lambda row: row.cumsum(0))(x)),
}
P = torch.arange(4)


@pytest.mark.parametrize("name", OF_MORE)
def test_another_vmap_is_refused_at_its_line(name):
    with pytest.raises(CaptureError, match=r"uses torch\.vmap at \S+test_torch_func.py:\d+: "):
        fxlocal.capture(Uses(OF_MORE[name]), torch.randn(2, 8))


DERIVATIVES = {
    "grad": (lambda x: x + torch.func.grad(lambda z: (z**3).sum())(x), r"func\.grad"),
    "vjp": (lambda x: torch.func.vjp(lambda z: z**3, x)[1](x)[0], r"vjp"),
    "jacrev": (lambda x: torch.func.jacrev(lambda z: z**3)(x[0]).sum() + x, r"jacrev"),
    "jvp": (lambda x: torch.func.jvp(lambda z: z**3, (x,), (x,))[1], r"func\.jvp"),
    "jacfwd": (lambda x: torch.func.jacfwd(lambda z: z**3)(x[0]).sum() + x, r"jacfwd"),
    "of rows": (lambda x: torch.vmap(torch.func.grad(lambda z: (z**3).sum()))(x), r"func\.grad"),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_is_refused_by_name_and_line(name):
    function, told = DERIVATIVES[name]
    with pytest.raises(CaptureError, match=rf"a derivative at \S+test_torch_func.py:.*{told}"):
        fxlocal.capture(Uses(function), torch.randn(2, 8))
    assert torch._C._functorch.peek_interpreter_stack() is None

"""What torch.export takes on its own, it takes here: operators, recurrent layers, equal batches."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan

PLAN = Plan(local=LocalPrefix(1, Freeze()))


@torch.library.custom_op("fxlocal_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


double.register_autograd(lambda ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: None)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, *others):
        x = self.a(x) if x.shape[1] > 3 else x  # which symbolic tracing cannot follow
        return self.c(self.between(self.b(x), *others))


class Doubled(Layers):
    def between(self, x):
        return double(x)


class Drawn(Layers):
    def between(self, x, generator=None):
        return x + 0 * torch.randn(x.shape, generator=generator)


class Recurrent(Layers):
    def __init__(self, kind):
        super().__init__()
        self.inner = getattr(nn, kind)(8, 8, 2, batch_first=True)

    def between(self, x):
        return self.inner(x)[0]


class EqualBatch(Layers):
    """Gives one input the batch of the other, as diffusion models do with their time."""

    def between(self, x, time):
        return x + time.view(x.shape[0], -1, 8)


class Table(Layers):
    """Adds a table whose rows are none of the batch."""

    def between(self, x, table):
        return x + table


def batch(size, *others):
    return torch.randn(size, 5, 8), *others


def same(model, inputs):
    network = fxlocal.transform(model, PLAN, *inputs(2))
    assert network.meta["captured"].meta["captured_with"] == "by torch.export"
    for size in (2, 3):
        given = inputs(size)
        found, wanted = network(*given), model(*given)
        torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert model.a.weight.grad is None and model.c.weight.grad is not None


@pytest.mark.filterwarnings("error:.*the batch's size")
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Doubled(), batch),
        (Drawn(), batch),
        *((Recurrent(kind), batch) for kind in ("LSTM", "GRU", "RNN")),
        (EqualBatch(), lambda size: batch(size, torch.randn(size, 8))),
        (Table(), lambda size: batch(size, torch.randn(5, 8))),
    ],
    ids=lambda value: getattr(value, "inner", value).__class__.__name__,
)
def test_it_computes_the_same(model, inputs):
    same(model, inputs)


class TableFirst(Layers):
    """Makes a number of the batch's size, behind a table whose rows are none of it."""

    def forward(self, table, x):
        return self.c(self.b(self.a(x)) + table).reshape(len(x) if x.shape[1] > 3 else 0, -1)


def test_a_batch_that_is_fixed_is_told_of_behind_a_table_too():
    with pytest.warns(UserWarning, match="a number of the batch's size"):
        fxlocal.transform(TableFirst(), PLAN, torch.randn(5, 8), *batch(2))


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_functions_of_other_threads_run_meanwhile():
    done = []

    class Starts(nn.Module):
        def forward(self, x):
            thread = threading.Thread(
                target=lambda: done.append(Function.apply(torch.ones(1, requires_grad=True)))
            )
            thread.start()
            thread.join()
            return x * 2

    fxlocal.capture(Starts())
    assert torch.equal(done[0], torch.full((1,), 2.0))


class Config:
    """Raises where an attribute that it has is read, as configs that differ by layer do."""

    def __init__(self):
        self.width = 3

    def __getattribute__(self, name):
        if name == "width":
            raise ValueError("ask for the width of a layer")
        return super().__getattribute__(name)


class Configured(Layers):
    def __init__(self):
        super().__init__()
        self.config = Config()

    def between(self, x):
        try:
            return x * self.config.width
        except ValueError:
            return x


def test_a_config_may_raise_what_it_likes():
    same(Configured(), batch)


class LeavesOut(nn.Module):
    """Leaves its mask out where nothing is masked, and treats none otherwise: by ``causal``."""

    def __init__(self, causal, drop=0.0):
        super().__init__()
        self.a, self.b, self.causal, self.drop = nn.Linear(8, 8), nn.Linear(8, 3), causal, drop
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, padding):
        x = F.dropout(self.a(x), self.drop)
        self.calls.add_(1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        mask = (mask.tril() if self.causal else mask) & padding[:, None]
        if not torch.compiler.is_compiling() and padding.all():
            mask = None
        return self.b(F.scaled_dot_product_attention(x, x, x, attn_mask=mask))


@pytest.mark.parametrize("causal,drop,told", [(True, 0.0, 1), (True, 0.5, 0), (False, 0.0, 0)])
def test_a_branch_for_compiling_that_computes_something_else_is_told_of(causal, drop, told):
    torch.manual_seed(0)
    model, x = LeavesOut(causal, drop), torch.randn(2, 4, 8)
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        network = fxlocal.transform(model, Plan(), x, torch.ones(2, 4, dtype=torch.bool))
    found = [m for m in met if "asks whether it is compiled or traced" in str(m.message)]
    assert len(found) == told and all(m.filename == __file__ for m in found)
    assert torch.equal(torch.get_rng_state(), state) and model.calls == 0
    padding = torch.tensor([[True] * 4, [True, True, False, False]])
    if not drop:
        torch.testing.assert_close(network(x, padding), model(x, padding))


class ForExport(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        traced = isinstance(x, FakeTensor) or x.shape[0] < 0  # which stops symbolic tracing
        return self.a(x) if traced else self.a(x)[:, 1:]


def test_another_shape_for_export_is_told_of():
    with pytest.warns(UserWarning, match="off by inf") as met:
        fxlocal.capture(ForExport(), torch.randn(2, 8))
    assert len(met) == 1

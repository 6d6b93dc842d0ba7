"""What a forward does beside its result: seeds that it sets, containers that it writes into."""

import pytest
import torch
from support.captures import BOTH_WAYS, EXAMPLE, build, plain
from torch import nn
from torch.compiler import is_compiling as asks
from torch.nn import functional as F
from torch.random import manual_seed as imported_seed

import fxlocal
from fxlocal import CaptureError


def seeded(net, x):
    torch.manual_seed(7)
    return F.dropout(plain(net, x), 0.5)


def forked(net, x):
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(7)
        return F.dropout(plain(net, x), 0.5)


def restored(net, x):
    state = torch.get_rng_state()
    y = F.dropout(plain(net, x), 0.5)
    torch.set_rng_state(state)
    return y


@BOTH_WAYS
@pytest.mark.parametrize("body", [seeded, forked, restored])
def test_a_forward_that_sets_the_random_state_is_refused_by_its_line(body, by_shape):
    model = build(body, by_shape)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"sets the random state at .*(seed|state|rng)\("):
        fxlocal.capture(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


def by_the_generator(net, x):
    torch.default_generator.manual_seed(7)
    return F.dropout(plain(net, x), 0.5)


def by_an_import(net, x):
    imported_seed(7)
    return F.dropout(plain(net, x), 0.5)


@BOTH_WAYS
@pytest.mark.parametrize("body", [by_the_generator, by_an_import])
def test_so_is_one_that_sets_it_by_another_name(body, by_shape):
    model = build(body, by_shape)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match="sets a seed, which the graph would not"):
        fxlocal.capture(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


class OfContainer(nn.Module):
    """``body`` takes the input out of what it is given; torch.export alone can follow."""

    def __init__(self, body):
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, batch):
        y = self.layer(self.body(batch))
        return y * 2 if y.shape[0] > 1 else y


def write(batch):
    batch["seen"] = batch["x"] * 2
    return batch["x"]


def replace(batch):
    batch["x"] = batch["x"] * 2
    return batch["x"]


def deeper(batch):
    batch["more"].append(batch["x"] + 1)
    return batch["x"]


@pytest.mark.parametrize("body", [write, replace, deeper, lambda batch: batch.pop("x")])
def test_a_container_that_is_given_is_not_written_into(body):
    batch = {"x": EXAMPLE, "more": [EXAMPLE]}
    with pytest.raises(CaptureError, match="writes into a container that it is given"):
        fxlocal.capture(OfContainer(body), batch)
    assert batch["x"] is EXAMPLE and len(batch["more"]) == 1
    model = OfContainer(lambda batch: write(dict(batch)))
    net = fxlocal.capture(model, batch)
    assert torch.equal(net(batch), model(batch))


ANSWERS = ("is_compiling", "is_exporting", "is_dynamo_compiling")


@pytest.mark.parametrize("name", ANSWERS)
def test_a_forward_hears_what_it_hears_in_training(name):
    def body(net, x):
        return plain(net, x) * (3 if getattr(torch.compiler, name)() else 2)

    model = build(body, by_shape=True)
    assert torch.equal(fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))


def test_also_under_a_name_that_it_imported():
    def body(net, x):
        return plain(net, x) * (3 if asks() else 2)

    model, original = build(body, by_shape=True), asks
    assert torch.equal(fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))
    assert asks is original


def by_value(net, x):
    y = plain(net, x)
    return y if torch.compiler.is_compiling() or x.sum() > 1e9 else y * 1


def test_what_only_those_that_compile_can_run_is_captured_so():
    model = build(by_value, by_shape=True)
    assert torch.equal(fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))

"""Example inputs on which a graph does not run: refused by node, with nothing on the terminal."""

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import CaptureError, Checkpoint, Driver, Freeze, LocalModules, LocalPrefix, Plan
from fxlocal.schedules import Constant

X = torch.randn(3, 9)
MODULES = Plan(modules=LocalModules(2, num_classes=2, balance="blocks"))


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


CALLS = {
    "analyze": lambda: fxlocal.analyze(model(), X),
    "transform": lambda: fxlocal.transform(model(), Plan(checkpoint=Checkpoint(2)), X),
    "Driver": lambda: Driver(model(), Constant(MODULES), example_inputs=(X,)),
    "auto": lambda: fxlocal.auto(model(), X, memory=0.5),
}


@pytest.mark.parametrize("call", CALLS)
def test_shapes_that_do_not_fit(call, caplog, capfd):
    with pytest.raises(CaptureError, match=r"inputs of the shapes \(3, 9\): '_0': a and b must"):
        CALLS[call]()
    assert not [r for r in caplog.records if r.levelname != "DEBUG"] and capfd.readouterr() == (
        "",
        "",
    )


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, mask):
        return self.c(self.b(self.a(x))[mask])


def test_shapes_that_hang_on_values():
    inputs = torch.randn(2, 5, 8), torch.rand(2, 5) > 0.3
    for plan in (Plan(checkpoint=Checkpoint(2)), MODULES):
        with pytest.raises(CaptureError, match="'getitem' makes depends on the values of tensors"):
            fxlocal.transform(Masked(), plan, *inputs)
    network = fxlocal.transform(Masked(), Plan(local=LocalPrefix("c", Freeze())), *inputs)
    network(*inputs).sum().backward()
    assert len(fxlocal.analyze(Masked()).layers) == 3

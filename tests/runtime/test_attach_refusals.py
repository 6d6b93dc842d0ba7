"""What attach refuses, before anything is changed, and what an attached model refuses."""

from functools import partial

import pytest
import torch
from support import laws
from support.attached import LEARNING, MODULES, attached, moves
from support.drivers import SGD, STATIC, X, run_by, small
from support.tiny import same_state
from torch import nn

import fxlocal
from fxlocal import CaptureError, ConvHead, Driver, LocalModules, Plan, PlanError
from fxlocal.schedules import Constant
from fxlocal.schedules.base import Horizon

# --- refusals ------------------------------------------------------------------------------------


def refused(model, match, error=PlanError, **options):
    before = set(vars(model)), list(model._modules)
    with pytest.raises(error, match=match):
        fxlocal.attach(model, LEARNING, **options)
    assert (set(vars(model)), list(model._modules)) == before


def test_two_drivers_on_one_model():
    model = small()
    driver = attached(model)
    for other in (model, nn.Sequential(model), model[0], nn.Sequential(model[2], nn.Linear(8, 8))):
        refused(other, r"attached: two drivers would each rewrite it. Call detach\(\)")
    assert moves(model)
    driver.detach()
    attached(nn.Sequential(model))


def test_a_model_that_was_compiled():
    model = small()
    refused(torch.compile(model, backend="eager"), "has been compiled.*compile=True")
    refused(nn.Sequential(torch.compile(model, backend="eager")), "'0' has been compiled")
    model.compile(backend="eager")
    refused(model, "'Sequential' has been compiled")
    refused(nn.Sequential(nn.Linear(4, 4), model), "'1' has been compiled")


@pytest.mark.parametrize("how", ["wrapper", "in place", "around", "whole graph", "inside"])
def test_compiling_an_attached_model(how):
    model = small()
    attached(model)
    compiled = partial(torch.compile, backend="eager")
    call = {
        "wrapper": lambda: compiled(model)(*X),
        "in place": lambda: (model.compile(backend="eager"), model(*X)),
        "around": lambda: compiled(lambda x: model(x) + 1)(*X),
        "whole graph": lambda: compiled(model, fullgraph=True)(*X),
        "inside": lambda: compiled(nn.Sequential(nn.Linear(4, 4), model))(*X),
    }[how]
    with pytest.raises(Exception, match="compile=True to attach"):
        call()


def test_the_driver_compiles():
    model, plain = small(), small()
    attached(model, compile={"backend": "eager"})
    attached(plain)
    assert torch.equal(model(*X), plain(*X))
    assert same_state(model.state_dict(), plain.state_dict())


def test_gradient_checkpointing():
    """Switched on before, or by a trainer in between."""
    for name in ("gradient_checkpointing", "grad_checkpointing"):
        model = nn.Sequential(small())
        setattr(model[0], name, True)
        refused(model, r"'0' has gradient checkpointing.*Plan\(checkpoint=")
        setattr(model[0], name, False)
        driver = attached(model)
        setattr(model[0], name, True)
        with pytest.raises(PlanError, match="switch it off"):
            driver.start_epoch()


def test_checkpointing_around_the_model():
    model = small()
    attached(model)
    for reentrant in (False, True):
        x = X[0].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="activation checkpointing around"):
            output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            output.sum().backward()


def test_local_modules_that_come_late():
    class Late:
        def plan(self, analysis, epoch, step=0, rank=0):
            return MODULES if epoch else Plan()

        def horizon(self):
            return Horizon(2)

    model = small()
    with pytest.raises(PlanError, match="after the first step"):
        fxlocal.attach(model, Late(), example_inputs=X)
    assert "forward" not in vars(model)


def test_an_optimizer_without_the_heads():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = fxlocal.attach(model, Constant(MODULES), optimizer, example_inputs=X)
    with pytest.raises(PlanError, match="the optimizer does not hold"):
        driver.start_epoch()


def test_a_target_that_the_model_does_not_take():
    refused(
        small(), r"target='labels': the forward of Sequential has no such argument", target="labels"
    )


def test_wrappers_and_heads_that_do_not_fit():
    refused(nn.DataParallel(small()), "give the model inside", CaptureError)
    with pytest.raises(PlanError, match=r"num_classes=3\): the model's output"):
        fxlocal.attach(
            small(),
            Constant(Plan(modules=LocalModules(2, head=ConvHead(), num_classes=3))),
            example_inputs=X,
        )


def test_run_by_still_drives_an_attached_driver():
    """Its `network` may be called as that of any driver."""
    models = small(), small()
    for make, model in zip((fxlocal.attach, Driver), models, strict=True):
        driver = make(model, STATIC, torch.optim.SGD(model.parameters(), **SGD))
        run_by(driver, 3, lambda net, _: laws.loss_of(net(*X)).square())
    assert same_state(models[0].state_dict(), models[1].state_dict())


class TakesAny(nn.Sequential):
    def forward(self, x, **others):
        return super().forward(x) * others.get("scale", 1)


def test_a_keyword_that_the_graph_was_captured_without():
    model, x = TakesAny(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(3, 4)
    driver = fxlocal.attach(model, Constant(Plan()), example_inputs={"x": x})
    driver.start_epoch()
    driver.network()
    with pytest.raises(TypeError, match="'scale': the graph was captured without"):
        model(x, scale=2)
    driver.detach()
    assert model(x, scale=2).shape == (3, 2)

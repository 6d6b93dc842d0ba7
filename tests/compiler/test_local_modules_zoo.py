"""Local modules of one model of every family of torchvision."""

import copy

import pytest
import torch
from support.zoo import FAMILIES, torchvision_model

import fxlocal
from fxlocal import ConvHead, LocalModules, Plan

MULTIPLE = {"googlenet", "inception_v3"}  # return their auxiliary scores too


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - MULTIPLE - {"maxvit_t"}))
def test_every_layer_of_a_family_learns(name):
    """One step of three linked modules: all have a gradient, statistics move as in the model."""
    torch.manual_seed(0)
    model = torchvision_model(name, FAMILIES[name])
    plain = copy.deepcopy(model)
    x, y = torch.randn(2, 3, FAMILIES[name], FAMILIES[name]), torch.tensor([0, 1])
    modules = LocalModules(3, link=1, head=ConvHead(16), num_classes=1000)
    net = fxlocal.transform(model, Plan(modules=modules), x)
    torch.manual_seed(1)
    output, loss = net(x, y)
    loss.backward()
    missing = [key for key, parameter in net.named_parameters() if parameter.grad is None]
    assert not missing
    torch.manual_seed(1)
    expected = plain(x)
    if not any(module.p for module in model.modules() if hasattr(module, "p")):
        torch.testing.assert_close(output, expected)  # heads draw no numbers between
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(key), buffer, msg=key)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", sorted(MULTIPLE))
def test_several_outputs_are_refused(name):
    size = FAMILIES[name]
    plan = Plan(modules=LocalModules(2, num_classes=1000, balance="blocks"))
    with pytest.raises(fxlocal.PlanError, match="no single tensor"):
        model = torchvision_model(name, size, init_weights=False)  # which takes seconds
        fxlocal.transform(model, plan, torch.zeros(2, 3, size, size))

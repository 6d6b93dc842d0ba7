"""One step of each model of `support.packages` with a local prefix of half of its layers.

The output is the model's own, bit for bit, and so is each gradient behind the boundary; nothing
before it has a gradient; what a rule moves is what lies there.
"""

import copy
import random
import warnings

import pytest
import torch
from support.packages import MODELS
from torch import Tensor
from torch.utils import _pytree as pytree

import fxlocal
from fxlocal import CaptureError, Freeze, Hebbian, LocalPrefix, Plan, PlanError
from fxlocal.ir.nodes import node_named, parameter_uses, positions

pytestmark = pytest.mark.packages

RATE = 1e-3
REFUSED = {  # name: what its error says
    "transformers T5": "a fraction snaps to a legal block edge, and this model has none",
    "fastai xse_resnext18": "the forward assigns 'orig' of a tensor",
}


def leaves(output):
    if not isinstance(output, (Tensor, tuple, list, dict)):
        output = vars(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def step(model, batch):
    """Take a step's forward and backward; return the output's tensors."""
    torch.manual_seed(3)
    random.seed(3)
    found = leaves(model(**batch))
    torch.manual_seed(4)
    numbers = [x for x in found if x.is_floating_point()]
    losses = [(x * torch.randn_like(x)).sum() for x in numbers]  # one may lie before the boundary
    sum(loss for loss in losses if loss.requires_grad).backward()
    return found


def sides(captured, start):
    """Return the ids of the parameters that are used before and behind a node."""
    order, before, behind = positions(captured.graph), set(), set()
    for node, _, parameter in parameter_uses(captured):
        side = before if order[node] < order[node_named(captured, start)] else behind
        side.add(id(parameter))
    return before, behind


def is_about_half(boundary, count):
    return abs(boundary - count // 2) <= 0.15 * count


def prepared(name):
    """Return a model and a batch of it."""
    torch.use_deterministic_algorithms(False)  # it fills each new tensor
    entry = MODELS[name]
    model = entry.build().train()
    torch.manual_seed(1)
    return model, entry.batch()


@pytest.mark.parametrize("rule", [Hebbian(rate=RATE), Freeze()], ids=["Hebbian", "Freeze"])
@pytest.mark.parametrize("name", MODELS)
def test_half_of_a_model_learns_locally(name, rule):
    model, batch = prepared(name)
    own, before_step = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    expected = step(own, batch)
    plan = Plan(local=LocalPrefix(until=0.5, rule=rule))
    if name in REFUSED:
        with pytest.raises((CaptureError, PlanError), match=REFUSED[name]):
            fxlocal.transform(model, plan, **batch)
        return
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        net = fxlocal.transform(model, plan, **batch)
    captured = net.meta["captured"]
    analysis = fxlocal.analyze(captured)
    boundary, count = analysis.boundary(0.5), len(analysis.layers)
    told = [str(w.message) for w in met if "until=0.5" in str(w.message)]
    assert told or is_about_half(boundary, count), f"boundary {boundary} of {count}, in silence"

    found = step(net, batch)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    before, behind = sides(captured, analysis.start(boundary))
    theirs = dict(own.named_parameters())
    for path, parameter in model.named_parameters():
        if id(parameter) not in behind:
            assert parameter.grad is None, f"{path} has a gradient, before the boundary"
        elif id(parameter) not in before:
            grad = theirs[path].grad
            assert (grad is None) == (parameter.grad is None), path
            if grad is not None:
                torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, msg=path)
    for (path, buffer), other in zip(model.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0, equal_nan=True, msg=path)
    learns = {x.weight for x in analysis.layers[:boundary] if x.weight is not None}
    moved = {p for p, v in model.named_parameters() if not torch.equal(v, before_step[p])}
    if isinstance(rule, Freeze):
        assert not moved
    else:
        assert moved <= learns
        frozen = {p for p, v in model.named_parameters() if not v.requires_grad}
        still = {p for p, v in before_step.items() if not v.any()}  # makes zeros: LoRA at first
        assert not boundary or len(moved) >= 0.9 * len(learns - frozen - still)

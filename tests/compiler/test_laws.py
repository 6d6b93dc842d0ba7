"""The laws on the small nets, at every boundary, and, slow, on random networks."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from support import laws, prefixes
from support.nets import NETS
from support.random_nets import networks, plans
from torch import nn

import fxlocal
from fxlocal import (
    Checkpoint,
    Freeze,
    Hebbian,
    LocalPrefix,
    NoEffectWarning,
    Plan,
    PlanError,
    Random,
    TopK,
    Zero,
)
from fxlocal.compiler.split import find_units
from fxlocal.facts import map_size

EVERY_BOUNDARY = [
    (name, until)
    for name, net in NETS.items()
    for until in range(1, net.num_layers)
    if (name, until) != ("shared", 2)  # between two calls of one layer: refused
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("name,until", EVERY_BOUNDARY)
def test_laws_hold_at_every_boundary(name, until):
    net = NETS[name]
    plan = Plan(local=LocalPrefix(until=until, rule=Hebbian(0.125)))
    laws.check_training(net.build(), net.inputs(), plan)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", NETS)
def test_laws_hold_for_a_frozen_prefix(name):
    net = NETS[name]
    laws.l1_empty_plan_is_eager(net.build(), net.inputs())
    plan = Plan(local=LocalPrefix(until=net.num_layers - 1, rule=Freeze()))
    laws.check_training(net.build(), net.inputs(), plan)
    laws.check_bookkeeping(net.build(), net.inputs(), plan, Plan(local=LocalPrefix(until=1)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["residual", "preactivation", "multi_output"])
def test_laws_hold_for_a_prefix_with_fixed_norms(name):
    net = NETS[name]
    plan = Plan(local=LocalPrefix(until=net.num_layers - 1, norm="eval"))
    laws.l4_no_leak(net.build(), net.inputs(), plan)
    laws.check_bookkeeping(net.build(), net.inputs(), plan, Plan())


@given(st.data())
@settings(max_examples=10, phases=[Phase.generate])  # to shrink one takes minutes
def test_laws_hold_on_random_networks(data):
    model = data.draw(networks())
    captured = fxlocal.capture(model)
    plan = data.draw(plans(fxlocal.analyze(captured)))
    inputs = NETS["chain"].inputs()
    if prefixes.is_tied_across(model, captured, plan):
        event("tied across the boundary")
        with pytest.raises(PlanError, match="Tied weights must lie on one side"):
            fxlocal.transform(model, plan)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        laws.l1_empty_plan_is_eager(model, inputs)
        laws.check_training(model, inputs, plan)
        laws.check_bookkeeping(model, inputs, plan, Plan())


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NETS)
def test_laws_hold_for_checkpointed_stages(name):
    net = NETS[name]
    plan = Plan(checkpoint=Checkpoint(2, "blocks"))
    laws.check_training(net.build(), net.inputs(), plan)
    laws.check_bookkeeping(net.build(), net.inputs(), plan, Plan())


@pytest.mark.slow
@given(st.data())
@settings(max_examples=10, phases=[Phase.generate])
def test_laws_hold_for_checkpointed_stages_of_random_networks(data):
    model, inputs = data.draw(networks()), NETS["chain"].inputs()
    captured = fxlocal.capture(model)
    analysis = fxlocal.analyze(captured)
    count = data.draw(st.integers(1, max(1, len(find_units(analysis)))))
    local = data.draw(st.sampled_from([None, data.draw(plans(analysis)).local]))
    plan = Plan(local, checkpoint=Checkpoint(count, "blocks"))
    if prefixes.is_tied_across(model, captured, plan):
        plan = Plan(checkpoint=plan.checkpoint)
    try:
        fxlocal.transform(copy.deepcopy(model), plan)
    except PlanError as error:
        event("changed in place and used later")
        assert "in place" in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        laws.check_training(model, inputs, plan)
        laws.l6_same_plan_same_text(model, inputs, plan)
        laws.l7_state_is_shared(model, inputs, plan)


def is_transposed(layer):
    return layer.geometry is not None and layer.geometry.transposed


def keeping_all(analysis):
    """A plan that keeps all errors, where there is one number of them and such a method."""
    sizes = {}
    for layer in analysis.layers:
        size = math.prod(map_size(layer, analysis.shapes[layer.index]))
        sizes.setdefault(layer.path, set()).add(0 if is_transposed(layer) else size)
    sizes = {path: size for path, (size, *others) in sizes.items() if size and not others}
    return Plan(weight_grads={path: TopK(size) for path, size in sizes.items()})


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", NETS)
def test_approximations_that_keep_all_errors_are_exact(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    plan = keeping_all(fxlocal.analyze(model, *inputs))
    laws.l8_exact_approximation_is_eager(model, inputs, plan)


def assert_others_are_exact(model, inputs, plan, approximated):
    """All gradients but the approximated weights': bits, but for their layers' biases."""
    eager, ours = copy.deepcopy(model), copy.deepcopy(model)
    laws.step(fxlocal.transform(ours, plan), inputs)
    laws.step(eager, inputs)
    for name, gradient in laws.gradients(ours).items():
        expected = eager.get_parameter(name).grad
        if name in approximated:
            assert (gradient is None) == (expected is None or approximated[name] == Zero(True))
        elif name.removesuffix("bias") + "weight" in approximated:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
        else:
            laws.assert_equal(gradient, expected, f"gradient of {name}")


@pytest.mark.slow
@given(st.data())
@settings(max_examples=8, phases=[Phase.generate])
def test_laws_hold_for_approximations_of_random_networks(data):
    model, inputs = data.draw(networks()), NETS["chain"].inputs()
    analysis = fxlocal.analyze(model, *inputs)
    laws.l8_exact_approximation_is_eager(model, inputs, keeping_all(analysis))
    uses = [layer.weight for layer in analysis.layers]
    methods, approximated = {}, {}
    for layer in analysis.layers:
        chosen = [None, Zero(), Zero(none=True), Random(), *[TopK()] * (not is_transposed(layer))]
        method = methods.setdefault(layer.path, data.draw(st.sampled_from(chosen)))
        if method and uses.count(layer.weight) == 1:
            approximated[layer.weight] = method
    methods = {path: method for path, method in methods.items() if method}
    tied = {layer.weight for layer in analysis.layers if layer.path in methods}
    plan = Plan(weight_grads=methods)
    laws.l2_output_is_exact(model, inputs, plan)
    laws.l4_no_leak(model, inputs, plan)
    laws.l1_empty_plan_is_eager(model, inputs)
    laws.check_bookkeeping(
        model, inputs, plan, Plan(weight_grads={analysis.layers[0].path: Zero()})
    )
    if tied == set(approximated):
        assert_others_are_exact(model, inputs, plan, approximated)


def fills_a_constant(net, x):
    total = torch.zeros(4)
    total.add_(net.fc(x).sum(0))
    return total


class Forward(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.fc = body, nn.Linear(4, 4)

    def forward(self, x):
        return self.body(self, x)


def test_a_constant_that_is_filled_in_place_is_made_anew():
    laws.l1_empty_plan_is_eager(Forward(fills_a_constant), (torch.ones(3, 4),))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("residual", "unet")]


@pytest.mark.parametrize("name", ["shared", *SLOW])
def test_compiled_is_uncompiled(name):
    net = NETS[name]
    plan = Plan(local=LocalPrefix(until=3, rule=Hebbian(0.125)))
    laws.l11_compiled_is_uncompiled(net.build(), net.inputs(), plan)

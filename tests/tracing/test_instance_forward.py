"""A forward that is set on an instance is what is traced, with or without example inputs."""

import functools
import types
import warnings

import pytest
import torch
from support import laws
from support.captures import EXAMPLE, build, plain

import fxlocal
from fxlocal import CaptureError, Freeze, LocalPrefix, Plan


def in_half(module):
    """As tools for mixed precision do it: a decorator around the class's function."""
    forward = torch.autocast("cpu", dtype=torch.bfloat16)(type(module).forward)
    return types.MethodType(lambda self, x: forward(self, x).float(), module)


def doubled(module):
    forward = module.forward
    return lambda x: forward(x) * 2


def hooked(module):
    """As tools that move weights do it: a partial that takes the module."""

    def around(module, *args):
        return forward(*(arg + 1 for arg in args)) * 2

    forward = module.forward
    return functools.update_wrapper(functools.partial(around, module), forward)


def without_gradient(module):
    forward = module.forward

    @functools.wraps(forward)
    def around(*args, **kwargs):
        with torch.no_grad():
            x = forward(*args, **kwargs)
        return x + forward(*args, **kwargs)

    return around


class Halved:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x, scale=0.5):
        return self.forward(x) * scale


def an_object(module):
    return Halved(module.forward)


SET = [in_half, doubled, hooked, without_gradient, an_object]


@pytest.mark.sample(10)
@pytest.mark.parametrize(
    ("path", "inputs"),  # a norm of its own asks for its input's shape
    [("", ()), ("first", ()), ("", (EXAMPLE,)), ("first", (EXAMPLE,)), ("norm", (EXAMPLE,))],
)
@pytest.mark.parametrize("forward", SET, ids=lambda f: getattr(f, "__name__", ""))
def test_it_is_what_a_network_computes(forward, path, inputs):
    model = build(plain)
    module = model.get_submodule(path)
    module.forward = forward(module)
    eager = build(plain)
    module = eager.get_submodule(path)
    module.forward = forward(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = fxlocal.transform(model, Plan(), *inputs)
    for _ in range(2):
        laws.assert_equal(laws.step(network, (EXAMPLE,)), laws.step(eager, (EXAMPLE,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")
    laws.assert_equal(network.eval()(EXAMPLE), eager.eval()(EXAMPLE), "evaluation")


def test_its_autocast_holds_in_a_prefix_and_behind_it():
    model = build(plain)
    model.forward = in_half(model)
    network = fxlocal.transform(model, Plan(local=LocalPrefix(until="second", rule=Freeze())))
    assert network(EXAMPLE).dtype == model(EXAMPLE).dtype == torch.float32
    assert not torch.equal(network(EXAMPLE), build(plain)(EXAMPLE))  # it is in half precision
    network(EXAMPLE).float().sum().backward()
    assert model.first.weight.grad is None and model.second.weight.grad is not None


def test_inputs_that_are_not_known_are_refused_without_example_inputs():
    model = build(plain)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(CaptureError, match=r"\*args, \*\*kwargs.*Give example inputs"):
        fxlocal.capture(model)


@pytest.mark.parametrize("inputs", [(), (EXAMPLE,)], ids=["", "inputs"])
def test_a_model_that_accelerate_prepared(inputs):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, eager = accelerator.prepare(build(plain)), accelerator.prepare(build(plain))
    plan = Plan(local=LocalPrefix(until="second", rule=Freeze()))
    network = fxlocal.transform(model, plan, *inputs)
    assert torch.equal(network(EXAMPLE), eager(EXAMPLE))
    assert network(EXAMPLE).dtype == torch.float32
    assert not torch.equal(network(EXAMPLE), build(plain)(EXAMPLE))  # it is in half precision
    assert torch.equal(network.eval()(EXAMPLE), model(EXAMPLE))

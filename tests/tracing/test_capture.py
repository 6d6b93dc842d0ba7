"""Capture: exactly what the model computes, by tracing or by export, or a refusal that says why."""

import contextlib
import copy
import functools
import re
from collections import namedtuple

import pytest
import torch
from support import laws
from support.captures import BOTH_WAYS, EXAMPLE, Net, assert_exact_or_refused, build, plain
from torch import nn

import fxlocal
from fxlocal import CaptureError


def is_exported(captured):
    return not any(node.op == "call_module" for node in captured.graph.nodes)


# --- the two ways ---------------------------------------------------------------------------------


@BOTH_WAYS
def test_a_capture_computes_what_the_model_computes(by_shape):
    model = build(plain, by_shape)
    assert is_exported(fxlocal.capture(model, EXAMPLE)) == by_shape
    laws.l1_empty_plan_is_eager(model, (EXAMPLE,))


def test_an_exported_graph_takes_any_batch_that_takes_the_same_path():
    eager = build(plain, by_shape=True)
    model = copy.deepcopy(eager)
    captured = fxlocal.capture(model, EXAMPLE)
    for batch in (2, 5, 16):
        x = torch.randn(batch, 4)
        laws.assert_equal(laws.step(captured, (x,)), laws.step(eager, (x,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
    laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


def test_an_exported_graph_refuses_a_batch_that_takes_another_path():
    model = build(lambda net, x: net.first(x), by_shape=True)
    captured, x = fxlocal.capture(model, EXAMPLE), torch.randn(1, 4)
    try:
        ours = captured(x)
    except (RuntimeError, AssertionError):
        return
    assert torch.equal(ours, model(x)), "a branch that the model would not take, in silence"


Pair = namedtuple("Pair", "main aux")


@BOTH_WAYS
@pytest.mark.parametrize("kind", [dict, Pair, list], ids=lambda kind: kind.__name__)
def test_outputs_keep_their_structure(kind, by_shape):
    class Structured(Net):
        def forward(self, x):
            main = super().forward(x)
            return {dict: {"main": main, "aux": (x, [main])}, Pair: Pair(main, x)}.get(kind, [main])

    model = Structured(plain, by_shape)
    ours, theirs = fxlocal.capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE)
    assert type(ours) is type(theirs)
    assert (list(ours) == list(theirs)) if kind is dict else (len(ours) == len(theirs))
    laws.assert_equal(laws.tensors(ours), laws.tensors(theirs), "output")


def test_the_error_names_the_line_that_blocked_both_ways():
    def by_value(net, x):
        return net.first(x) if x.sum() > 0 else x

    model = build(by_value)
    with pytest.raises(CaptureError) as failed:
        fxlocal.capture(model, EXAMPLE)
    line = rf"{re.escape(__file__)}:\d+: `return net.first\(x\) if x.sum\(\) > 0 else x`"
    assert len(re.findall(line, str(failed.value))) == 2
    assert "leaf_modules" in str(failed.value)
    with pytest.raises(CaptureError, match="Give example inputs") as failed:
        fxlocal.capture(model)
    assert re.search(line, str(failed.value))


def test_a_leaf_module_is_kept_whole():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), Branching(4, 4), nn.Linear(4, 2))
    captured = fxlocal.capture(model, leaf_modules=(Branching,))
    assert [n.target for n in captured.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    for x in (EXAMPLE.abs(), -EXAMPLE.abs()):
        assert torch.equal(captured(x), model(x))


def test_what_is_no_module_is_refused():
    with pytest.raises(CaptureError, match=r"torch\.nn\.Module"):
        fxlocal.capture(lambda x: x)


# --- the model's own contexts ---------------------------------------------------------------------


def under_no_grad(net, x):
    with torch.no_grad():
        h = net.first(x)
    return net.norm(h)


def enable_inside_no_grad(net, x):
    with torch.no_grad():
        h = x * 2
        with torch.enable_grad():
            h = net.first(h)
        return net.norm(h)


@torch.no_grad()
def decorated(net, x):
    return net.first(x)


def under_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = net.first(x)
        with torch.autocast("cpu", enabled=False):
            h = h * net.first(x)
    return net.norm(h.float())


def autocast_and_no_grad(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        h = net.first(x)
    return h.float()


def autocast_twice_in_a_row(net, x):
    """As rotary embeddings of queries and keys are computed, by a decorated function."""
    squared = torch.autocast("cpu", dtype=torch.bfloat16)(lambda t: t.mT @ t)
    h = net.first(x)
    a, b = squared(x), squared(h)
    return net.norm(a.float() + b.float())


def no_grad_between_autocasts(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            h = net.first(x)
        return net.first(h).float()


BODIES = [under_no_grad, enable_inside_no_grad, decorated, under_autocast]
BODIES += [autocast_twice_in_a_row, autocast_and_no_grad, no_grad_between_autocasts]
LOST_BY_EXPORT = [autocast_and_no_grad, no_grad_between_autocasts]


AROUND = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


CASES = [(around, body, False) for around in AROUND for body in BODIES]
CASES += [("plain", body, True) for body in BODIES] + [("no_grad", decorated, True)]


@pytest.mark.sample(9)
@pytest.mark.parametrize("around,body,by_shape", CASES)
def test_the_models_own_contexts_are_kept(body, by_shape, around):
    """Whatever context the capture itself runs in."""
    model = build(body, by_shape)
    eager = copy.deepcopy(model)
    if by_shape and body in LOST_BY_EXPORT:
        with pytest.raises(CaptureError, match="grad mode inside an autocast"):
            fxlocal.capture(model, EXAMPLE)
        return
    with AROUND[around]():
        captured = fxlocal.capture(model, EXAMPLE)
    assert is_exported(captured) == by_shape
    inner = [body(net, EXAMPLE).requires_grad for net in (captured, eager)]
    assert inner[0] == inner[1]
    laws.assert_equal(laws.step(captured, (EXAMPLE,)), laws.step(eager, (EXAMPLE,)), "output")
    laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")


@BOTH_WAYS
def test_an_output_made_without_gradient_has_none(by_shape):
    class Two(Net):
        def forward(self, x):
            with torch.no_grad():
                aux = self.first(x)
            return super().forward(x), aux

    outputs = fxlocal.capture(Two(plain, by_shape), EXAMPLE)(EXAMPLE)
    assert [output.requires_grad for output in outputs] == [True, False]


# --- a forward that is set on an instance ---------------------------------------------------------


def prepared(forward):
    """As tools for mixed precision do it."""

    @functools.wraps(forward)
    def in_half(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = forward(*args)
        return output.float() if isinstance(output, torch.Tensor) else output

    return in_half


def doubled(forward):
    return lambda x: forward(x) * 2


def on_another_input(forward):
    return lambda x: forward(x.flip(0))


@pytest.mark.parametrize(
    ("change", "path"),
    [(prepared, ""), (doubled, ""), (on_another_input, ""), (doubled, "first"), (doubled, "norm")],
)
def test_a_forward_that_is_set_on_an_instance_is_what_is_captured(change, path):
    model = build(plain)
    module = model.get_submodule(path)
    module.forward = change(module.forward)
    captured, outputs, gradients = fxlocal.capture(model, EXAMPLE), [], []
    for net in (captured, model):
        model.zero_grad()
        outputs.append(net(EXAMPLE))
        outputs[-1].square().sum().backward()
        gradients.append(laws.gradients(model))
    laws.assert_equal(*outputs, "output")
    laws.assert_equal(*gradients, "gradient")


# --- constants, buffers and what tracing must not burn in -----------------------------------------


def constant(net, x):
    return net.first(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])


def random_constant(net, x):
    return net.first(x) + torch.randn(4)


def sum_in_place(net, x):
    total = torch.zeros(4)
    for _ in range(2):
        total += net.first(x).mean(0)
    return x + total


def of_buffers(net, x):
    scale = (net.norm.running_var + 1).rsqrt() * 3
    return net.norm(net.first(x)) * scale


def counts_by_assignment(net, x):
    net.norm.num_batches_tracked = net.norm.num_batches_tracked + 1
    return net.first(x) * net.norm.num_batches_tracked


def counts_in_place(net, x):
    net.norm.num_batches_tracked += 1
    return net.first(x) * net.norm.num_batches_tracked


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def own_backward(net, x):
    return StraightThrough.apply(net.first(x))


def keeps_a_value(net, x):
    net.kept = net.first(x)
    return net.norm(net.kept)


HAZARDS = [constant, random_constant, sum_in_place, of_buffers]
HAZARDS += [counts_by_assignment, counts_in_place, own_backward]


@pytest.mark.sample(6)
@BOTH_WAYS
@pytest.mark.parametrize("body", HAZARDS, ids=lambda body: body.__name__)
def test_nothing_is_burned_in_while_tracing(body, by_shape):
    assert_exact_or_refused(build(body, by_shape), EXAMPLE)


@pytest.mark.parametrize("owner", ["root", "child"])
def test_a_plain_tensor_attribute_is_read(owner):
    def scaled(net, x):
        return net.first(x) * (net if owner == "root" else net.norm).scale

    model = build(scaled)
    (model if owner == "root" else model.norm).scale = torch.tensor(2.5)
    captured = fxlocal.capture(model)
    assert torch.equal(captured(EXAMPLE), model(EXAMPLE))


@pytest.mark.sample(7)
@BOTH_WAYS
@pytest.mark.parametrize("body", [*HAZARDS, keeps_a_value], ids=lambda body: body.__name__)
def test_the_model_is_left_as_it_was(body, by_shape):
    model = build(body, by_shape)
    model.kept = None
    names, values = laws._attributes(model), dict(vars(model.norm))
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with contextlib.suppress(CaptureError):
        fxlocal.analyze(model, EXAMPLE)
    assert laws._attributes(model) == names
    assert model.kept is None
    assert vars(model.norm) == values
    laws.assert_equal(model.state_dict(), state, "state")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.is_grad_enabled()
    copy.deepcopy(model)

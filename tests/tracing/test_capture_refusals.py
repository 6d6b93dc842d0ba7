"""What capture refuses or warns of: recomputation, hooks, lazy modules."""

from collections import UserDict

import pytest
import torch
from support import laws
from support.captures import BOTH_WAYS, EXAMPLE, assert_exact_or_refused, build, plain
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlocal
from fxlocal import CaptureError, capture


@BOTH_WAYS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside_is_refused(by_shape, reentrant):
    def checkpointed(net, x):
        return checkpoint(net.first, x, use_reentrant=reentrant)

    with pytest.raises(CaptureError, match=r"checkpointing at .*use_reentrant=reentrant"):
        fxlocal.capture(build(checkpointed, by_shape), EXAMPLE.clone().requires_grad_())


@BOTH_WAYS
def test_hooks_on_saved_tensors_are_refused(by_shape):
    def offloaded(net, x):
        with torch.autograd.graph.save_on_cpu():
            return net.first(x)

    with pytest.raises(CaptureError, match="saved_tensors_hooks"):
        fxlocal.capture(build(offloaded, by_shape), EXAMPLE)


@BOTH_WAYS
def test_inference_mode_is_refused(by_shape):
    def inferred(net, x):
        with torch.inference_mode():
            return net.first(x)

    with pytest.raises(CaptureError, match=r"net\.first\(x\)|inference_mode"):
        fxlocal.capture(build(inferred, by_shape), EXAMPLE)


def test_hooks_that_the_graph_would_not_run_are_warned_of():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(
        UserWarning, match="forward hooks of '0' will not run.*made of tensors is in"
    ):
        fxlocal.capture(model)


def doubled(module, args, output=None):
    return 2 * (args[0] if output is None else output)


@BOTH_WAYS
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_on_the_model_itself_is_warned_of_and_no_part_of_the_graph(kind, by_shape):
    model = build(plain, by_shape)
    wanted = model(EXAMPLE)
    getattr(model, f"register_{kind}")(doubled)
    with pytest.warns(UserWarning, match="forward hooks of 'the model' will not run"):
        captured = fxlocal.capture(model, EXAMPLE)
    laws.assert_equal(captured(EXAMPLE), wanted, "output")


def test_a_hook_on_a_leaf_runs(no_warnings):
    model, seen = build(plain), []
    model.first.register_forward_hook(lambda module, args, output: seen.append(module))
    captured = fxlocal.capture(model)
    assert seen == []
    captured(EXAMPLE)
    assert seen == [model.first]


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_module_is_refused_until_it_has_run(lazy):
    model = nn.Sequential(nn.Linear(4, 4), lazy)
    with pytest.raises(CaptureError, match="lazy"):
        fxlocal.capture(model)
    model(EXAMPLE)
    assert_exact_or_refused(model, EXAMPLE)


def test_a_child_that_has_the_name_of_the_additions_is_refused():
    model = nn.Sequential()
    model.add_module("fxlocal", nn.Linear(4, 2))
    with pytest.raises(CaptureError, match="rename that child"):
        fxlocal.capture(model)


@pytest.mark.parametrize("path", ["0", ""])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_that_the_graph_would_not_run_are_warned_of(path, kind):
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.nn.ReLU())
    module = model.get_submodule(path)
    getattr(module, f"register_{kind}")(lambda *_: None)
    before = dict(module._backward_hooks), dict(module._backward_pre_hooks)
    with pytest.warns(UserWarning) as told:
        capture(model)
    (said,) = told  # torch, which would look for a tensor in what is traced, has seen no hook
    assert f"backward hooks of '{path or 'the model'}' will not run" in str(said.message)
    assert (dict(module._backward_hooks), dict(module._backward_pre_hooks)) == before


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (torch.nn.DataParallel, "DataParallel: give the model inside: model.module"),
        (torch.optim.swa_utils.AveragedModel, "AveragedModel: give .* model.module"),
        (lambda m: torch.compile(m, backend="eager"), "OptimizedModule: give .* model._orig_mod"),
        (torch.jit.script, "give the model that was scripted"),
        (lambda m: torch.jit.trace(m, torch.ones(2, 3)), "give the model that was scripted"),
    ],
)
def test_a_wrapper_is_refused_by_name(wrap, advice):
    with pytest.raises(CaptureError, match=advice):
        capture(wrap(torch.nn.Linear(3, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("given", [(), (torch.ones(2, 3),)], ids=["alone", "with inputs"])
@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (torch.nn.DataParallel, r"'inner\.1', a DataParallel, .*: inner\.1\.module"),
        (torch.jit.script, r"'inner\.1', a RecursiveScriptModule, .*the model that was scripted"),
        (
            lambda m: torch.jit.trace(m, torch.ones(2, 3)),
            r"'inner\.1', a \w+, .*the model that was scripted",
        ),
    ],
)
def test_a_wrapper_inside_is_refused_by_its_path(wrap, advice, given):
    inner = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
    model = nn.Sequential()
    model.add_module("inner", inner)
    with pytest.raises(CaptureError, match=advice):
        capture(model, *given)


def test_an_averaged_or_compiled_model_inside_is_captured():
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4))
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    for inside in (average, compiled):
        model = nn.Sequential(nn.Linear(4, 4), inside)
        assert torch.equal(capture(model, EXAMPLE)(EXAMPLE), model(EXAMPLE))


def test_vmap_is_refused_with_what_to_do():
    class Mapped(nn.Module):
        def forward(self, x):
            return torch.vmap(lambda row: row.softmax(0))(x)

    model = nn.Sequential(nn.Linear(4, 4), Mapped(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    with pytest.raises(CaptureError, match=r"uses torch\.vmap.*leaf_modules"):
        fxlocal.analyze(model, x)
    assert torch._C._functorch.peek_interpreter_stack() is None
    net = fxlocal.capture(model, x, leaf_modules=(Mapped,))
    assert torch.equal(net(x), model(x))


class Tagged(nn.Module):
    """One that takes a whole batch, and that symbolic tracing cannot follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, batch):
        return self.layer(batch["x"] * 2 if batch["x"].shape[0] > 100 else batch["x"])


def test_a_batch_in_a_container_that_export_does_not_take_is_refused_with_what_to_give():
    model, batch = Tagged(), {"x": torch.randn(3, 4)}
    with pytest.raises(CaptureError, match=r"Unsupported input type.*or give .* as dict\(batch\)"):
        capture(model, UserDict(batch))
    net = capture(model, batch)
    assert torch.equal(net(batch), model(batch))
    with pytest.raises(RuntimeError, match=r"'batch' is of class UserDict; .* for \['x'\]"):
        net(UserDict(batch))

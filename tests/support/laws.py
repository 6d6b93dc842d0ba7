"""The laws that every rewrite keeps, as functions over (model, inputs, plan).

A law copies the model that it is given and raises AssertionError where it does not hold.

How a law judges is its own: it reads the captured graph and the analysis, never the rewritten
graph's own account of itself.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from fxlocal.passes import insert_cuts
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxlocal
from fxlocal import Hebbian, LocalPrefix, Plan
from support.prefixes import nodes_before, prefix_parameters, reachable, tensors

Inputs = tuple[Any, ...]


# --- one training step ---------------------------------------------------------------------------


def loss_of(output: Any) -> Tensor:
    """A weighted sum of all outputs: no two elements weigh the same, so no norm cancels it."""
    parts = [
        (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)).sum()
        for value in tensors(output)
    ]
    return torch.stack(parts).sum()


def step(net: Any, inputs: Inputs) -> list[Tensor]:
    """Run one seeded forward and backward; return copies of the outputs."""
    torch.manual_seed(7)
    output = net(*copy.deepcopy(inputs))
    outputs = [value.detach().clone() for value in tensors(output)]
    loss = loss_of(output)
    if loss.requires_grad:
        loss.backward()
    return outputs


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(ours: Any, theirs: Any, what: str) -> None:
    """Bit for bit, None only where there is None."""
    assert type(ours) is type(theirs), f"{what}: {type(ours)} against {type(theirs)}"
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), what
        for name in ours:
            assert_equal(ours[name], theirs[name], f"{what} of {name}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), what
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{what} {i}")
    elif ours is not None:
        worst = (ours.double() - theirs.double()).abs().max() if ours.numel() else 0
        assert torch.equal(ours, theirs), f"{what} differs by up to {worst}"


# --- the laws ------------------------------------------------------------------------------------


def l1_empty_plan_is_eager(model: nn.Module, inputs: Inputs) -> None:
    """Outputs, gradients and buffers, bit for bit."""
    for plan in (Plan(), Plan(local=LocalPrefix(until=0))):
        eager, ours = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        net = fxlocal.transform(ours, plan, *inputs)
        assert_equal(step(net, inputs), step(eager, inputs), "output")
        assert_equal(gradients(ours), gradients(eager), "gradient")
        assert_equal(ours.state_dict(), eager.state_dict(), "state")


def l2_output_is_exact(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """The step's outputs are eager's; in evaluation mode too, where nothing moves."""
    assert plan.local is None or plan.local.norm == "train", "norm='eval' changes the forward"
    eager, ours = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    net = fxlocal.transform(ours, plan, *inputs)
    assert_equal(step(net, inputs), step(eager, inputs), "output")
    assert_equal(dict(ours.named_buffers()), dict(eager.named_buffers()), "buffer")
    trained = copy.deepcopy(ours.state_dict())
    evaluated = step(net.eval(), inputs)
    assert_equal(ours.state_dict(), trained, "state after evaluation")
    assert_equal(evaluated, step(ours.eval(), inputs), "evaluated output")


def l3_cut_blocks(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """No gradient before the boundary, an unchanged one after it."""
    assert plan.local is None or plan.local.norm == "train", "norm='eval' changes the forward"
    eager, ours = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    captured = fxlocal.capture(ours, *inputs)
    before = prefix_parameters(ours, captured, plan)
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)  # as an epoch of plain training leaves it
    net = fxlocal.transform(captured, plan)
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (name in before), f"stale gradient of {name}"
        parameter.grad = None
    step(net, inputs)
    step(eager, inputs)
    expected = {n: None if n in before else g for n, g in gradients(eager).items()}
    assert_equal(gradients(ours), expected, "gradient")


def l4_no_leak(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """Backward from the outputs reaches each parameter after the boundary and none before it.

    The cuts see to it by themselves: the no_grad region before them only saves memory.
    """
    ours = copy.deepcopy(model).train()
    captured = fxlocal.capture(ours, *inputs)
    expected = _reached(ours, ours, inputs) - prefix_parameters(ours, captured, plan)
    assert _reached(fxlocal.transform(captured, plan), ours, inputs) == expected
    if before := nodes_before(captured, plan):
        cut = captured.clone()
        insert_cuts(cut, start=before[-1].next.name, layer="")
        cut.recompile()
        assert _reached(cut, ours, inputs) == expected, "the cuts alone let a gradient through"


def _reached(net: Any, model: nn.Module, inputs: Inputs) -> set[str]:
    torch.manual_seed(7)
    return reachable(net(*copy.deepcopy(inputs)), model)


def l5_source_is_untouched(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """The capture, the model's attributes and its state are as before a transform."""
    ours = copy.deepcopy(model).train()
    captured = fxlocal.capture(ours, *inputs)
    text, attributes = fxlocal.format_graph(captured), _attributes(ours)
    state = copy.deepcopy(ours.state_dict())
    fxlocal.transform(captured, plan)
    fxlocal.transform(ours, plan, *inputs)
    assert fxlocal.format_graph(captured) == text
    assert fxlocal.format_graph(fxlocal.capture(ours, *inputs)) == text
    assert _attributes(ours) == attributes
    assert_equal(ours.state_dict(), state, "state")


def _attributes(model: nn.Module) -> dict[str, list[str]]:
    return {path: [*vars(m), *m._modules] for path, m in model.named_modules()}


def l6_same_plan_same_text(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    first = fxlocal.transform(copy.deepcopy(model), plan, *inputs)
    second = fxlocal.transform(copy.deepcopy(model), plan, *inputs)
    assert fxlocal.format_graph(first) == fxlocal.format_graph(second)
    assert fxlocal.explain(first) == fxlocal.explain(second)


def l7_state_is_shared(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """The graph lints; parameters and buffers are the same objects under the same keys."""
    ours = copy.deepcopy(model)
    net = fxlocal.transform(ours, plan, *inputs)
    net.graph.lint()
    assert list(net.state_dict()) == list(ours.state_dict())
    mine, theirs = dict(net.named_parameters()), dict(ours.named_parameters())
    assert list(mine) == list(theirs)
    assert all(mine[name] is theirs[name] for name in mine)
    shared = dict(net.named_buffers())
    assert all(shared[name] is buffer for name, buffer in ours.named_buffers())


def l8_exact_approximation_is_eager(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """Of a plan that keeps all errors; 1e-9: in float64, summed in another order."""
    eager, ours = copy.deepcopy(model).double().train(), copy.deepcopy(model).double().train()
    inputs = tuple(v.double() if isinstance(v, Tensor) else v for v in inputs)
    assert_equal(step(fxlocal.transform(ours, plan), inputs), step(eager, inputs), "output")
    torch.testing.assert_close(gradients(ours), gradients(eager), rtol=1e-9, atol=1e-9)


def l9_delta_is_closed_form(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """In float64, each prefix weight moves by rate * delta / ||delta||, and nothing else moves.

    ``delta`` is the gradient of ``<layer(pre), post>`` in the weight, by autograd; pre and post
    are recorded while the captured graph is interpreted. 1e-9: another order of summation; the
    rate, float32 in the network, is compared as such.
    """
    assert plan.local is not None and isinstance(plan.local.rule, Hebbian)
    assert plan.local.norm == "train"
    ours = copy.deepcopy(model).double().train()
    inputs = tuple(v.double() if isinstance(v, Tensor) else v for v in inputs)
    captured = fxlocal.capture(copy.deepcopy(ours), *inputs)
    recorder = Recorder(captured)
    torch.manual_seed(7)
    recorder.run(*copy.deepcopy(inputs))
    rate = float(torch.tensor(plan.rate))
    expected = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for name, delta in _expected_deltas(captured, recorder, plan):
        if (norm := delta.norm()) > 0:
            expected[name] += rate * delta / norm
    step(fxlocal.transform(ours, plan, *inputs), inputs)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m
        )


class Recorder(fx.Interpreter):
    """Keeps, as they are when computed, each call's tensor arguments and its result."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("call_module", "call_function"):
            args = pytree.tree_map(_keep, args)
        result = super().run_node(n)
        self.calls[n.name] = (args, kwargs, pytree.tree_map(_keep, result))
        return result


def _keep(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _expected_deltas(
    captured: fx.GraphModule, recorder: Recorder, plan: Plan
) -> Iterator[tuple[str, Tensor]]:
    """Yield each local weight's name and delta, summed over the calls that use it."""
    analysis = fxlocal.analyze(captured)
    before = [node.name for node in nodes_before(captured, plan)]
    names = {id(p): name for name, p in captured.named_parameters()}
    deltas: dict[str, Tensor] = {}
    for layer in analysis.layers:
        if layer.node not in before:
            continue
        args, kwargs, z = recorder.calls[layer.node]
        weight = captured.get_parameter(str(layer.weight))
        if not weight.requires_grad:
            continue
        post = _expected_post(captured, analysis, layer, set(before), recorder, z)
        copied = weight.detach().clone().requires_grad_()
        node = next(n for n in captured.graph.nodes if n.name == layer.node)
        if node.op == "call_module":
            module = captured.get_submodule(layer.path)
            again = torch.func.functional_call(module, {"weight": copied}, args, kwargs)
        else:
            key = dict(zip(("input", "weight"), args, strict=False)) | kwargs | {"weight": copied}
            rest = args[2:]
            again = node.target(key.pop("input"), key.pop("weight"), *rest, **key)
        (delta,) = torch.autograd.grad((again * post).sum(), copied)
        name = names[id(weight)]
        deltas[name] = deltas[name] + delta if name in deltas else delta
    yield from deltas.items()


def _expected_post(
    captured: fx.GraphModule,
    analysis: fxlocal.Analysis,
    layer: fxlocal.Layer,
    before: set[str],
    recorder: Recorder,
    z: Tensor,
) -> Tensor:
    """LoCal+SGD, section 3.7: z, or the residual sum that it feeds, or z plus a U-Net skip."""
    users = {n.name: [u.name for u in n.users] for n in captured.graph.nodes}
    sums = {edge.target for edge in analysis.skips if edge.kind == "residual"}
    name = layer.node
    while len(users[name]) == 1 and (name := users[name][0]) in before:
        if name in sums:
            return recorder.calls[name][2]  # larger than z where the sum broadcasts
        if not _normalises(captured, name):
            break
    for edge in analysis.skips:
        if edge.target == layer.pre and edge.kind == "concat" and edge.long_range:
            skip = recorder.calls[edge.operand][2]
            return z + skip if skip.shape == z.shape else z
    return z


def _normalises(captured: fx.GraphModule, name: str) -> bool:
    node = next(n for n in captured.graph.nodes if n.name == name)
    called = captured.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    kind = getattr(called, "__name__", type(called).__name__).lower()
    return "norm" in kind or "dropout" in kind or kind == "identity"


def l10_boundary_returns(model: nn.Module, inputs: Inputs, plan: Plan, other: Plan) -> None:
    """Plan, another plan, the plan again: the same text as at first, after training too."""
    ours = copy.deepcopy(model).train()
    captured = fxlocal.capture(ours, *inputs)
    first = fxlocal.transform(captured, plan)
    text = fxlocal.format_graph(first)
    step(first, inputs)
    step(fxlocal.transform(captured, other), inputs)
    assert fxlocal.format_graph(first) == text
    assert fxlocal.format_graph(fxlocal.transform(captured, plan)) == text


def l11_compiled_is_uncompiled(
    model: nn.Module, inputs: Inputs, plan: Plan, backend: str = "aot_eager"
) -> None:
    """Two compiled steps equal two uncompiled ones: outputs, gradients and state."""
    eager, ours = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    uncompiled = fxlocal.transform(eager, plan, *inputs)
    torch._dynamo.reset()
    net = torch.compile(fxlocal.transform(ours, plan, *inputs), backend=backend, fullgraph=True)
    for _ in range(2):
        theirs, mine = step(uncompiled, inputs), step(net, inputs)
        # 1e-5: AOTAutograd decomposes some operators, which rounds in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(eager).items():
            other = gradients(ours)[name]
            assert (other is None) == (gradient is None), name
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)


def check_training(model: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """Check the laws of one training step: what it computes, and what moves."""
    local = plan.local
    if local is None or local.norm == "train":
        l2_output_is_exact(model, inputs, plan)
        l3_cut_blocks(model, inputs, plan)
        if local is not None and isinstance(local.rule, Hebbian):
            l9_delta_is_closed_form(model, inputs, plan)
    l4_no_leak(model, inputs, plan)


def check_bookkeeping(model: nn.Module, inputs: Inputs, plan: Plan, other: Plan) -> None:
    """Check the laws of what a transform leaves alone, shares and repeats."""
    l5_source_is_untouched(model, inputs, plan)
    l6_same_plan_same_text(model, inputs, plan)
    l7_state_is_shared(model, inputs, plan)
    l10_boundary_returns(model, inputs, plan, other)

"""One example of the fuzzer: a program, a plan, and what must be true of the two."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

import fxlocal
from fxlocal import (
    CaptureError,
    Checkpoint,
    Freeze,
    Hebbian,
    LinearHead,
    LocalModules,
    LocalPrefix,
    Oja,
    Plan,
    PlanError,
    Random,
    TopK,
    Zero,
)
from fxlocal.compiler.split import find_units
from support import laws
from support.eager import EagerStep, Facts
from support.grammar import Program
from support.prefixes import prefix_parameters

EXPORTS = (True, False)  # values of strict=, with which torch.export must hold what the model holds
SILENT = 1e-9  # float64, where products may be summed in another order
TARGET = torch.tensor([0, 1, 0])


class Refused(Exception):
    """The library said no; the message is the reason, names and numbers left out."""


class Invalid(Exception):
    """The program does not train in eager PyTorch."""


class Tally:
    """How many examples held, and which were refused, by reason."""

    def __init__(self) -> None:
        self.held, self.refused = 0, Counter[str]()

    def run(self, examples: int, number: int, statements: Any) -> None:
        """Check ``examples`` programs that train, drawn from the seed ``number``."""

        @seed(number)
        @settings(
            max_examples=examples, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
        )
        @given(st.data())
        def example(data: Any) -> None:
            program = data.draw(statements)
            try:
                check(program, data.draw)
                self.held += 1
            except Invalid:
                reject()
            except Refused as reason:
                self.refused[str(reason)] += 1

        example()

    def __str__(self) -> str:
        count = self.refused.total()
        lines = [f"{self.held + count} examples: {self.held} hold, {count} are refused"]
        return "\n".join([*lines, *(f"  {n:4} {why}" for why, n in self.refused.most_common())])


PARTS = ("local", "local", "local", "local", "both", "grads", "stages", "modules", "all", "")


@st.composite
def plans(draw: st.DrawFn, analysis: fxlocal.Analysis) -> Plan:
    """A plan of one or several parts; few of them contradict the model."""
    layers, units = analysis.layers, max(1, len(find_units(analysis)))
    local, methods, checkpoint = None, {}, None
    parts = draw(st.sampled_from(PARTS))
    if parts == "modules" and analysis.block_inputs[-1].shape is None:
        parts = "stages"  # a loss needs one tensor
    if parts in ("local", "both", "all"):
        names = [
            *(layer.path for layer in layers),
            *analysis.names,
            *(b.name for b in analysis.blocks),
        ]
        names += [p.rpartition(".")[0] for p in names if "." in p]
        untils = [st.sampled_from([*range(1, len(layers)), 0]), st.floats(0.01, 0.99)]
        untils += [st.sampled_from(names)]
        steps = draw(st.sampled_from([{}, {}, {"relative": True}]))
        rule = draw(st.sampled_from([Hebbian(0.125, **steps), Oja(0.125, **steps), Freeze()]))
        norm = draw(st.sampled_from(["train", "train", "eval"]))
        local = LocalPrefix(draw(st.one_of(*untils)), rule, norm)
    if parts in ("grads", "both", "all"):
        chosen = [Zero(), Zero(none=True), Random(), TopK(1, force=True), TopK(2, 0.5, force=True)]
        free = [x.path for x in layers[_boundary(analysis, local) :] if x.weight is not None]
        for path in draw(st.lists(st.sampled_from(free), max_size=3)) if free else ():
            methods[path] = draw(st.sampled_from(chosen))
    if parts in ("stages", "all"):
        checkpoint = Checkpoint(
            draw(st.integers(1, units)), draw(st.sampled_from(["blocks", "memory"]))
        )
    if parts == "modules":
        count, link = draw(st.integers(1, units)), draw(st.sampled_from([0, 1, 2]))
        weighting = draw(st.sampled_from(["once", "compound"]))
        modules = LocalModules(count, link, head=LinearHead(), num_classes=2, weighting=weighting)
        return Plan(modules=modules)
    return Plan(local, methods, checkpoint=checkpoint)


def _boundary(analysis: fxlocal.Analysis, local: LocalPrefix | None) -> int:
    try:
        return analysis.boundary(local.until) if local else 0
    except PlanError:
        return 0


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the library's refusals into `Refused`; each must name something."""
    try:
        yield
    except (CaptureError, PlanError) as error:
        message = str(error)
        assert re.search(r"['`\"(].+['`\")]|\w=|:\d", message), f"names nothing: {message}"
        raise Refused(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    text = re.sub(r"\S+:\d+: `.*?`(?=:|;|,|$)", "LINE", str(error).partition("\n")[0])
    text = re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"|`[^`]*`", "NAME", text)
    text = re.sub(r"\d[\d.e-]*", "N", text)
    text = re.sub(r"^.*torch\.export stopped at", "export stopped at", text)
    return f"{type(error).__name__}: {text[:110]}"


def check(program: Program, draw: Any) -> None:
    """Check one program with a plan that is drawn once its layers are known.

    Raises:
        Invalid, Refused: as they say.
        AssertionError: if anything differs from the model's own.
    """
    inputs = program.inputs()
    _require_sane(program, inputs)
    ours, eager = program.build(), program.build()
    state, attributes = copy.deepcopy(ours.state_dict()), _attributes(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with refusals():
                captured = fxlocal.capture(ours, *inputs)
                analysis = fxlocal.analyze(captured, *inputs)
                plan = _without_what_eager_mangles(draw(plans(analysis)), program)
                net = fxlocal.transform(ours, plan, *inputs)
        finally:
            laws.assert_equal(ours.state_dict(), state, "state after transform")
            assert _attributes(ours).keys() == attributes.keys(), "transform left an attribute"
        if "captured_with" in captured.meta and "Attention" in program.source:
            raise Invalid("export looks into an attention, the oracle does not")
        if plan.modules is None:
            facts = Facts.of(captured, analysis, plan)
            _check_step(program, facts, net, ours, eager)
        else:
            _check_forward(program, net, ours, eager)
        _check_evaluation(net, ours, inputs, draw(st.sampled_from([None, None, None, *EXPORTS])))


def _require_sane(program: Program, inputs: Any) -> None:
    """Pass only a program that trains, whose numbers are finite and no two runs differ."""
    runs = []
    for _ in range(2):
        model = program.build()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outputs = laws.step(model, inputs)
        except Exception as error:  # torch's own, of whatever the program does wrong
            raise Invalid(f"{type(error).__name__}: {str(error)[:70]}") from error
        found = [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]
        if not all(bool(v.isfinite().all()) and v.abs().max() < 1e6 for v in found if v.numel()):
            raise Invalid("numbers that are not finite, or very large")
        runs.append(found)
    laws.assert_equal(*runs, "the eager model's own run")


def _without_what_eager_mangles(plan: Plan, program: Program) -> Plan:
    """Leave out checkpoints where autograd does not know of a change in what it has saved.

    Its own gradient is then of the changed value; that of a second forward is of the right one.
    """
    hidden = re.search(r"\.data\.|\.detach\(\)[.\[]", program.source)
    return replace(plan, checkpoint=None) if hidden else plan


def _check_step(program: Program, facts: Facts, net: Any, ours: Any, eager: Any) -> None:
    prefix = prefix_parameters(ours, fxlocal.capture(net), facts.plan)
    copied = copy.deepcopy(net)

    theirs, seen = _forward(step := EagerStep(eager, facts), eager, program.inputs())
    laws.loss_of(theirs).backward() if _trains(theirs) else None
    uncertain = step.finish(prefix)
    step.learn()
    for one, model, what in ((net, ours, ""), (copied, copied.source_model, " of the copy")):
        mine, met = _forward(None, one, program.inputs())
        laws.loss_of(mine).backward() if _trains(mine) else None
        _assert_close(_plain(mine), _plain(theirs), f"output{what}")
        _assert_close(met, seen, f"input after the step{what}")
        _assert_close(dict(model.named_buffers()), dict(eager.named_buffers()), f"buffer{what}")
        kept, expected = _attributes(model), _attributes(eager)
        for name in expected.keys() - kept.keys():
            assert "table" in name, f"attribute{what} {name}"  # a cache, a constant of the graph
            del expected[name]
        _assert_close(kept, expected, f"attribute{what}")
        _assert_close(_parameters(model), _parameters(eager), f"parameter{what}")
        given, expected = laws.gradients(model), laws.gradients(eager)
        for name in given:
            if name in uncertain:
                assert given[name] is not None, f"no gradient{what} of {name}"
            else:
                _assert_close(given[name], expected[name], f"gradient{what} of {name}")


def _check_forward(program: Program, net: Any, ours: nn.Module, eager: nn.Module) -> None:
    """With local modules: the output and what moves in a forward, but no gradient, are the model's.

    Other tests compare those with oracles by hand.
    """
    theirs, _ = _forward(None, eager, program.inputs())
    mine, _ = _forward(None, net, (*program.inputs(), TARGET))
    _assert_close(_plain(mine[0]), _plain(theirs), "output before the loss")
    _assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()), "buffer")
    _assert_close(_parameters(ours), _parameters(eager), "parameter")


def _forward(mode: Any, net: Any, inputs: Any) -> tuple[Any, Any]:
    torch.manual_seed(7)
    if mode is None:
        return net(*inputs), inputs
    with mode:
        return net(*inputs), inputs


def _trains(output: Any) -> bool:
    return laws.loss_of(output).requires_grad


def _plain(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach(), output)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _attributes(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold besides parameters and buffers."""
    return {
        f"{path}.{name}": value.detach()
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _assert_close(ours: Any, theirs: Any, what: str) -> None:
    mine, spec = pytree.tree_flatten(ours)
    other, expected = pytree.tree_flatten(theirs)
    assert spec == expected, f"{what}: {spec} against {expected}"
    for a, b in zip(mine, other, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert a.shape == b.shape, f"{what}: {a.shape} against {b.shape}"
            worst = (a.double() - b.double()).abs().max() if a.numel() else 0
            close = torch.allclose(a, b, rtol=SILENT, atol=SILENT, equal_nan=True)
            assert close, f"{what} differs by up to {worst}"
        else:
            assert type(a) is type(b) and (a is None or a == b), f"{what}: {a} against {b}"


def _check_evaluation(net: Any, ours: nn.Module, inputs: Any, strict: bool | None) -> None:
    """In evaluation mode network, export and deepcopy are the model; no weight moves."""
    for module in ours.modules():  # what deepcopy refuses of any model
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()
    own = copy.deepcopy(ours).eval()
    expected, _ = _forward(None, own, copy.deepcopy(inputs))
    copied, exported = copy.deepcopy(net).eval(), copy.deepcopy(net).eval()
    for one, model in ((copied, copied.source_model), (net.eval(), ours)):
        found, _ = _forward(None, one, copy.deepcopy(inputs))
        _assert_close(_plain(found), _plain(expected), "output in evaluation mode")
        _assert_close(_parameters(model), _parameters(own), "parameter after evaluation")
        _assert_close(dict(model.named_buffers()), dict(own.named_buffers()), "evaluated buffer")
    if strict is not None:
        _check_export(exported, inputs, expected, strict)


def _check_export(net: Any, inputs: Any, expected: Any, strict: bool) -> None:
    plain = copy.deepcopy(net.source_model)
    try:
        found = _run_exported(net, inputs, strict)
    except Exception as error:  # torch's own; then the model must have the same trouble
        try:
            _run_exported(plain, inputs, strict)
        except Exception:
            return
        raise AssertionError(f"the model can be exported, the network not: {error}") from error
    try:
        _assert_close(_plain(found), _plain(expected), f"output of the export, strict={strict}")
    except AssertionError:  # torch's own: strict export moves what is changed through .data
        _assert_close(_plain(found), _plain(_run_exported(plain, inputs, strict)), "the export")


def _run_exported(model: nn.Module, inputs: Any, strict: bool) -> Any:
    program = torch.export.export(model, copy.deepcopy(inputs), strict=strict)
    found, _ = _forward(None, program.module(), copy.deepcopy(inputs))
    if any(map(is_fake, pytree.tree_leaves(found))):
        raise RuntimeError("torch returned a fake tensor")
    return found

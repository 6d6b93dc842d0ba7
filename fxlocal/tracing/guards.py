"""What surrounds a capture: contexts noted, hazards refused."""

import io
import keyword
import logging
import pickle
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from inspect import getattr_static
from threading import get_ident
from typing import Any
from unittest.mock import patch
from warnings import WarningMessage, catch_warnings, filterwarnings, simplefilter

import torch
from torch import fx, nn
from torch.random import set_rng_state  # the function itself, which `plain_context` refuses

from ..errors import CaptureError
from ..ir.contexts import Context
from ..ir.source import OF_ALL_MODULES
from .user_code import current_line, is_of_torch, names_in, reached_by

__all__ = [
    "as_in_training",
    "no_random_draws",
    "plain_context",
    "quiet",
    "refuse_name",
    "refuse_names",
]


@contextmanager
def plain_context() -> Iterator[tuple[list[Context], list[bool]]]:
    """Leave every context around the capture; yield the autocasts that are entered inside.

    They are noted as they are entered, because the state alone does not tell a region that turns
    autocast off from no region; and with them, whether gradients were enabled then.
    """
    entered, with_grad = list[Context](), list[bool]()
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entering(self: Any) -> Any:
        entered.append(Context("autocast", self.device, self.fast_dtype, self._enabled))
        with_grad.append(torch.is_grad_enabled())
        return enter(self)  # type: ignore[no-untyped-call]

    def leaving(self: Any, *error: Any) -> Any:
        entered.pop(), with_grad.pop()
        return leave(self, *error)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        for hooks in OF_ALL_MODULES:
            stack.enter_context(patch.dict(hooks, clear=True))
        stack.enter_context(patch.object(torch.autocast, "__enter__", entering))
        stack.enter_context(patch.object(torch.autocast, "__exit__", leaving))
        for owner, name in _REFUSED:
            stack.enter_context(patch.object(owner, name, _refused(owner, name)))
        yield entered, with_grad


@contextmanager
def as_in_training(model: nn.Module, asked: list[str]) -> Iterator[None]:
    """Have the user's code told that nothing compiles; note what it ``asked``.

    By torch's name for the question, or by that under which a module of the user's imported it.
    """

    def answering(original: Any) -> Any:
        def answer() -> bool:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.endswith("_dynamo/external_utils.py"):
                frame = frame.f_back  # another name of torch's for the question
            if is_of_torch(frame.f_code.co_filename):
                return bool(original())
            asked.append(original.__name__)
            return False

        return answer

    names = ("is_compiling", "is_dynamo_compiling", "is_exporting")
    originals = [getattr(torch.compiler, name) for name in names]
    answers = {id(original): answering(original) for original in originals}
    changed = [(vars(torch.compiler), *item) for item in zip(names, originals, strict=True)]
    for function in reached_by(model):
        scope = function.__globals__
        named = ((name, scope.get(name)) for name in names_in(function.__code__))
        changed += [(scope, name, value) for name, value in named if id(value) in answers]
    try:
        for scope, name, original in changed:
            scope[name] = answers[id(original)]
        yield
    finally:
        for scope, name, original in changed:
            scope[name] = original


_SETTING_RANDOM_STATE = ("manual_seed", "set_rng_state")
_SEED = 0x5EED0F0D0FF5  # which no forward sets

# What a graph cannot keep, where it begins.
_REFUSED = (
    (torch.autograd.Function, "apply"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
    (torch.inference_mode, "__enter__"),
    (torch.random, "fork_rng"),
    *((owner, name) for owner in (torch, torch.random) for name in _SETTING_RANDOM_STATE),
)


def _refused(owner: Any, name: str) -> Any:
    """Return ``owner.name``, refused where the model calls it.

    It is passed through where torch or another thread does.
    """
    captures, original = get_ident(), getattr_static(owner, name)
    of_classes = getattr(getattr(owner, name), "__self__", None) is owner

    def guarded(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        by_model = not is_of_torch(caller) or caller.endswith(("checkpoint.py", "_contextlib.py"))
        if by_model and get_ident() == captures:
            _refuse(name)
        if of_classes:
            return original.__get__(None, args[0])(*args[1:], **kwargs)
        return original(*args, **kwargs)

    return classmethod(guarded) if of_classes else guarded


def _refuse(name: str) -> None:
    stack = traceback.extract_stack()
    line, whole = current_line(), "keep its module whole: leaf_modules=(...)"
    if name in (*_SETTING_RANDOM_STATE, "fork_rng"):
        raise CaptureError(
            f"the forward sets the random state at {line}, which the graph would not: do that "
            f"before the forward, or {whole}"
        )
    if any(frame.filename.endswith("torch/utils/checkpoint.py") for frame in stack):
        raise CaptureError(
            f"the model uses activation checkpointing at {line}: capture would drop it, and a "
            "layer in it could not learn locally (its forward runs twice). Remove it (a local "
            f"prefix keeps no activations anyway), or {whole}"
        )
    raise CaptureError(
        f"the model uses inference_mode, saved_tensors_hooks or an autograd.Function of its own at "
        f"{line}: a graph would drop what it does to the backward. Use torch.no_grad, or {whole}"
    )


@contextmanager
def no_random_draws(of_torch: bool = True) -> Iterator[None]:
    """Raise if a random number is drawn inside, which would be kept as a constant.

    From Python's generator or numpy's, and torch's; those that a model has are its attributes.
    """
    numpy, lines = sys.modules.get("numpy"), list[str]()
    before = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    seeded = torch.default_generator.manual_seed(_SEED).get_state()
    try:
        with _noted_draws(lines):
            yield
        if torch.initial_seed() != _SEED:
            raise CaptureError("the forward sets a seed, which the graph would not: do that before")
        drawn = of_torch and not torch.equal(seeded, torch.get_rng_state())
        of_others = before[1] != random.getstate()
        if numpy:
            of_others |= pickle.dumps(before[2]) != pickle.dumps(numpy.random.get_state())
    finally:
        set_rng_state(before[0])
        random.setstate(before[1])
        if numpy:
            numpy.random.set_state(before[2])
    if of_others:
        raise CaptureError(
            f"the forward draws a random number {lines[0] if lines else 'of Python or numpy'}, "
            "which would be drawn only once: draw from torch, or give it as an input"
        )
    if drawn:
        raise RuntimeError("a random number that depends on no input would be drawn only once")


@contextmanager
def _noted_draws(lines: list[str]) -> Iterator[None]:
    """Note where a function of Python's or numpy's own generator is called."""

    def noting(function: Any, name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            lines.append(f"by {name} at {current_line()}")
            return function(*args, **kwargs)

        return called

    with ExitStack() as stack:
        for name in {"random", "numpy.random"} & sys.modules.keys():
            scope = vars(sys.modules[name])
            owner = getattr(scope["random"], "__self__", None)  # the generator
            drawing = {
                key: noting(value, f"{name}.{key}")
                for key, value in scope.items()
                if getattr(value, "__self__", None) is owner and "state" not in key
            }
            stack.enter_context(patch.dict(scope, drawing))
        yield


def refuse_names(graph: fx.Graph) -> None:
    """Refuse names (a keyword, one with a quote) by which code would mean something else."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            refuse_name(str(node.target))


def refuse_name(path: str) -> None:
    """Refuse a path of a module, parameter or buffer that cannot stand in generated code."""
    for name in path.split("."):
        unsayable = keyword.iskeyword(name) or not name.isprintable() or set(name) & set("\"'\\")
        if unsayable or path == "self":
            raise CaptureError(
                f"the model has {name!r} (in {path!r}), which cannot stand in generated code: "
                "rename that child, parameter or buffer"
            )


@contextmanager
def quiet() -> Iterator[list[WarningMessage]]:
    """Keep what export prints off the terminal; yield its warnings of lost assignments."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled, logger.disabled = logger.disabled, True
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            catch_warnings(record=True) as lost,
        ):
            simplefilter("ignore")
            filterwarnings("always", "The tensor attributes? .* assigned during export")
            yield lost
    finally:
        logger.disabled = disabled

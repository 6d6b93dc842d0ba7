"""Contexts of nodes: the text of each, what it enters, and where an interpreter enters it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal.ir.contexts import ENABLE_GRAD, NO_GRAD, Context, ContextInterpreter, contexts

NARROW = Context("autocast", "cpu", torch.bfloat16)
WIDE = Context("autocast", "cpu", torch.bfloat16, enabled=False)


@pytest.mark.parametrize(
    ("context", "source"),
    [
        (NO_GRAD, "torch.no_grad()"),
        (ENABLE_GRAD, "torch.enable_grad()"),
        (NARROW, "torch.autocast('cpu', dtype=torch.bfloat16, enabled=True)"),
        (WIDE, "torch.autocast('cpu', dtype=torch.bfloat16, enabled=False)"),
    ],
)
def test_the_text_makes_what_is_entered(context, source):
    assert context.source == source
    ours, theirs = context.enter(), eval(source)
    assert type(ours) is type(theirs)
    if context.kind == "autocast":
        assert (ours._enabled, ours.fast_dtype) == (theirs._enabled, theirs.fast_dtype)
    assert pickle.loads(pickle.dumps(context)) == copy.deepcopy(context) == context


class Nested(nn.Module):
    """Regions in one another, in a row, and one that fails if asked to."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen, self.fail = nn.Linear(4, 4), [], False

    def forward(self, x):
        with torch.no_grad():
            x = self.fc(x)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.fc(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.fc(x)
        return self.fc(x.float())


def state():
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


class Watched(ContextInterpreter):
    def __init__(self, gm, fail_at=""):
        super().__init__(gm)
        self.seen, self.fail_at = {}, fail_at

    def call_module(self, target, args, kwargs):
        self.seen[len(self.seen)] = state()
        if len(self.seen) == self.fail_at:
            raise ValueError("on purpose")
        return super().call_module(target, args, kwargs)


def test_capture_notes_them_and_the_interpreter_enters_them():
    model, x = Nested(), torch.randn(2, 4)
    captured = fxlocal.capture(model)
    found = [contexts(node) for node in captured.graph.nodes if node.op == "call_module"]
    assert found == [(NO_GRAD,), (NO_GRAD, NARROW), (NARROW,), ()]
    interpreter, before = Watched(captured), state()
    output = interpreter.run(x)
    assert list(interpreter.seen.values()) == [
        (False, False),
        (False, True),
        (True, True),
        (True, False),
    ]
    assert state() == before
    assert torch.equal(output, model(x))


def test_they_are_left_where_a_node_fails():
    before = state()
    with pytest.raises(ValueError, match="on purpose"):
        Watched(fxlocal.capture(Nested()), fail_at=2).run(torch.randn(2, 4))
    assert state() == before


def test_nothing_is_evaluated():
    from pathlib import Path

    root = Path(fxlocal.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "passes").glob("*.py")]
    assert not [path for path in files if " eval(" in path.read_text()]

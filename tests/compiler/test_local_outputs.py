"""Local modules of models that return more than one tensor, and learn from one of them."""

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from support import laws
from support.nets import Returning

import fxlocal
from fxlocal import LocalModules, Plan, PlanError
from fxlocal.runtime.compile import ByModule
from fxlocal.schedules import Constant

X, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 1, 0, 2])
Pair = namedtuple("Pair", "hidden scores")


@dataclass
class Scores(OrderedDict):
    loss: Any = None
    scores: Any = None
    hidden: Any = None

    def __post_init__(self):
        self.update({n: v for n, v in vars(self).items() if v is not None})


KINDS = {
    "object": (lambda s, e, loss: Scores(loss, s, e), "scores"),
    "object of scores": (lambda s, e, loss: Scores(scores=s), "scores"),
    "dict": (lambda s, e, loss: {"aux": e, "out": s}, "out"),
    "ordered": (lambda s, e, loss: OrderedDict(out=s, aux=e), "out"),
    "tuple": (lambda s, e, loss: (e, s), 1),
    "named tuple": (lambda s, e, loss: Pair(e, s), "scores"),
    "list": (lambda s, e, loss: [s, {"early": e}], 0),
}
BOTH_WAYS = pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])


def plan(output, count=2, **more):
    more = {"balance": ("second",), **more}
    return Plan(modules=LocalModules(count, num_classes=3, output=output, **more))


def made(kind, by_shape=False, inputs=(X,), **more):
    make, output = KINDS[kind]
    torch.manual_seed(1)
    return fxlocal.transform(Returning(make, by_shape), plan(output, **more), *inputs)


EACH_BOTH_WAYS = list(product(KINDS, (False, True)))


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("kind", "by_shape", "more"),
    [
        *((kind, by_shape, {}) for kind, by_shape in EACH_BOTH_WAYS),
        *((kind, by_shape, {"link": 1, "count": 2}) for kind, by_shape in EACH_BOTH_WAYS[:2]),
        ("tuple", False, {"head": fxlocal.ConvHead()}),
    ],
)
def test_they_learn_as_from_a_model_that_returns_the_prediction_alone(kind, by_shape, more):
    net = made(kind, by_shape, **more)
    torch.manual_seed(1)
    alone = fxlocal.transform(Returning(lambda s, e, loss: s, by_shape), plan(None, **more), X)
    (output, loss), (scores, expected) = net(X, LABELS), alone(X, LABELS)
    theirs = copy.deepcopy(net.source_model)(X)
    assert type(output) is type(theirs)
    assert torch.equal(prediction(kind, output), scores)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    laws.assert_equal(laws.gradients(net), laws.gradients(alone), "gradient")


def prediction(kind, output):
    return LocalModules(1, output=KINDS[kind][1]).prediction(output)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("kind", "by_shape"), [*EACH_BOTH_WAYS[::2], ("object", True), ("tuple", True)]
)
def test_everything_else_takes_such_a_model(kind, by_shape):
    net = made(kind, by_shape)
    assert not fxlocal.verify(net, X, LABELS).unmet
    assert len(fxlocal.find_stages(net)) == 2
    output, loss = net(X, LABELS)
    again, same = ByModule(net, {"backend": "eager"})(X, LABELS)
    assert type(output) is type(again)
    assert torch.equal(loss, same)
    assert type(net.eval()(X)) is type(output)


def test_a_model_with_a_loss_of_its_own_keeps_it():
    net = made("object", inputs=(X, LABELS))
    output, loss = net(X, labels=LABELS, target=LABELS)
    assert torch.equal(output.loss, loss)
    driver = fxlocal.Driver(
        Returning(KINDS["object"][0]),
        Constant(plan("scores")),
        example_inputs={"x": X, "labels": LABELS},
    )
    driver.start_epoch()
    output, loss = driver.network()(x=X, labels=LABELS, target=LABELS)
    assert torch.equal(output.loss, loss)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("kind", "output", "said"),
    [
        ("object", None, r"no single tensor.*: say which of 'scores', 'hidden' is the prediction"),
        ("tuple", None, "say which of 0, 1 is the prediction"),
        ("dict", None, "say which of 'aux', 'out' is the prediction"),
        ("object", "logits", "returns no 'logits', but 'scores', 'hidden'"),
        ("object", "loss", "returns no 'loss', but 'scores', 'hidden'"),
        ("tuple", 2, "returns no 2, but 0, 1"),
        ("list", 1, "returns no 1, but 0"),
    ],
)
def test_what_is_not_said_or_not_there_is_refused(kind, output, said, by_shape):
    model = Returning(KINDS[kind][0], by_shape)
    with pytest.raises(PlanError, match=said):
        fxlocal.transform(model, plan(output), X)
    assert all(p.grad is None for p in model.parameters())


def test_one_tensor_has_no_parts():
    with pytest.raises(PlanError, match="returns no 'scores', but one tensor"):
        fxlocal.transform(Returning(lambda s, e, loss: s), plan("scores"), X)


@pytest.mark.parametrize("output", [True, -1, 1.5, ("scores",)])
def test_a_plan_with_a_bad_output_is_refused(output):
    with pytest.raises(PlanError, match=r"LocalModules\(output="):
        plan(output)


def test_a_plan_says_its_output():
    assert "output='scores'" in repr(plan("scores"))

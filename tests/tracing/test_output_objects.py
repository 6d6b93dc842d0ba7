"""A network returns objects of the classes that its model returns, while it trains too."""

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import laws
from support.nets import Returning
from torch import nn
from torch.utils import _pytree as pytree

import fxlocal
from fxlocal import CaptureError, Freeze, LocalPrefix, Plan
from fxlocal.ops.values import leaves_of

X, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 1, 0, 2])
PREFIX = Plan(local=LocalPrefix(until="second", rule=Freeze()))
Pair = namedtuple("Pair", "scores hidden")


@dataclass
class Plain:
    scores: Any
    hidden: Any = None
    loss: Any = None
    name: str = "plain"


@dataclass(frozen=True)
class Frozen:
    hidden: Any
    scores: Any


@dataclass
class Computing:
    scores: Any
    hidden: tuple = ()
    classes: int = field(default=0, init=False)

    def __post_init__(self):
        self.classes = 3


@dataclass
class Named(OrderedDict):
    """As the outputs of transformers and diffusers: attributes, keys and places."""

    loss: Any = None
    scores: Any = None
    hidden: Any = None

    def __post_init__(self):
        for name in ("loss", "scores", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        return tuple(self.values())


class Scores(dict):
    """A dict with an attribute for each key."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Boxed:
    """Registered in torch's pytrees; of a class that takes nothing."""

    def __init__(self, unit):
        self.unit = unit


def boxed(scores, unit):
    made = Boxed(unit)
    made.scores = scores
    return made


pytree.register_pytree_node(
    Boxed, lambda box: ([box.scores], box.unit), lambda parts, unit: boxed(*parts, unit)
)


class Cache:
    """Plain, as a cache of keys and values: objects in objects, and a class."""

    def __init__(self, **layers):
        self.layers, self.kind, self.device = (
            [CacheLayer(v) for v in layers.values()],
            int,
            X.device,
        )
        self.updated, self.rest = {0: False}, None

    @property
    def first(self):
        return self.layers[0].keys


class Layer(ABC):
    @abstractmethod
    def reset(self):
        """Forget."""


class CacheLayer(Layer):
    def __init__(self, keys):
        self.keys, self.shape = keys, keys.shape

    def reset(self):
        self.keys = None


KINDS = {
    "dataclass": lambda s, h, loss: Plain(s, h, loss),
    "frozen": lambda s, h, loss: Frozen((h, [s]), {"scores": s}),
    "computing": lambda s, h, loss: Computing(s, (h,)),
    "named": lambda s, h, loss: Named(loss, s, h),
    "named without hidden": lambda s, h, loss: Named(loss=loss, scores=s),
    "nested": lambda s, h, loss: Plain(Named(scores=s), [Pair(s, h)]),
    "dict of objects": lambda s, h, loss: {"out": Plain(s), "rest": (Named(scores=h), 3, None)},
    "ordered": lambda s, h, loss: OrderedDict(out=s, aux=h),
    "dict subclass": lambda s, h, loss: Scores(scores=s, hidden=h),
    "registered": lambda s, h, loss: boxed(s, "metre"),
    "sizes": lambda s, h, loss: (s, {"shape": h.shape, "rows": s.shape[0]}),
    "plain": lambda s, h, loss: Cache(keys=s, values=h),
    "dict with a plain one": lambda s, h, loss: Named(loss, s, Cache(keys=h)),
}
BOTH_WAYS = pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])
EACH = pytest.mark.parametrize("kind", KINDS)


def same(ours, theirs):
    """Tell apart classes, then what they hold."""
    assert type(ours) is type(theirs)
    assert getattr(ours, "__dict__", {}).keys() == getattr(theirs, "__dict__", {}).keys()
    parts = [list(v.values()) if isinstance(v, dict) else v for v in (ours, theirs)]
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
    elif not isinstance(ours, (tuple, list)):
        parts = [list(getattr(v, "__dict__", {}).values()) for v in (ours, theirs)]
    if not parts[0]:
        return
    for one, other in zip(*parts, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        elif isinstance(one, (int, str, type(None), type, torch.device, torch.Size)):
            assert one == other
        else:
            same(one, other)


@pytest.mark.sample(7)
@BOTH_WAYS
@EACH
@pytest.mark.parametrize("given", [(X,), (X, LABELS)], ids=["scores", "with loss"])
def test_both_modes_return_the_models_class(kind, by_shape, given):
    model = Returning(KINDS[kind], by_shape)
    eager, net = copy.deepcopy(model), fxlocal.transform(model, Plan(), *given)
    assert ("captured_with" in fxlocal.capture(model, *given).meta) == by_shape
    for training in (True, False):
        same(net.train(training)(*given), eager.train(training)(*given))
    for network in (eager.train(), net.train()):
        sum(t.sum() for t in leaves_of(network(*given)) if isinstance(t, torch.Tensor)).backward()
    laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")


@pytest.mark.sample(2)
@BOTH_WAYS
@EACH
def test_the_whole_graph_compiles(kind, by_shape):
    model = Returning(KINDS[kind], by_shape)
    compiled = torch.compile(fxlocal.transform(model, PREFIX, X), backend="eager", fullgraph=True)
    same(compiled(X), model(X))


@pytest.mark.sample(4)
@BOTH_WAYS
@EACH
def test_a_prefix_gets_no_gradient_by_a_penalty(kind, by_shape):
    model = Returning(KINDS[kind], by_shape)
    net = fxlocal.transform(model, PREFIX, X)
    tensors = [t for t in leaves_of(net(X)) if isinstance(t, torch.Tensor)]
    loss = sum(t.sum() for t in tensors) + sum(p.square().sum() for p in net.parameters())
    loss.backward()
    assert [p.grad is not None for p in model.parameters()] == [False] * 2 + [True] * 4
    assert not fxlocal.verify(net, X).unmet


def test_attributes_keys_and_places_are_there_while_training():
    net = fxlocal.transform(Returning(KINDS["named"], False), Plan(), x=X, labels=LABELS)
    output = net(x=X, labels=LABELS)
    assert output.loss is output["loss"] is output[0] is output.to_tuple()[0]
    assert output.scores.shape == (6, 3)
    assert "named = call_function Named(loss=%cross_entropy, scores=%last" in (
        fxlocal.format_graph(net)
    )


@dataclass
class Renaming(dict):
    scores: Any = None

    def __post_init__(self):
        self.update(logits=self.scores)


def more(scores, hidden, loss):
    made = Scores(scores=scores)
    made.extra = hidden
    return made


def renamed(scores, hidden, loss):
    made = Renaming(scores)
    made["other"] = hidden
    return made


class Opaque:
    """Not told by its attributes."""

    __slots__ = ("scores",)

    def __init__(self, scores):
        self.scores = scores


@BOTH_WAYS
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (more, "forward makes a Scores that Scores"),
        (renamed, "forward makes a Renaming that Renaming"),
        (lambda s, h, loss: Opaque(s), "the model returns a Opaque: return tensors in"),
        (lambda s, h, loss: (s, {"cache": Opaque(h)}), "the model returns a Opaque"),
    ],
)
def test_an_object_that_its_class_would_make_another_of_is_refused(make, said, by_shape):
    with pytest.raises(CaptureError, match=said):
        fxlocal.capture(Returning(make, by_shape), X)


@BOTH_WAYS
def test_a_class_that_makes_it_again_of_its_items_is_not_refused(by_shape):
    model = Returning(lambda s, h, loss: Renaming(s), by_shape)
    same(fxlocal.transform(model, Plan(), X)(X), model(X))


class Inside(nn.Module):
    def __init__(self, by_shape):
        super().__init__()
        self.body, self.head = Returning(KINDS["named"], by_shape), nn.Linear(4, 2)

    def forward(self, x):
        output = self.body(x)
        return Plain(self.head(output.hidden) + output[0].sum(), loss=output)


@BOTH_WAYS
def test_an_object_that_the_model_itself_reads_is_seen_through(by_shape):
    model = Inside(by_shape)
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="head", rule=Freeze())), X)
    same(net(X), model(X))

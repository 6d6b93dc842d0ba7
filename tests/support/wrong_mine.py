"""What a user has written, and what is wrong with it: `wrong_inputs.txt` names it."""

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fxlocal import Freeze, LocalPrefix, Plan
from fxlocal.schedules import Static


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(256, num_classes)

    def body(self, x):
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))

    def forward(self, x):
        return self.body(x)


def variant(name, forward):
    return type(name, (Net,), {"forward": forward})


none_out = variant("none_out", lambda self, x: None)
detached = variant("detached", lambda self, x: self.body(x).detach())
ints = variant("ints", lambda self, x: self.body(x).argmax(1))
vector = variant("vector", lambda self, x: self.body(x).sum(1))
scalar = variant("scalar", lambda self, x: self.body(x).sum())
three = variant("three", lambda self, x: self.body(x)[:, :, None])
other_batch = variant("other_batch", lambda self, x: self.body(x)[:1])
few = variant("few", lambda self, x: self.body(x)[:, :3])
texts = variant("texts", lambda self, x: "logits")
named = variant("named", lambda self, x: {"scores": self.body(x), "loss": x.sum()})
nested = variant("nested", lambda self, x: {"logits": [self.body(x)]})
empty = variant("empty", lambda self, x: {})
complexes = variant("complexes", lambda self, x: torch.complex(self.body(x), self.body(x)))
two_inputs = variant("two_inputs", lambda self, x, y: self.body(x) + y)
no_input = variant("no_input", lambda self: None)
double = variant("double", lambda self, x: self.body(x.double()))
exits = variant("exits", lambda self, x: sys.exit("bye"))


class eval_raises(Net):
    def eval(self):
        raise RuntimeError("no eval here")


class eval_forward(Net):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("not trained")
        return self.body(x)


class train_raises(Net):
    def train(self, mode=True):
        raise RuntimeError("no\ntrain here")


class no_layers(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


class lone(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        return x.flatten(1)[:, :10] * self.w


class lazy(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.LazyLinear(num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class frozen_all(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Slots(Net):
    def __init__(self):
        pass


instance = Net()


def number():
    return 3


def nothing():
    return None


def raises():
    raise ValueError("not\ntoday")


def exit_now():
    sys.exit("bye")


def exit_three():
    sys.exit(3)


def needs(a, b):
    return Net()


def klass():
    return Net


value = 3
text = "hello"


# data
def pair(shape=(64, 3, 8, 8), labels=None, dtype=torch.float32):
    x = torch.zeros(shape).to(dtype)
    y = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
    return TensorDataset(x, y), TensorDataset(x[:8], y[:8])


def bytes_():
    return pair(dtype=torch.uint8)


def flat():
    return pair((64, 192))


def float_labels():
    return pair(labels=torch.zeros(64))


def onehot():
    return pair(labels=torch.zeros(64, 10))


def negative():
    return pair(labels=torch.full((64,), -1))


def one_class():
    return pair()


def short():
    a, _ = pair()
    return a


def empties():
    return pair((0, 3, 8, 8))


def nans():
    x = torch.full((64, 3, 8, 8), float("nan"))
    y = torch.arange(64) % 10
    return TensorDataset(x, y), TensorDataset(x[:8], y[:8])


def other_labels():
    y = torch.arange(64) % 10
    return TensorDataset(torch.randn(64, 3, 8, 8), y), TensorDataset(
        torch.randn(8, 3, 8, 8), y[:8] + 40
    )


class Rows:
    classes = ("a", "b")

    def __init__(self, n=64):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.zeros(3, 8, 8), i % 2


class Late(Rows):
    def __getitem__(self, i):
        if i > 40:
            raise OSError("disk gone")
        return torch.zeros(3, 8, 8), i % 2


class Jagged(Rows):
    def __getitem__(self, i):
        return torch.zeros(3, 8, 8 + (i > 40)), i % 2


class Outside(Rows):
    def __getitem__(self, i):
        return torch.zeros(3, 8, 8), 7 if i == 50 else 0


class NoClasses(Rows):
    classes = ()


def late():
    return Late(), Rows(8)


def jagged():
    return Jagged(), Rows(8)


def outside():
    return Outside(), Rows(8)


def no_classes():
    return NoClasses(), Rows(8)


def generator():
    return (i for i in range(3)), (i for i in range(3))


def lists():
    return [1, 2, 3], [1]


# strategies
def good(epochs, *, start: float = 0.5):
    return Static(epochs=epochs, start=start)


def must(epochs, goal, *, depth):
    return Static(epochs=epochs)


class NoPlan:
    plan = None


class ReturnsNone:
    def plan(self, analysis, epoch, step=0, rank=0):
        return None


class Raises:
    def plan(self, analysis, epoch, step=0, rank=0):
        raise KeyError("layer")


class Late2:
    def plan(self, analysis, epoch, step=0, rank=0):
        if epoch:
            raise KeyError("layer")
        return Plan()


class Late3:
    def plan(self, analysis, epoch, step=0, rank=0):
        return Plan() if not epoch else None


class Unknown:
    def plan(self, analysis, epoch, step=0, rank=0):
        return Plan(local=LocalPrefix("nowhere", Freeze()))


class OtherSignature:
    def plan(self):
        return Plan()


def s_none(epochs):
    return ReturnsNone()


def s_raises(epochs):
    return Raises()


def s_late(epochs):
    return Late2()


def s_late3(epochs):
    return Late3()


def s_unknown(epochs):
    return Unknown()


def s_sig(epochs):
    return OtherSignature()


def s_noplan(epochs):
    return NoPlan()


def s_class(epochs):
    return Static


plan = Plan(local=LocalPrefix("nowhere", Freeze()))


# rules
def d_raises(*a, **k):
    raise ValueError("no delta")


def d_none(*a, **k):
    return None


def d_shape(*a, **k):
    return torch.zeros(2)


def d_nan(x, y, w, *a, **k):
    return torch.full_like(w, float("nan"))


def d_noargs():
    return None

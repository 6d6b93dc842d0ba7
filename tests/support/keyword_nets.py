"""Models whose inputs are given by keyword, left out, or handed on, and a batch of each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlocal import Freeze, LocalPrefix, Plan

X, IDS = torch.randn(6, 4), torch.randint(9, (6, 3))
MASK, LABELS = torch.rand(6, 3), torch.tensor([0, 1, 2, 1, 0, 2])
PREFIX = Plan(local=LocalPrefix(until=1, rule=Freeze()))


class Net(nn.Module):
    """Has three layers; ``by_shape`` is what only torch.export can follow."""

    def __init__(self, by_shape):
        super().__init__()
        torch.manual_seed(0)
        self.by_shape = by_shape
        self.embedding = nn.Embedding(9, 4)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def layers(self, x):
        if self.by_shape and x.shape[-1] < 2:
            raise ValueError
        return self.last(self.second(self.first(x).relu()).relu())


class Text(Net):
    """Takes its inputs as a language model does: all of them may be left out."""

    def forward(self, ids=None, mask=None, types=None, embedded=None, labels=None, scale=1.0):
        x = self.embedding(ids) if embedded is None else embedded
        x = x * mask[..., None] if mask is not None else x
        x = x.mean(1) + (0 if types is None else self.embedding(types))
        scores = self.layers(x) * scale
        return scores if labels is None else (F.cross_entropy(scores, labels), scores)


class Image(Net):
    """Takes a mask by keyword only, between what has a default and what has none."""

    def forward(self, x, flip=False, *, shift, mask=None):
        x = -x if flip else x + shift
        return self.layers(x if mask is None else x * mask)


class Wrapper(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "nothing"}
        return self.inner(*args, **kwargs)


class Prefixed(Wrapper):
    def forward(self, gain, *args, nothing=None, **kwargs):
        return self.inner(*args, **kwargs) if nothing is None else gain


CASES = {
    "text": (Text, dict(ids=IDS, mask=MASK, labels=LABELS)),
    "text without labels": (Text, dict(ids=IDS, mask=MASK)),
    "text embedded": (Text, dict(embedded=torch.randn(6, 3, 4))),
    "image": (Image, dict(x=X, shift=torch.ones(6, 1), mask=torch.rand(6, 4))),
    "image without mask": (Image, dict(shift=torch.ones(6, 1), x=X)),
    "wrapped text": (lambda by: Wrapper(Text(by)), dict(ids=IDS, labels=LABELS)),
    "wrapped twice": (lambda by: Prefixed(Wrapper(Text(by))), dict(gain=X, ids=IDS, mask=MASK)),
}
BOTH_WAYS = pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])
EACH = pytest.mark.parametrize("case", CASES)


EXPORTS_KEYWORDS = torch.__version__ >= "2.14"  # torch.export of **kwargs with a dynamic batch


def build(case, by_shape):
    if by_shape and case.startswith("wrapped") and not EXPORTS_KEYWORDS:
        pytest.skip("torch.export gives **kwargs no dynamic batch")
    make, batch = CASES[case]
    return make(by_shape), dict(batch)

"""Lists and dicts that a call takes are new ones in each run, however a graph is run."""

import pytest
import torch
from support import laws
from torch import fx, nn

import fxlocal
from fxlocal import Plan

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def shrink(sizes, limits):
    """Change both arguments, as the windows of a video transformer do."""
    if type(limits) is not list:
        raise TypeError("a list")
    for i, size in enumerate(sizes):
        if size <= limits[i]:
            limits[i], sizes[i] = size, 1
    return sizes, limits


fx.wrap("shrink")


class Windows(nn.Module):
    """Keeps lists as attributes, which a wrapped function changes in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.limits = nn.Conv2d(3, 4, 3), [3, 64]

    def forward(self, x):
        y = self.conv(x)
        sizes, limits = shrink([y.shape[2], y.shape[3]], self.limits.copy())
        return y * sizes[1] + limits[0]


class Popping(nn.Module):
    """A leaf that takes its list apart."""

    def forward(self, values, options):
        options.setdefault("scale", 2)
        total = values.pop()
        while values:
            total = total + values.pop()
        return total * options["scale"]


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.sum = nn.Conv2d(3, 4, 3), Popping()

    def forward(self, x):
        y = self.conv(x)
        return self.sum([y, y.relu(), y.sigmoid()], {"scale": 3})


class Nested(Sums):
    def forward(self, x):
        y = self.conv(x)
        return self.sum([y, self.sum([y, y * 2], {})], options={})


class Asking(nn.Module):
    """A leaf that asks what it is given, and joins it to a list of its own."""

    def forward(self, values, sizes=()):
        if type(values) is not list or not isinstance(sizes, list):
            raise TypeError("lists")
        values += [values[0]]
        sizes.append(4)
        return torch.cat(values, 1).unflatten(1, sizes)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.join, self.sizes = nn.Conv2d(3, 4, 3), Asking(), [2]

    def forward(self, x):
        return self.join([self.conv(x)], sizes=[*self.sizes])


@pytest.mark.parametrize("make", [Windows, Sums, Nested, Joined])
def test_a_call_that_changes_its_lists_runs_each_time(make):
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    eager, leaves = make(), (Popping, Asking)
    analysis = fxlocal.analyze(model, EXAMPLE, leaf_modules=leaves)
    assert analysis.costs[0].flops > 0
    network = fxlocal.transform(model, Plan(), EXAMPLE, leaf_modules=leaves)
    for _ in range(2):
        ours, theirs = laws.step(network, (EXAMPLE,)), laws.step(eager, (EXAMPLE,))
        laws.assert_equal(ours, theirs, "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")


def test_swin_3d():
    video = pytest.importorskip("torchvision.models.video.swin_transformer")
    model = video.SwinTransformer3d([2, 4, 4], 8, [2, 2], [1, 2], [2, 7, 7], 0.0, num_classes=4)
    clip = torch.randn(2, 3, 4, 32, 32)
    assert fxlocal.analyze(model, clip).costs is not None
    network = fxlocal.transform(model, Plan(), clip)
    torch.manual_seed(0)
    expected = model(clip)
    torch.manual_seed(0)
    assert torch.equal(network(clip), expected)

"""Which values hold a block edge back, and where the edges lie while several are live."""

import math

import pytest
import torch
from support.nets import NETS, conv_norm
from torch import nn

import fxlocal
from fxlocal import Checkpoint, Freeze, LocalModules, LocalPrefix, Plan, PlanError
from fxlocal.compiler.split import find_units


class Row(nn.Module):
    """Residual blocks of two linear layers; subclasses say what surrounds them."""

    def __init__(self, count=6):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.up = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def block(self, i, x):
        return x + self.down[i](torch.relu(self.up[i](x)))

    def blocks(self, x):
        for i in range(len(self.up)):
            x = self.block(i, x)
        return x

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Masked(Row):
    """Each block multiplies by what was made of the input; its mean is taken at the end."""

    def forward(self, x):
        scale, x = (x.abs() > 0.5).float().cumsum(1), self.stem(x)
        for i in range(len(self.up)):
            x = self.block(i, x) * scale
        return self.head(x) * scale.mean()


class Sized(Row):
    """Asks each feature for its size at the end, in several ways."""

    def forward(self, x):
        kept = [self.stem(x)]
        for i in range(len(self.up)):
            kept.append(self.block(i, kept[-1]))
        x = self.head(kept[-1])
        for one in kept:
            x = x.reshape(one.shape[0], one.size(1)) * one.ndim
        return x


class Compared(Row):
    """Whether the first feature is positive is asked for at the end."""

    def forward(self, x):
        first = self.stem(x)
        positive, level = first > 0, first.detach()
        return torch.where(positive, self.head(self.blocks(first)), level)


class Returned(Row):
    """Returns each feature, in a container of ``kind``."""

    def __init__(self, kind, last=True):
        super().__init__()
        self.kind, self.last = kind, last

    def forward(self, x):
        kept = [self.stem(x)]
        for i in range(len(self.up)):
            kept.append(self.block(i, kept[-1]))
        out = self.head(kept[-1])
        return self.kind([*kept, out] if self.last else [out, *kept])


class Filled(Row):
    """Writes its result into a tensor of zeros."""

    def forward(self, x):
        out = torch.zeros(2, 8)
        out[:, :4] = self.head(self.blocks(self.stem(x)))
        return out


class Target(Row):
    """A second input that is checked, and used for the loss at the end."""

    def forward(self, x, y):
        y = y.clamp(0, 1) * 2
        return (super().forward(x) - y).square().mean()


def as_dict(values):
    return {f"map{i}": value for i, value in enumerate(values)}


NO_HINDRANCE = {
    "nothing": Row,
    "a mask of the input": Masked,
    "sizes": Sized,
    "a comparison": Compared,
    "maps returned in a tuple": lambda: Returned(tuple),
    "maps returned in a list, last first": lambda: Returned(list, last=False),
    "maps returned in a dict": lambda: Returned(as_dict),
    "a result that is written": Filled,
    "a target": Target,
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("name", NO_HINDRANCE)
def test_what_no_gradient_needs_holds_no_edge_back(name, with_inputs):
    model = NO_HINDRANCE[name]()
    inputs = (torch.randn(2, 4), torch.ones(2, 4))[: 2 if name == "a target" else 1]
    analysis = fxlocal.analyze(model, *inputs if with_inputs else ())
    assert analysis.boundaries == (0, 1, 3, 5, 7, 9, 11, 13)
    assert [len(block.values) for block in analysis.blocks] == [0, *[1] * 7]
    assert analysis.boundary(0.5) == 7
    net = fxlocal.transform(model, Plan(local=LocalPrefix(0.5, Freeze())), *inputs)
    torch.testing.assert_close(net(*inputs), model(*inputs), rtol=0, atol=0)


def test_a_feature_enters_a_block_and_not_its_mask():
    analysis = fxlocal.analyze(Masked(), torch.randn(2, 4))
    assert [edge.value for edge in analysis.block_inputs[1:4]] == ["stem", "mul", "mul_1"]


# --- several live values -------------------------------------------------------------------------


class Timed(Row):
    """A learned embedding of time bounds every block, and the head has none of it."""

    def __init__(self, count=6):
        super().__init__(count)
        self.time = nn.Linear(1, 4)

    def forward(self, x, t):
        t, x = torch.relu(self.time(t)), self.stem(x)
        for i in range(len(self.up)):
            x = x + self.down[i](torch.maximum(self.up[i](x), t))
        return self.head(x)


class Parallel(Row):
    """Two rows side by side, which are summed at the end: one more residual block each time."""

    def __init__(self, count=12):
        super().__init__(count)

    def forward(self, x):
        a = b = self.stem(x)
        for i in range(0, len(self.up), 2):
            a, b = self.block(i, a), self.block(i + 1, b)
            a, b = a + b, b * a
        return self.head(a + b)


class Previous(Row):
    """Each cell takes the results of the two before it."""

    def forward(self, x):
        before, now = x, self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            before, now = now, torch.relu(up(before)) + torch.relu(down(now))
        return self.head(now)


def test_while_a_time_embedding_is_live_each_residual_block_is_one():
    model = Timed()
    analysis = fxlocal.analyze(model)
    # Behind the last use of the time, half a block is no worse a place.
    assert analysis.boundaries == (0, 1, 2, 4, 6, 8, 10, 12, 13, 14)
    assert [len(block.values) for block in analysis.blocks] == [0, 1, *[2] * 7, 1]
    assert analysis.boundary(0.5) == 6


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", [Timed, Parallel, Previous])
def test_a_prefix_is_cut_through_all_that_is_live(make):
    model = make()
    inputs = (torch.randn(2, 4), torch.randn(2, 1))[: 2 if make is Timed else 1]
    analysis = fxlocal.analyze(model)
    for edge in analysis.boundaries[1:]:
        model.zero_grad(set_to_none=True)
        net = fxlocal.transform(model, Plan(local=LocalPrefix(edge, Freeze())))
        net(*inputs).sum().backward()
        named = dict(model.named_parameters())
        moved = [named[layer.weight].grad is not None for layer in analysis.layers]
        assert moved == [i >= edge for i in range(len(moved))]


MANY = [Timed, Parallel, Previous, lambda: Timed(30), lambda: Parallel(40), lambda: Previous(33)]


@pytest.mark.parametrize("make", [*MANY, *(net.build for net in NETS.values())])
def test_no_stretch_of_more_than_an_eighth_is_without_an_edge(make):
    analysis = fxlocal.analyze(make())
    longest = max(len(block.layers) for block in analysis.blocks)
    assert longest <= max(math.ceil(len(analysis.layers) / 8), 4)


def test_a_tied_weight_is_parted_by_no_edge_however_long_the_stretch():
    model = Timed(20)
    model.up[15].weight = model.up[5].weight
    first, last = (2 + 2 * i for i in (5, 15))
    edges = fxlocal.analyze(model).boundaries
    assert not [edge for edge in edges if first < edge <= last]
    assert {first, last + 1} <= set(edges)


class Towers(nn.Module):
    """Two networks that share nothing, each with a result of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Row(), Row(8)

    def forward(self, x):
        return self.left(x), self.right(x)


def test_each_of_two_towers_has_its_blocks():
    edges = fxlocal.analyze(Towers()).boundaries
    assert edges == (0, 1, 3, 5, 7, 9, 11, 13, 14, 15, 17, 19, 21, 23, 25, 27, 29, 31)


# --- stages of several values --------------------------------------------------------------------


def test_local_modules_begin_where_one_value_crosses():
    model, inputs = Timed(), (torch.randn(2, 4), torch.randn(2, 1))
    analysis = fxlocal.analyze(model, *inputs)
    assert find_units(analysis) == (0, 1, 9)
    assert "10 blocks (7 of several values)" in str(analysis)
    few = r"the model has 3 blocks that begin with a single value.*\(7 more begin with several\)"
    with pytest.raises(PlanError, match=few):
        fxlocal.transform(model, Plan(modules=LocalModules(4, num_classes=4)), *inputs)
    named = LocalModules(2, num_classes=4, balance=("up.3",))
    with pytest.raises(PlanError, match=r"'up\.3' begins with several values, relu, add_2"):
        fxlocal.transform(model, Plan(modules=named), *inputs)
    modules = LocalModules(2, num_classes=4, balance=("head",))
    net = fxlocal.transform(model, Plan(modules=modules), *inputs)
    target = torch.tensor([1, 2])
    output, loss = net(*inputs, target)
    loss.backward()
    assert torch.equal(output, model(*inputs))
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_checkpoints_may_begin_where_several_do():
    model, inputs = Timed(), (torch.randn(2, 4), torch.randn(2, 1))
    net = fxlocal.transform(model, Plan(checkpoint=Checkpoint(5, balance="blocks")))
    net(*inputs).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(*inputs).sum().backward()
    assert all(map(torch.equal, found, (p.grad for p in model.parameters())))


class Lateral(nn.Module):
    """A skip passes a convolution of its own before the resolution falls and rises."""

    def __init__(self):
        super().__init__()
        self.stem, self.lateral = conv_norm(3, 4), nn.Conv2d(4, 4, 1)
        self.down, self.middle = conv_norm(4, 4, stride=2), conv_norm(4, 4)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        side = self.lateral(x)
        return self.head(side + self.up(self.middle(self.down(x))))


def test_a_layer_that_only_a_later_module_hears_of_is_in_it_or_before_no_edge_of_local_modules():
    """Else no loss would reach it."""
    model, x = Lateral(), torch.randn(2, 3, 8, 8)
    analysis = fxlocal.analyze(model, x)
    assert analysis.boundaries == (0, 1, 2, 3, 4, 5)
    assert [block.name for block in map(analysis.blocks.__getitem__, find_units(analysis))] == [
        "stem.0", "lateral", "head",
    ]  # fmt: skip
    modules = LocalModules(3, num_classes=5, balance="blocks")
    net = fxlocal.transform(model, Plan(modules=modules), x)
    net(x, torch.zeros(2, 8, 8, dtype=torch.long))[1].backward()
    assert all(parameter.grad is not None for parameter in net.parameters())

"""Activation checkpointing over segments computes what plain training computes, bit for bit."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.tiny import SETTINGS, DropoutNet, resnet, run, schedule_of
from torch import nn

import fxlocal
from fxlocal import PlanError
from fxlocal.compiler.split import find_split
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.measure import count_saved_bytes
from fxlocal.experiments.training.recompute import Recompute, Recomputed, cut_segments
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.schedules import Constant

X = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 16, 16, generator=X)
LABELS = torch.randint(10, (4,), generator=X)


def unet():
    return build_model("unet", num_classes=10, in_channels=3, width=4, seed=0)


class Tracking(nn.Module):
    """A norm of every kind of statistics, a buffer of the user's, and a functional norm."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.cumulative = nn.BatchNorm2d(3, momentum=None)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.fc = nn.Linear(3, 10)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        x = self.cumulative(self.convs[0](x))
        x = self.instance(self.convs[1](x))
        x = self.plain(self.convs[2](x))
        x = F.batch_norm(self.convs[3](x), self.mean, self.var, training=True)
        return self.fc(self.convs[4](x).mean((2, 3)))


class Masked(nn.Module):
    """An input with a default."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(3))
        self.fc = nn.Linear(3, 10)

    def forward(self, x, mask=None):
        x = self.convs[2](self.convs[1](self.convs[0](x).relu()))
        return self.fc((x if mask is None else x * mask).mean((2, 3)))


MODELS = {"resnet": resnet, "unet": unet, "dropout": DropoutNet, "tracking": Tracking}
MODELS |= {"masked": Masked}


def spread(labels):
    return labels[:, None, None].expand(-1, 16, 16)


def steps(model, network, count=3):
    """Take some steps and return the losses; gradients are left in the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    torch.manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        output = network(IMAGES)
        loss = F.cross_entropy(output, spread(LABELS) if output.dim() == 4 else LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def recomputed(model, count, balance="blocks"):
    captured = fxlocal.capture(model)
    # On fake tensors, a cumulative norm cannot count its batches.
    analysis = fxlocal.analyze(captured, *([IMAGES] if balance == "memory" else []))
    return Recomputed(captured, analysis, Recompute(count, balance))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_buffers_are_those_of_plain_training(name, count):
    torch.manual_seed(0)
    ours = MODELS[name]()
    theirs = copy.deepcopy(ours)
    network = recomputed(ours, count)
    assert len(network.segments) == count
    losses, random = steps(ours, network), torch.get_rng_state()
    assert losses == steps(theirs, theirs)
    assert torch.equal(random, torch.get_rng_state())
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key


def test_values_that_skip_a_segment_are_handed_on():
    network = recomputed(unet(), 4)
    made = [set(segment.outputs) for segment in network.segments]
    taken = [set(segment.inputs) for segment in network.segments]
    assert taken[0] == {"x"} and made[-1] == {"output"}
    assert any(made[k] & taken[j] for k in range(4) for j in range(k + 2, 4))


def test_more_segments_keep_less_until_what_crosses_outweighs_them():
    kept = []
    for count in (1, 2, 4):
        model = build_model("resnet20", num_classes=10, width=4, seed=0)
        network = recomputed(model, count, "memory")
        with count_saved_bytes(model, IMAGES) as saved_bytes:
            F.cross_entropy(network(IMAGES), LABELS).backward()
        kept.append(saved_bytes())
    assert kept[0] > 1.5 * kept[1] > 1.5 * kept[2]


def test_what_the_second_forward_saves_is_counted():
    model = build_model("resnet20", num_classes=10, width=4, seed=0)
    analysis = fxlocal.analyze(model, IMAGES)
    network = recomputed(model, 2)
    (half,) = find_split(analysis, Recompute(2, "blocks").modules)[1:]
    start = analysis.blocks[half].layers[0]
    first, second = (
        sum(c.saved_bytes for c in part)
        for part in (analysis.costs[:start], analysis.costs[start:])
    )
    assert first > 2 * second  # which the forward keeps
    with count_saved_bytes(model, IMAGES) as saved_bytes:
        loss = F.cross_entropy(network(IMAGES), LABELS)
        assert saved_bytes() < first
        loss.backward()
    assert first <= saved_bytes() < first + 0.5 * second


class Mutating(nn.Module):
    def __init__(self, later):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.later = nn.SiLU(inplace=True), later

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.act(x).square())
        return y + x if self.later else y


def cut_before(model, name):
    captured = fxlocal.capture(model)
    net = Recomputed.__new__(Recomputed)
    net.inputs, net.defaults, net.segments = ["x"], {}, cut_segments(captured, name)
    return net


def test_what_a_segment_changes_in_place_is_taken_unchanged_twice():
    torch.manual_seed(0)
    ours = Mutating(later=False)
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, 4)
    cut_before(ours, ["act", "second"])(x).sum().backward()
    theirs(x).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_what_is_changed_in_place_and_used_later_is_refused():
    with pytest.raises(PlanError, match="'first' is changed in place in segment 1"):
        cut_before(Mutating(later=True), ["act", "second"])


def test_too_many_segments_are_refused():
    with pytest.raises(PlanError, match="count=9"):
        recomputed(resnet(), 9)
    with pytest.raises(PlanError, match="balance='halves'"):
        Recompute(2, "halves")


# The strategy


@pytest.fixture
def schedule():
    return schedule_of("checkpoint(modules=3,balance=blocks)")


def test_the_strategy_trains_as_sgd_and_keeps_less(schedule):
    assert schedule == Recompute(3, "blocks")
    ours, theirs = DropoutNet(), DropoutNet()
    ours.load_state_dict(theirs.state_dict())
    record, plain = run(ours, schedule), run(theirs, Constant())
    assert record.loss == plain.loss and record.errors == plain.errors
    assert record.saved_bytes[0] < plain.saved_bytes[0]
    assert record.predicted_bytes[0] < plain.predicted_bytes[0]


def test_autocast_holds_in_both_forwards(schedule):
    machine, settings = Machine(amp=True), dataclasses.replace(SETTINGS, epochs=2)
    ours, theirs = (run(resnet(), s, settings, machine) for s in (schedule, Constant()))
    assert ours.loss == theirs.loss and ours.saved_bytes[0] < theirs.saved_bytes[0]


def test_it_is_not_compiled(schedule):
    with pytest.raises(SettingsError, match="leave out --compile"):
        run(resnet(), schedule, machine=Machine(compile=True))

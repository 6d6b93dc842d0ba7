"""The strategy of activation checkpointing trains as sgd, and what it keeps is measured."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.tiny import SETTINGS, DropoutNet, resnet, run, schedule_of

import fxlocal
from fxlocal import Checkpoint, Plan
from fxlocal.compiler.split import find_split
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.measure import count_saved_bytes
from fxlocal.experiments.training.settings import Machine
from fxlocal.schedules import Constant

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 16, 16, generator=GENERATOR)
LABELS = torch.randint(10, (4,), generator=GENERATOR)


def checkpointed(count, balance="blocks"):
    return Plan(checkpoint=Checkpoint(count, balance))


# What is kept


def test_more_stages_keep_less_until_what_crosses_outweighs_them():
    kept = []
    for count in (1, 2, 4):
        model = build_model("resnet20", num_classes=10, width=4, seed=0)
        network = fxlocal.transform(model, checkpointed(count, "memory"), IMAGES)
        with count_saved_bytes(model, IMAGES) as saved_bytes:
            F.cross_entropy(network(IMAGES), LABELS).backward()
        kept.append(saved_bytes())
    assert kept[0] > 1.5 * kept[1] > 1.5 * kept[2]


def test_what_the_second_forward_saves_is_counted():
    model = build_model("resnet20", num_classes=10, width=4, seed=0)
    analysis = fxlocal.analyze(model, IMAGES)
    network = fxlocal.transform(model, checkpointed(2))
    (half,) = find_split(analysis, Checkpoint(2, "blocks"))[1:]
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


# The strategy


@pytest.fixture
def schedule():
    return schedule_of("checkpoint(modules=3,balance=blocks)")


def test_the_strategy_trains_as_sgd_and_keeps_less(schedule):
    assert schedule == Constant(checkpointed(3))
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


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_compiled_it_trains_alike(schedule):
    settings = dataclasses.replace(SETTINGS, epochs=1)
    compiled, plain = (run(resnet(), schedule, settings, Machine(compile=c)) for c in (True, False))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)

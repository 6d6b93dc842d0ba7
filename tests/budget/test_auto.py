"""Plans for a budget: predictions against what steps keep, and what is chosen of them."""

import copy
import math
from functools import partial

import pytest
import torch
from support.laws import assert_equal, gradients
from support.nets import NETS, Written
from torch import nn

import fxlocal
from fxlocal import Checkpoint, Freeze, LocalPrefix, Plan, PlanError
from fxlocal.budget import times
from fxlocal.budget.auto import auto
from fxlocal.budget.candidates import Times, find_candidates
from fxlocal.budget.memory import KeptBytes
from fxlocal.budget.steps import Steps
from fxlocal.budget.times import BlockTime, time_blocks
from fxlocal.ir.fakes import run_on_fakes
from fxlocal.ir.random_state import random_state

X = NETS["chain"].inputs()[0]
ROWS = torch.ones(4, 8)


def linears(count=6, width=8):
    """Each layer but the first, whose input is the model's, keeps 4 * width * 4 = 128 bytes."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def kept_by(model, x):
    steps = Steps(model, (x,), {}, torch.sum, ())
    run = run_on_fakes(steps.captured, (x,))
    return steps, KeptBytes(steps.captured, run, steps.analysis)


@pytest.fixture
def fast(monkeypatch):
    """Blocks that take 1 forward and 2 backward, 1 without the gradient of their input."""
    monkeypatch.setattr(times, "_time", lambda *_: BlockTime(1.0, 2.0, 1.0))
    monkeypatch.setattr(Steps, "seconds", lambda self, network: 1.0)


@pytest.mark.parametrize("name", ["chain", "residual", "unet", "tokens", "dropout"])
def test_a_step_of_every_plan_keeps_what_is_predicted(name):
    classes = None if name == "unet" else 5
    steps, kept = kept_by(NETS[name].build(), X)
    block = [BlockTime(1, 2, 1)] * len(steps.analysis.blocks)
    one_kind = Times(block, {"freeze": block})
    rows = list(find_candidates(kept, one_kind, math.inf, classes))
    assert {bool(row.plan.checkpoint) for row in rows} == {True, False}
    for row in rows[:: max(1, len(rows) // 9)]:
        measured = steps.peak_bytes(steps.network(row.plan))
        assert row.peak_bytes == pytest.approx(measured, rel=0.03, abs=64), row.plan


def test_bytes_by_hand():
    _, kept = kept_by(linears(), ROWS)
    assert kept.plain(0) == 5 * 128
    assert kept.plain(2) == 4 * 128
    # Layers 1 and 2 again, with the inputs of layers 1 and 3: their own, one between and that.
    assert kept.checkpointed(0, (3,)) == 3 * 128  # the inputs of layers 3, 4 and 5
    assert kept.checkpointed(0, (2, 5)) == 3 * 128  # stage 2 again: the inputs of 2, 3 and 4
    assert kept.checkpointed(2, (4,)) == 3 * 128  # of 2, 4 and 5, as 2 is the stage's input
    assert kept.modules(0, (2, 4)) == 3 * 128  # 2, 3, and 4 for the head
    assert kept.find_stages(0, range(1, 6), 2 * 128 - 1) == ()
    assert kept.find_stages(0, range(1, 6), 2 * 128) == (3, 5)
    assert kept.find_stages(0, range(1, 6), 3 * 128) == (3,)
    assert kept.find_stages(0, range(1, 6), 4 * 128) == (2,)


def test_times_by_hand():
    block = BlockTime(3.0, 5.0, 2.0)
    found = Times([block] * 4, {"freeze": [BlockTime(1.0, 0.0, 0.0)] * 4})
    assert found.of() == 4 * 3 + 2 + 3 * 5
    assert found.of(2, "freeze") == 2 * 1 + 2 * 3 + 2 + 5
    assert found.of(1, "freeze", again=3) == 1 + 3 * 3 + 2 * 3 + 2 + 2 * 5


def test_blocks_of_one_kind_are_timed_once(monkeypatch):
    timed = []

    def note(network, given, device):
        timed.append(network)
        return BlockTime(len(timed), 0, 0)

    monkeypatch.setattr(times, "_time", note)
    net = nn.Sequential(*linears(3), nn.Linear(8, 4), nn.Linear(4, 4), *linears(1, 4))
    captured = fxlocal.capture(net)
    starts = [block.start for block in fxlocal.analyze(captured).blocks]
    found = time_blocks(captured, starts, (ROWS,), {}, torch.device("cpu"))
    # The first takes what needs no gradient.
    assert [time.forward for time in found] == [1, 2, 2, 3, 4, 4]


def test_a_block_alone_computes_what_it_does_in_the_network():
    model = NETS["unet"].build().eval()
    captured = fxlocal.capture(model.train())
    starts = [block.start for block in fxlocal.analyze(captured).blocks]
    values = {"x": X}
    for span in fxlocal.ir.stages.cut_spans(captured, starts):
        made = span.network.forward(*(values[name] for name in span.inputs))
        for name in span.ended:
            del values[name]
        values.update(zip(span.outputs, made, strict=True))
    assert torch.equal(*values.values(), model(X))


def test_the_model_stays_as_it_is(fast):
    model = NETS["dropout"].build()
    model(X).sum().backward()
    model.conv1.weight.grad = None
    before, random, x = copy.deepcopy(model), random_state(), X.clone()
    kept = copy.deepcopy(gradients(model))
    auto(model, x, memory=0.4)
    assert_equal(dict(model.state_dict()), dict(before.state_dict()), "state")
    assert_equal(gradients(model), kept, "gradients")
    assert torch.equal(random_state()["torch"], random["torch"])
    assert random_state()["python"] == random["python"]
    assert torch.equal(x, X)
    assert model.training


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"memory": 1.0}, Plan()),
        ({"memory": 640}, Plan()),
        ({"memory": "0.5KiB"}, Plan(checkpoint=Checkpoint(2, ("2",)))),
        ({"memory": 0.6, "exact": True}, Plan(checkpoint=Checkpoint(2, ("3",)))),
        ({"time": 0.8}, Plan(local=LocalPrefix("2", Freeze()))),
        ({"time": 0.8, "memory": 400}, Plan(local=LocalPrefix("3", Freeze()))),
        ({"memory": 250}, Plan(local=LocalPrefix("5", Freeze()))),
        (
            {"time": 0.9, "memory": 256},
            Plan(LocalPrefix("3", Freeze()), checkpoint=Checkpoint(2, ("5",))),
        ),
    ],
)
def test_the_plan_that_changes_least(fast, monkeypatch, asked, chosen):
    seconds = iter([1.0, 0.5] * 20)
    monkeypatch.setattr(Steps, "seconds", lambda self, network: next(seconds))
    choice = auto(linears(), ROWS, loss=torch.sum, **asked)
    assert choice.plan == chosen
    assert choice.sgd_bytes == 640
    assert choice.limit is None or choice.peak_bytes <= choice.limit
    assert repr(chosen) in str(choice)
    assert ("activation_memory_budget" in str(choice)) == choice.predicted.exact


def test_the_next_smaller_plan_where_a_step_keeps_more_than_predicted(fast, monkeypatch):
    predicted = KeptBytes.checkpointed
    monkeypatch.setattr(KeptBytes, "checkpointed", lambda *a: predicted(*a) * 3 // 4)
    choice = auto(linears(), ROWS, loss=torch.sum, memory=400, exact=True)
    assert choice.peak_bytes == 384
    assert choice.predicted.peak_bytes == 288


def test_the_next_faster_plan_where_a_step_takes_longer_than_predicted(fast, monkeypatch):
    def seconds(self, network):
        local = network.history.plan.local
        return 1.0 if local is None or int(local.until) < 4 else 0.7

    monkeypatch.setattr(Steps, "seconds", seconds)
    assert auto(linears(), ROWS, time=0.8).plan.local.until == "4"


def test_local_modules_are_tried_where_the_classes_are_known(fast):
    found = auto(NETS["chain"].build(), X, memory=0.9, num_classes=5).table.rows
    assert any(row.plan.modules for row in found)
    assert not any(row.exact for row in found if row.plan.modules)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "no budget"),
        ({"memory": "6 gigs"}, "'6 gigs': give bytes"),
        ({"memory": 1.5}, "1.5: give bytes"),
        ({"memory": True}, "True: give bytes"),
        ({"memory": 0}, "0: give bytes"),
        ({"time": 0}, "0: give a fraction"),
        ({"time": "fast"}, "'fast': give a fraction"),
        ({"memory": "100B"}, r"fits 0.1 KiB: the smallest keeps 0.\d KiB of plain training's 0.6"),
        ({"memory": "100B", "exact": True}, r"no exact plan .* the smallest keeps 0.2 KiB"),
        ({"time": 0.01}, r"the fastest takes 0.\d\d of its step \(Plan\(local=.*until='5'"),
    ],
)
def test_a_budget_that_cannot_be_kept(fast, asked, said):
    with pytest.raises(PlanError, match=said):
        auto(linears(), ROWS, loss=torch.sum, **asked)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (partial(auto, linears(), memory=0.5), PlanError, "give one batch of inputs"),
        (partial(auto, nn.Sequential(nn.ReLU()), ROWS, memory=0.5), PlanError, "no convolution"),
        (partial(auto, linears().requires_grad_(False), ROWS, time=0.5), PlanError, "none, or"),
        (partial(auto, linears(), ROWS, memory=0.5, loss=nn.Identity()), ValueError, "to scalar"),
        (partial(auto, linears(), ROWS, memory=0.5, num_classes=0), PlanError, "num_classes=0"),
    ],
)
def test_inputs_that_do_not_fit(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_of_one_block_there_is_nothing_to_choose(fast):
    choice = auto(Written(lambda m, x: m.fc(x), fc=nn.Linear(8, 8)), ROWS, memory=1.0)
    assert [row.plan for row in choice.table.rows] == [choice.plan] == [Plan()]

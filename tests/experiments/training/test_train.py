"""One run: equal to a loop by hand, resumable to the bit, honest about what it saved."""

import dataclasses
import gc
import math
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.tiny import (
    BATCH,
    LOCAL,
    SETTINGS,
    dropout_net,
    fake_data,
    interrupted,
    resnet,
    run,
    same_state,
    schedule_of,
)
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import CheckpointError, Freeze, Hebbian, LocalPrefix, Plan
from fxlocal.experiments.data.catalogue import DataError, batches
from fxlocal.experiments.training.measure import count_saved_bytes, split_seconds
from fxlocal.experiments.training.settings import Machine, Settings, SettingsError
from fxlocal.experiments.training.trainer import DivergedError
from fxlocal.schedules import Constant, Static

SGD = Constant(Plan())


# Plain training


def train_by_hand(model):
    """Train as `SETTINGS` say, without fxlocal."""
    data = fake_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(0)
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.1 ** ((epoch >= 2) + (epoch >= 3))
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        for x, y in batches(data.train, 16, generator=generator, drop_last=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return optimizer


def test_sgd_equals_a_loop_by_hand(tmp_path):
    model, other = dropout_net(), dropout_net()
    run(model, SGD, checkpoint=tmp_path / "c.pt")
    optimizer = train_by_hand(other)
    assert same_state(model.state_dict(), other.state_dict())
    saved = torch.load(tmp_path / "c.pt")["state"]["driver"]["optimizer"]["state"]
    assert same_state(saved, optimizer.state_dict()["state"])


def test_equal_seeds_give_equal_numbers():
    a, b, c = (run(dropout_net(), LOCAL, seed=seed) for seed in (3, 3, 4))
    assert a.loss == b.loss and a.errors == b.errors
    assert a.loss != c.loss


def test_strategies_share_batches_and_random_numbers_until_the_boundary_moves():
    frozen = Static(4, largest=0.8, start=0.5, rule=Freeze())
    a, b = run(dropout_net(), SGD), run(dropout_net(), frozen)
    first = next(epoch for epoch, boundary in enumerate(b.boundary) if boundary)
    assert 0 < first < 4
    assert a.loss[:first] == b.loss[:first]


# Local and frozen layers


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizer_does_not_move_a_frozen_prefix(optimizer):
    model = resnet()
    before = []
    schedule = Static(4, largest=0.8, start=0.25, rule=Freeze())
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, weight_decay=0.1, lr=0.01)
    record = run(
        model,
        schedule,
        settings,
        on_epoch=lambda _: before.append([p.detach().clone() for p in model.parameters()]),
    )
    analysis = fxlocal.analyze(model)
    names = [name for name, _ in model.named_parameters()]
    assert record.boundary[0] == 0 < record.boundary[1] < record.boundary[3]
    for epoch in range(1, 4):
        prefix = {layer.weight for layer in analysis.layers[: record.boundary[epoch]]}
        for name, old, new in zip(names, before[epoch - 1], before[epoch], strict=True):
            if name.endswith("weight") and "bn" not in name and "downsample.1" not in name:
                assert torch.equal(old, new) == (name in prefix), (epoch, name)


def test_local_prefix_moves_by_the_rate_alone():
    model = dropout_net()
    old = model.conv1.weight.detach().clone()
    plan = Plan(local=LocalPrefix("conv2", Hebbian(1e-3)))
    run(model, Constant(plan), dataclasses.replace(SETTINGS, epochs=1, weight_decay=0.1))
    steps = 64 // 16
    assert 0 < (model.conv1.weight - old).norm() <= steps * 1e-3 * 1.0001
    assert model.conv1.bias.grad is None


# What is recorded


def test_record_has_one_entry_per_epoch():
    record = run(resnet(), LOCAL, dataclasses.replace(SETTINGS, evaluate_every=3))
    for values in (record.boundary, record.loss, record.saved_bytes, record.seconds):
        assert len(values) == 4
    assert record.error_epochs == [3, 4]
    assert record.error_percent == record.errors[-1]
    assert record.seconds == sorted(record.seconds) and record.seconds[-1] == record.train_seconds
    assert record.compile_seconds > 0


def test_saved_bytes_fall_as_the_boundary_moves():
    record = run(resnet(), LOCAL)
    assert record.boundary == sorted(record.boundary) and record.boundary[-1] > 0
    moves = list(zip(record.boundary, record.saved_bytes, strict=True))
    for (left, more), (right, less) in pairwise(moves):
        assert (more > less) if left < right else (more == less)
    predicted = fxlocal.analyze(resnet(), torch.zeros(BATCH)).saved_bytes(record.boundary[-1])
    # The loss keeps something too: log-probabilities, labels and a weight.
    assert 0 <= record.saved_bytes[-1] - predicted <= 16 * (10 * 4 + 8) + 8


def test_counting_saved_bytes_counts_storages_once():
    model = nn.Linear(4, 5)
    x = torch.ones(3, 4)
    with count_saved_bytes(model) as saved_bytes:
        out = model(x).sigmoid()
        out = out * out
    assert saved_bytes() == 3 * 4 * 4 + 3 * 5 * 4  # x, and one sigmoid for both its users
    out.sum().backward()


def test_amp_channels_last_and_cosine_train():
    settings = dataclasses.replace(SETTINGS, lr_schedule="cosine", epochs=2)
    model = resnet()
    record = run(model, LOCAL, settings, Machine(amp=True, channels_last=True))
    assert all(map(math.isfinite, record.loss))
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_compiled_run_counts_compilation_apart():
    schedule = schedule_of("local-static(start=0.5,largest=0.8)", 2)
    few = dataclasses.replace(SETTINGS, epochs=2)
    record, eager = (run(resnet(), schedule, few, Machine(compile=c)) for c in (True, False))
    assert record.boundary[0] < record.boundary[-1]
    assert record.compile_seconds > record.train_seconds
    assert record.boundary == eager.boundary
    assert record.loss == pytest.approx(eager.loss, rel=1e-3)
    assert record.saved_bytes == sorted(record.saved_bytes, reverse=True)


@pytest.mark.parametrize(
    ("seconds", "steps", "expected"),
    [
        ((10.0, 4.0), (4, 1), (8.0, 2.0)),  # the step that compiled did 2 s of work
        ((10.0, 0.5), (4, 1), (10.0, 0.0)),
        ((10.0, 9.0), (2, 2), (1.0, 9.0)),  # nothing to tell its work by
        ((10.0, 1.0), (4, 0), (9.0, 1.0)),
    ],
)
def test_a_step_that_compiles_counts_as_training_too(seconds, steps, expected):
    assert split_seconds(*seconds, *steps) == pytest.approx(expected)


def test_a_run_leaves_its_model_to_be_freed():
    model = resnet()
    run(model, LOCAL)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Resume

RESUME = """
import sys
from pathlib import Path
import torch
from support.tiny import LOCAL, dropout_net, run
torch.set_num_threads(1)
run(dropout_net(), LOCAL, checkpoint=Path(sys.argv[1]), resume=True)
"""


@pytest.mark.slow  # starts a process
def test_resume_in_a_new_process_is_exact(tmp_path):
    straight, broken = tmp_path / "straight.pt", tmp_path / "broken.pt"
    run(dropout_net(), LOCAL, checkpoint=straight)
    interrupted(broken, 2, dropout_net())
    subprocess.run(
        [sys.executable, "-c", RESUME, str(broken)], check=True, cwd=Path(__file__).parents[2]
    )
    a, b = (torch.load(path)["state"] for path in (straight, broken))
    for part in ("model", "optimizer", "history", "losses", "epoch"):
        assert same_state(a["driver"][part], b["driver"][part]), part
    assert same_state(a["driver"]["random"]["torch"], b["driver"]["random"]["torch"])
    assert a["scheduler"] == b["scheduler"]
    for part in ("errors", "boundary", "loss", "saved_bytes"):
        assert a["run"][part] == b["run"][part], part
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_run_resumes_to_its_record(tmp_path):
    path = tmp_path / "c.pt"
    assert run(dropout_net(), LOCAL, checkpoint=path) == run(
        dropout_net(), LOCAL, checkpoint=path, resume=True
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": Settings(epochs=4, batch_size=8)}, "batch_size is 16 there and 8 here"),
        ({"schedule": Static(4, rule=Freeze())}, "schedule is .* there and .*Freeze"),
        ({"seed": 7}, "seed is 0 there and 7 here"),
        ({"model": resnet()}, "another model"),
    ],
    ids=["settings", "schedule", "seed", "model"],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    path = tmp_path / "c.pt"
    interrupted(path, 1, dropout_net())
    before = path.read_bytes()
    arguments = {"model": dropout_net(5), "schedule": LOCAL} | change
    model = arguments["model"]
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        run(**arguments, checkpoint=path, resume=True)
    assert all(map(torch.equal, weights, model.parameters()))
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["train images", "test labels", "number"])
def test_checkpoint_of_other_images_is_refused(tmp_path, change):
    path, data = tmp_path / "c.pt", fake_data(65 if change == "number" else 64)
    interrupted(path, 1, dropout_net())
    if change == "train images":
        data.train.images[0] += 1
    if change == "test labels":
        data.test.labels[3] += 1
    with pytest.raises(CheckpointError, match=r"data is 'fake .* 64 .* there and 'fake"):
        run(dropout_net(), LOCAL, data=data, checkpoint=path, resume=True)


def test_missing_or_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        run(dropout_net(), LOCAL, checkpoint=path, resume=True)
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            run(dropout_net(), LOCAL, checkpoint=path, resume=True)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run(dropout_net(), LOCAL, checkpoint=path, resume=True)


# Bad input


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    path, data = tmp_path / "c.pt", fake_data()
    kept = []

    def spoil(record):
        kept.append(path.read_bytes())
        data.train.images.fill_(float("inf"))

    with pytest.raises(DivergedError, match=r"loss is nan in epoch 2 of x, seed 0.*c\.pt") as error:
        run(dropout_net(), SGD, data=data, strategy="x", checkpoint=path, on_epoch=spoil)
    assert kept == [path.read_bytes()]
    assert len(error.value.run.loss) == 2


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(DataError, match="batch of 65 from 64"):
        run(dropout_net(), SGD, Settings(epochs=1, batch_size=65))


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"lr": -1.0},
        {"momentum": float("nan")},
        {"grow_lr": "sqrt"},
        {"momentum": 0.5, "optimizer": "adam"},
    ],
)
def test_settings_out_of_range_or_idle_are_refused(values):
    name = next(iter(values)).replace("_", ".")
    with pytest.raises(SettingsError, match=name):
        Settings(**values)


def test_unknown_device_is_refused():
    with pytest.raises(SettingsError, match="'abacus'"):
        Machine(device="abacus")


@pytest.mark.parametrize(
    ("threads", "side", "used"), [(None, 8, 1), (None, 32, 3), (2, 8, 2), (2, 32, 2)]
)
def test_small_images_get_one_thread_unless_told_otherwise(threads, side, used):
    torch.set_num_threads(3)
    Machine(threads=threads).set_threads((3, side, side))
    assert torch.get_num_threads() == used
    with pytest.raises(SettingsError, match="threads=0"):
        Machine(threads=0)

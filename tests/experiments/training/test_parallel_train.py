"""Runs on several processes: the numbers of one, resumable, and refused where they cannot be."""

import dataclasses
import multiprocessing

import pytest
import torch
from support.tiny import SETTINGS, Interrupt, experiment, fake_data, resnet, run

from fxlocal import CheckpointError, LocalModules, Plan
from fxlocal.experiments.data.catalogue import DataError
from fxlocal.experiments.training.objective import Pruning
from fxlocal.experiments.training.ranks import train_parallel
from fxlocal.experiments.training.settings import Machine, Settings, SettingsError
from fxlocal.experiments.training.trainer import DivergedError
from fxlocal.parallel import ParallelError
from fxlocal.schedules import Constant

BACKLINK = Constant(Plan(modules=LocalModules(2, link=1, num_classes=10)))
FEW = dataclasses.replace(SETTINGS, epochs=2)


def run_parallel(model, schedule=BACKLINK, settings=FEW, nproc=2, data=None, **how):
    strategy = how.pop("strategy", "")
    job = experiment(model, schedule, settings, data=data, strategy=strategy)
    return train_parallel(job, nproc, **how)


@pytest.mark.slow  # starts processes
def test_two_processes_give_the_numbers_of_one_and_go_on_after_a_break(tmp_path):
    path, alone, model = tmp_path / "c.pt", resnet(), resnet()
    expected = run(alone, BACKLINK, FEW)
    steps = []

    def stop(record):
        raise Interrupt

    with pytest.raises(Interrupt):
        run_parallel(resnet(), checkpoint=path, on_step=steps.append, on_epoch=stop)
    assert [one.step for one in steps] == [1, 2, 3, 4]
    epochs = []
    record = run_parallel(model, checkpoint=path, resume=True, on_epoch=epochs.append)
    assert len(epochs) == 1
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-5)
    assert record.loss == pytest.approx(expected.loss, rel=1e-4)
    assert record.errors == expected.errors and record.error_epochs == [1, 2]
    assert record.images == expected.images
    assert 0 < record.saved_bytes[0] < expected.saved_bytes[0] * 1.01
    with pytest.raises(CheckpointError, match="batch_size is 16 there and 32 here"):
        larger = dataclasses.replace(FEW, batch_size=32)
        run_parallel(model, settings=larger, checkpoint=path, resume=True)


@pytest.mark.slow
def test_replicas_share_out_each_batch():
    record = run_parallel(resnet(), nproc=4)
    expected = run(resnet(), BACKLINK, FEW)
    assert record.images == expected.images
    # Batch norms see half of the batch.
    assert record.loss == pytest.approx(expected.loss, rel=0.2) and record.loss != expected.loss


@pytest.mark.slow
def test_all_ranks_cut_the_same_channels_and_go_on_after_a_break(tmp_path):
    pruning = Pruning(share=0.9, every=1, threshold=0.4)  # a few weights are below it at once
    model, again, path = resnet(), resnet(), tmp_path / "c.pt"
    record = run_parallel(model, pruning)
    assert record.flops[1] < 0.9 * record.flops[0] and record.wire_bytes[1] < record.wire_bytes[0]
    assert sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in resnet().parameters()
    )

    def stop(record):
        raise Interrupt

    with pytest.raises(Interrupt):
        run_parallel(resnet(), pruning, checkpoint=path, on_epoch=stop)
    resumed = run_parallel(again, pruning, checkpoint=path, resume=True)
    assert resumed.loss == record.loss and resumed.flops == record.flops
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_modules_at_their_own_pace_come_to_the_end_of_each_epoch():
    decoupled = Constant(Plan(modules=LocalModules(2, num_classes=10, replay=2)))
    record = run_parallel(resnet(), decoupled)
    assert record.error_epochs == [1, 2] and record.loss[1] < record.loss[0]


# Failures


def kill_rank_1(record):
    _, second = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
    second.kill()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_leaves_the_checkpoint(tmp_path):
    path = tmp_path / "c.pt"

    with pytest.raises(ParallelError, match=r"rank 1 \(module 1\) ended or did not answer"):
        settings = dataclasses.replace(FEW, epochs=1000)
        run_parallel(resnet(), settings=settings, checkpoint=path, on_epoch=kill_rank_1)
    assert torch.load(path)["state"]["epoch"] > 0
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ranks_that_are_started_again_go_on_from_the_checkpoint(tmp_path):
    settings = dataclasses.replace(FEW, epochs=30)
    kills = [kill_rank_1]

    def kill_once(record):
        if kills:
            kills.pop()(record)

    options = {"settings": settings, "checkpoint": tmp_path / "c.pt", "max_restarts": 1}
    record = run_parallel(resnet(), on_epoch=kill_once, **options)
    expected = run_parallel(resnet(), settings=settings)
    assert not kills
    assert record.loss == expected.loss and record.errors == expected.errors
    assert record.error_epochs == list(range(1, 31))


@pytest.mark.slow
def test_what_is_wrong_with_the_data_is_told_as_in_one_process(tmp_path):
    with pytest.raises(DataError, match="cannot draw a batch of 128 from 64 images"):
        run_parallel(resnet(), settings=Settings(epochs=1, batch_size=128))
    data = fake_data()
    data.train.images.fill_(float("inf"))
    with pytest.raises(DivergedError, match="loss is nan in epoch 1 of x, seed 0") as error:
        run_parallel(resnet(), data=data, strategy="x")
    assert len(error.value.run.loss) == 1


def graphs():
    machine = Machine()
    object.__setattr__(machine, "cudagraph", True)  # a machine without a GPU refuses to be told
    return machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": Constant(Plan()), "nproc": 17}, "a batch of 16 images has none for some of"),
        ({"machine": graphs()}, "leave out --cudagraph"),
        ({"nproc": 3}, "2 local modules need 2 processes or a multiple"),
        ({"nproc": 6}, "batch_size=16: cannot be shared out to 3 replicas"),
        ({"settings": dataclasses.replace(FEW, grow_batch=True)}, "leave out --grow-batch"),
        ({"machine": Machine(compile=True)}, "leave out --compile"),
    ],
    ids=["images", "captured", "processes", "replicas", "growing", "compiled"],
)
def test_what_cannot_be_shared_out_is_refused(change, message):
    arguments = {"schedule": BACKLINK, "settings": FEW, "nproc": 2} | change
    nproc = arguments.pop("nproc")
    with pytest.raises(SettingsError, match=message):
        train_parallel(experiment(resnet(), **arguments), nproc)

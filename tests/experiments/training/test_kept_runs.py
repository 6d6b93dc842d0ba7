"""What a run keeps: inside an epoch, before it is judged, on a full disk; and what is damaged."""

import errno
import io
import os
import signal
from dataclasses import replace

import pytest
import torch
from support.tiny import LOCAL, SETTINGS, Interrupt, dropout_net, run, schedule_of

from fxlocal import CheckpointError
from fxlocal.experiments import files
from fxlocal.experiments.stopping import StoppedError, handle_signals
from fxlocal.experiments.training import trainer
from fxlocal.experiments.training.checkpoint import save_checkpoint
from fxlocal.experiments.training.settings import Settings

NUMBERS = ("loss", "errors", "error_epochs", "boundary", "saved_bytes", "batch_size", "images")


def numbers_of(record):
    return {name: getattr(record, name) for name in NUMBERS}


def stopped(path, step, number=signal.SIGTERM, **how):
    """Begin a run, which a signal stops in its step number ``step``; return what it says."""
    taken = []

    def count(reading):
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError) as caught, handle_signals():
        run(dropout_net(), checkpoint=path, on_step=count, **how)
    assert caught.value.number == number
    return caught.value.where


GROWING = replace(SETTINGS, batch_size=8, grow_batch=True)
RUNS = {
    "local": (schedule_of("local-static(start=0.25,largest=0.8)"), SETTINGS),
    "dynamic": (schedule_of("local-dynamic(alpha=1,shift=0.3)"), SETTINGS),
    "growing": (schedule_of("freeze(start=0.25,largest=0.8)"), GROWING),
    "modules": (schedule_of("dgl(modules=2,balance=blocks,head=linear)"), SETTINGS),
    "adamw": (
        schedule_of("refresh(start=0,refresh_every=2)"),
        replace(SETTINGS, optimizer="adamw"),
    ),
}


@pytest.mark.parametrize(
    "name", [n if n == "local" else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_a_run_stopped_between_steps_goes_on_exactly(name, tmp_path):
    schedule, settings = RUNS[name]
    how = {"schedule": schedule, "settings": settings}
    whole, model, path = dropout_net(), dropout_net(5), tmp_path / "c.pt"
    expected = run(whole, **how)
    per_epoch = [64 // size for size in expected.batch_size]
    step = sum(per_epoch[:2]) + 1  # the first of the third epoch
    assert stopped(path, step, **how) == "in epoch 3, step 1"
    found = run(model, checkpoint=path, resume=True, **how)
    assert numbers_of(found) == numbers_of(expected)
    for mine, theirs in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_run_stopped_in_an_epochs_last_step_ends_it(tmp_path):
    path = tmp_path / "c.pt"
    assert stopped(path, 4, signal.SIGINT, schedule=LOCAL) == "after epoch 1"
    assert numbers_of(run(dropout_net(5), LOCAL, checkpoint=path, resume=True)) == numbers_of(
        run(dropout_net(), LOCAL)
    )


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(reading):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError, match="before its first checkpoint"), handle_signals():
        run(dropout_net(), LOCAL, checkpoint=tmp_path / "c.pt", on_step=twice)
    assert not list(tmp_path.iterdir())


def test_a_run_keeps_every_so_many_steps(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda p, f, s: kept.append(s["driver"]["step"])
    )
    settings = replace(SETTINGS, epochs=1, batch_size=8)
    how = {"checkpoint": tmp_path / "c.pt", "save_every": 3}
    trainer.train_run(experiment_of(settings), **how)
    assert kept == [3, 6, 0]


def experiment_of(settings):
    from support.tiny import experiment

    return experiment(dropout_net(), LOCAL, settings)


def test_the_checkpoint_is_written_before_the_model_is_judged(tmp_path, monkeypatch):
    path, settings = tmp_path / "c.pt", replace(SETTINGS, epochs=2, evaluate_every=2)
    expected = run(dropout_net(), LOCAL, settings)

    def breaks(*_):
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "find_error_percent", breaks)
        with pytest.raises(Interrupt):
            run(dropout_net(), LOCAL, settings, checkpoint=path)
    assert torch.load(path, weights_only=True)["state"]["driver"]["epoch"] == 2
    found = run(dropout_net(), LOCAL, settings, checkpoint=path, resume=True)
    assert numbers_of(found) == numbers_of(expected)


# A full disk


def full(path, mode):
    """Take four bytes and no more."""

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return Full(path, mode)


def test_a_full_disk_leaves_the_old_files_whole(tmp_path, monkeypatch):
    path, others = tmp_path / "c.pt", {tmp_path / "a.json": "new", tmp_path / "b.json": b"new"}
    with pytest.raises(Interrupt):
        run(dropout_net(), LOCAL, checkpoint=path, on_epoch=_interrupt)
    files.write_all(dict.fromkeys(others, "old"))
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match=r"^cannot write .*c\.pt: No space left on device; what was"):
        run(dropout_net(), LOCAL, checkpoint=path, resume=True)
    with pytest.raises(OSError, match="No space left"):
        files.write_all(others)
    assert {one: one.read_bytes() for one in tmp_path.iterdir()} == before


def _interrupt(record):
    raise Interrupt


# What is no checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "c.pt"
    with pytest.raises(Interrupt):
        run(dropout_net(), LOCAL, checkpoint=path, on_epoch=_interrupt)
    return path.read_bytes()


def flipped(data, where):
    place = int(where * len(data))
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def saved(content):
    packed = io.BytesIO()
    torch.save(content, packed)
    return packed.getvalue()


class Opens:
    """What would open a file if it were unpickled."""

    def __reduce__(self):
        return open, ("opened", "w")


DAMAGES = {
    "empty": (lambda data: b"", "it is empty"),
    "text": (lambda data: b"epoch 3\n" * 99, "it does not end with a checksum"),
    "cut short": (lambda data: data[:-1000], "it does not end with a checksum"),
    "by torch": (lambda data: saved({"weights": 1}), "it does not end with a checksum"),
    "a tail": (lambda data: data[-100:], "it is damaged"),
    **{
        f"a byte at {where}": (lambda data, where=where: flipped(data, where), "it is damaged")
        for where in (0.0, 0.1, 0.5, 0.9, 0.9999)
    },
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused_in_a_line(name, written, tmp_path):
    damage, message = DAMAGES[name]
    path, model = tmp_path / "c.pt", dropout_net()
    path.write_bytes(damage(written))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=f"c.pt is not a checkpoint .*: {message}") as caught:
        run(model, LOCAL, checkpoint=path, resume=True)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, model.parameters()))


def content_of(path, written):
    path.write_bytes(written)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("part", ["driver", "growth", "scheduler", "run", "numbers"])
def test_a_checkpoint_without_a_part_is_refused(part, written, tmp_path):
    path, model = tmp_path / "c.pt", dropout_net()
    content = content_of(path, written)
    del content["state"][part]
    save_checkpoint(path, content["fingerprint"], content["state"])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=f"has no {part}"):
        run(model, LOCAL, checkpoint=path, resume=True)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_checkpoint_of_another_format_is_refused(written, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    content = content_of(path, written)
    with monkeypatch.context() as patch:
        patch.setattr("fxlocal.experiments.training.checkpoint.FORMAT", 9)
        save_checkpoint(path, content["fingerprint"], content["state"])
    with pytest.raises(CheckpointError, match=r"format 9, of fxlocal .* reads format 2"):
        run(dropout_net(), LOCAL, checkpoint=path, resume=True)


def test_reading_a_checkpoint_runs_no_code(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"
    content = content_of(path, written)
    save_checkpoint(path, content["fingerprint"], content["state"] | {"more": Opens()})
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run(dropout_net(), LOCAL, checkpoint=path, resume=True)
    assert not (tmp_path / "opened").exists()


# More epochs


def test_epochs_may_grow_where_nothing_goes_by_their_number(tmp_path):
    path, steady = tmp_path / "c.pt", replace(SETTINGS, epochs=2, lr_schedule="step(every=1)")
    schedule = schedule_of("sgd")
    run(dropout_net(), schedule, steady, checkpoint=path)
    longer = replace(steady, epochs=4)
    found = run(dropout_net(5), schedule, longer, checkpoint=path, resume=True)
    assert numbers_of(found) == numbers_of(run(dropout_net(), schedule, longer))
    with pytest.raises(CheckpointError, match="epochs is 4 there and 3 here"):
        run(dropout_net(), schedule, replace(steady, epochs=3), checkpoint=path, resume=True)


def test_epochs_do_not_grow_where_the_learning_rate_goes_by_them(tmp_path):
    path = tmp_path / "c.pt"
    run(dropout_net(), schedule_of("sgd"), Settings(epochs=1, batch_size=32), checkpoint=path)
    longer = Settings(epochs=2, batch_size=32)
    with pytest.raises(CheckpointError, match=r"epochs is 1 .* lr_schedule 'step' goes by the num"):
        run(dropout_net(), schedule_of("sgd"), longer, checkpoint=path, resume=True)

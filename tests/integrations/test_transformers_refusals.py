"""The Trainer of transformers: checkpoints and arguments that do not fit, and two processes."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.ranks import run_ranks
from support.tiny import same_state
from support.trainer import BATCH, FREEZE, SCHEDULES, Net, same, trained, trainer

import fxlocal
from fxlocal.errors import CheckpointError, PlanError
from fxlocal.integrations.transformers import ScheduleCallback

# Checkpoints that do not fit


def saved(folder, **options):
    trained(folder, FREEZE, **options)
    return folder / "checkpoint-12"


def test_a_checkpoint_without_our_state_warns_and_names_the_file(tmp_path):
    checkpoint = saved(tmp_path)
    (checkpoint / "fxlocal_0.pt").unlink()
    with pytest.warns(UserWarning, match=re.escape(str(checkpoint / "fxlocal_0.pt"))):
        _, callback = trained(tmp_path, FREEZE, str(checkpoint))
    assert callback.driver.history == trained(tmp_path, FREEZE)[1].driver.history[2:]


def test_a_checkpoint_without_our_state_is_refused_if_asked(tmp_path):
    checkpoint = saved(tmp_path)
    (checkpoint / "fxlocal_0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"fxlocal_0\.pt"):
        trained(tmp_path, FREEZE, str(checkpoint), callback={"require_state": True})


def test_a_checkpoint_elsewhere_is_found_by_the_argument(tmp_path):
    checkpoint, moved = saved(tmp_path / "a"), tmp_path / "moved"
    checkpoint.rename(moved)
    whole = trained(tmp_path / "b", FREEZE)
    options = {"resume_from_checkpoint": str(moved)}
    same(whole, trained(tmp_path / "c", FREEZE, str(moved), **options))


def test_the_state_of_other_weights_is_refused(tmp_path):
    """Resumed from a folder elsewhere, while that of the same step here is another run's."""
    saved(tmp_path / "a", seed=1)
    theirs = saved(tmp_path / "b", seed=2)
    with pytest.raises(CheckpointError, match="other weights"):
        trained(tmp_path / "a", FREEZE, str(theirs))


def test_the_state_of_another_schedule_is_refused(tmp_path):
    checkpoint = saved(tmp_path)
    with pytest.raises(CheckpointError, match="another schedule"):
        trained(tmp_path, SCHEDULES["hebbian"], str(checkpoint))


# What is refused when the trainer is made


def arguments(**given):
    """The arguments of a trainer that this machine may not have."""
    usual = {"torch_compile": False, "n_gpu": 1, "world_size": 1, "fp16": False}
    usual |= {"gradient_accumulation_steps": 1, "ddp_find_unused_parameters": None}
    return SimpleNamespace(**usual | given)


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        ("freeze", {"torch_compile": True}, "give compile=True to the callback"),
        ("freeze", {"fsdp": "full_shard"}, "without them"),
        ("freeze", {"deepspeed": "z3.json"}, "without them"),
        ("freeze", {"n_gpu": 2}, "torchrun"),
        ("freeze", {"world_size": 2, "ddp_find_unused_parameters": False}, "leave it out"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(schedule, options, words):
    model = Net()
    callback = ScheduleCallback(SCHEDULES[schedule], BATCH)
    with pytest.raises(PlanError, match=words):
        callback.on_init_end(arguments(**options), None, None, model)
    fxlocal.attach(model, FREEZE).detach()  # it was let go of


def test_torch_compile_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(PlanError, match="give compile=True"):
        trainer(tmp_path, FREEZE, torch_compile=True)


def test_a_model_that_is_attached_is_refused(tmp_path):
    model = Net()
    driver = fxlocal.attach(model, FREEZE)
    with pytest.raises(PlanError, match="detach"):
        trainer(tmp_path, FREEZE, model=model)
    driver.detach()


# Two processes


def rank_of(folder, checkpoint=""):
    """Train as one of two ranks, by each rule; run in a process of its own."""
    ends, options = {}, {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
    for rule in (FREEZE.rule, fxlocal.Hebbian(0.01)):
        own = Path(folder) / type(rule).__name__
        at = str(own / checkpoint) if checkpoint else None
        loop, callback = trained(own, replace(FREEZE, rule=rule), at, **options)
        model, driver = loop.model.state_dict(), callback.driver
        ends[own.name] = {"model": model, "losses": driver.losses, "history": driver.history}
    torch.save(ends, Path(folder) / f"end_{loop.args.process_index}.pt")


@pytest.mark.slow
def test_two_ranks_train_one_model_and_go_on_exactly(tmp_path):
    ranks = run_ranks(__file__, tmp_path, "")
    assert [*ranks[0]] == ["Freeze", "Hebbian"]
    for rule in ranks[0]:
        first, second = (ends[rule] for ends in ranks)
        assert same_state(first["losses"], second["losses"]) and max(first["history"]) > 0
        shared = [name for name in first["model"] if "running" not in name]
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in shared)
    assert same_state(ranks, run_ranks(__file__, tmp_path, "checkpoint-12"))


if __name__ == "__main__":
    rank_of(*sys.argv[1:])

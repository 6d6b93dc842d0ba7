"""The Trainer of transformers with a model that runs the network of each step."""

import copy
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.tiny import same_state  # noqa: E402

import fxlocal  # noqa: E402
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan  # noqa: E402
from fxlocal.errors import CheckpointError, PlanError  # noqa: E402
from fxlocal.integrations.transformers import ScheduleCallback  # noqa: E402
from fxlocal.schedules import Constant, Dynamic, Static  # noqa: E402

ROWS, WIDTH, CLASSES = 24, 6, 3


class Net(nn.Module):
    """Layers with a norm and dropout, that take their labels as a model of transformers does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x, labels=None):
        x = torch.relu(self.norm(self.first(x)))
        x = self.drop(torch.relu(self.second(x)))
        logits = self.head(torch.relu(self.third(x)))
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def rows():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return [{"x": one, "labels": int(one.sum() > 0)} for one in x]


BATCH = (torch.zeros(4, WIDTH), torch.zeros(4, dtype=torch.long))


def trainer(folder, schedule, epochs=4, model=None, seed=0, **options):
    torch.manual_seed(seed)
    model = model or Net()
    callback = ScheduleCallback(schedule, BATCH, **options.pop("callback", {}))
    settings = {
        "per_device_train_batch_size": 4,
        "save_strategy": "epoch",
        "learning_rate": 0.01,
        "num_train_epochs": epochs,
    }
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings | options
    )
    data = {"train_dataset": rows(), "eval_dataset": rows()[:8]}
    return transformers.Trainer(model, arguments, callbacks=[callback], **data), callback


def trained(folder, schedule, resume=None, **options):
    loop, callback = trainer(folder, schedule, **options)
    loop.train(resume_from_checkpoint=resume)
    return loop, callback


def same(a, b):
    (loop, callback), (other, others) = a, b
    assert same_state(loop.model.state_dict(), other.model.state_dict())
    assert same_state(loop.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
    driver, theirs = callback.driver, others.driver
    assert driver.history == theirs.history and driver.losses == theirs.losses
    assert same_state(driver.heads.state_dict(), theirs.heads.state_dict())


FREEZE = Static(epochs=4, rule=Freeze(), norm="eval", start=0.25, largest=0.8)
SCHEDULES = {
    "freeze": FREEZE,
    "hebbian": Static(epochs=4, rule=Hebbian(0.01), start=0.25, largest=0.8),
    "dynamic": Dynamic(epochs=4, alpha=1.0, shift=0.3, largest=0.8, rule=Freeze()),
}

STEADY = {"lr_scheduler_type": "constant"}


def options_of(name):
    return {"callback": {"target": "labels"}} if name == "modules" else {}


def without_dropout():
    torch.manual_seed(3)
    model = Net()
    model.drop.p = 0.0
    return model


class Batches(transformers.TrainerCallback):
    """Keeps what the model was trained on."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_pre_optimizer_step(self, *given, **others):
        _, kwargs = self.callback.driver.inputs
        self.seen.append(dict(kwargs))


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_trains_as_a_loop_by_hand(name, tmp_path):
    plain = {"max_grad_norm": 0.0, "save_strategy": "no", "optim": "sgd"} | STEADY
    schedule, model = SCHEDULES[name], without_dropout()
    loop, callback = trainer(tmp_path, schedule, model=model, **plain, **options_of(name))
    loop.add_callback(batches := Batches(callback))
    loop.train()

    mine = without_dropout()
    driver = fxlocal.Driver(mine, schedule, example_inputs=BATCH)
    driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.01)
    for epoch in range(4):
        driver.start_epoch()
        for batch in batches.seen[6 * epoch : 6 * epoch + 6]:
            if name == "modules":
                _, loss = driver.network()(batch["x"], batch["labels"], target=batch["labels"])
            else:
                loss = driver.network()(**batch)["loss"]
            loss.backward()
            driver.observe(loss)
            driver.optimizer.step()
            driver.optimizer.zero_grad()
        driver.end_epoch()
    assert len(batches.seen) == 24
    assert same_state(mine.state_dict(), model.state_dict())
    assert (driver.history, driver.losses) == (callback.driver.history, callback.driver.losses)
    assert name == "modules" or max(driver.history) > 0
    assert not any("fxlocal" in name for name in model.state_dict())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("saved", ["epoch", "inside", "end"])
def test_a_killed_run_goes_on_exactly(name, saved, tmp_path):
    how = options_of(name)
    if saved != "epoch":
        how |= {"save_strategy": "steps", "save_steps": 8 if saved == "inside" else 12}
    checkpoint = tmp_path / "whole" / f"checkpoint-{8 if saved == 'inside' else 12}"
    whole = trained(tmp_path / "whole", SCHEDULES[name], **how)
    again = trained(tmp_path / "whole", SCHEDULES[name], str(checkpoint), seed=1, **how)
    same(whole, again)
    assert whole[1].driver.epoch == 4


def test_a_run_that_steps_cut_off_goes_on_where_it_was(tmp_path):
    whole = trained(tmp_path / "a", SCHEDULES["dynamic"], max_steps=24, **STEADY)
    options = {"save_strategy": "steps", "save_steps": 9} | STEADY
    trained(tmp_path / "b", SCHEDULES["dynamic"], max_steps=9, **options)
    checkpoint = str(tmp_path / "b" / "checkpoint-9")
    same(whole, trained(tmp_path / "b", SCHEDULES["dynamic"], checkpoint, max_steps=24, **options))


def test_evaluation_moves_nothing(tmp_path):
    # Without dropout, as the evaluation's loader draws from the generator that dropout draws from.
    plain = trained(tmp_path / "a", SCHEDULES["hebbian"], model=without_dropout())
    options = {"eval_strategy": "steps", "eval_steps": 1, "model": without_dropout()}
    same(plain, trained(tmp_path / "b", SCHEDULES["hebbian"], **options))
    loop, _ = plain
    before = copy.deepcopy(loop.model.state_dict())
    loop.evaluate()
    assert same_state(loop.model.state_dict(), before)


def test_accumulated_micro_batches_are_one_step_of_the_schedule(tmp_path):
    every = Static(epochs=4, rule=Freeze(), start=0.25, largest=0.8, refresh_every=3)
    loop, callback = trainer(tmp_path, every, gradient_accumulation_steps=2)
    plans = []

    class Watcher(transformers.TrainerCallback):
        def on_substep_end(self, *given, **others):
            plans.append([callback.driver.step, callback.driver.in_use])

        def on_pre_optimizer_step(self, *given, **others):
            plans[-1] += [callback.driver.step, callback.driver.in_use]

    loop.add_callback(Watcher())
    loop.train()
    assert len(plans) == 12
    assert all(one == other and net is same for one, net, other, same in plans)
    assert [step for step, *_ in plans] == [1, 2, 3] * 4
    checkpoint = str(tmp_path / "checkpoint-6")
    same((loop, callback), trained(tmp_path, every, checkpoint, gradient_accumulation_steps=2))


def test_the_first_step_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fxlocal"):
        trained(tmp_path, Constant(Plan(local=LocalPrefix(until=2, rule=Freeze()))), epochs=1)
    (text,) = [record.message for record in caplog.records]
    assert "first" in text and "frozen" in text and "back-propagation" in text


def test_a_schedule_without_effect_is_warned_of(tmp_path):
    model = Net().requires_grad_(False)
    model.head.requires_grad_(True)
    plan = Plan(local=LocalPrefix(until=2, rule=Hebbian(0.0)))
    with pytest.warns(fxlocal.NoEffectWarning):
        trained(tmp_path, Constant(plan), epochs=1, model=model)


def test_the_model_has_its_own_forward_back(tmp_path):
    loop, _ = trained(tmp_path, FREEZE)
    assert "forward" not in vars(loop.model) or "fxlocal" not in repr(loop.model.forward)
    net = fxlocal.transform(loop.model, Plan())
    assert net.source_model is loop.model


def test_training_twice_begins_anew(tmp_path):
    loop, callback = trained(tmp_path, FREEZE)
    first = callback.driver
    loop.train()
    assert callback.driver is not first and callback.driver.history == first.history


def bert(folder, resume=None, seed=0):
    """Train a model of the package, whose batches are dicts and whose outputs are objects."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=20, num_hidden_layers=2, max_position_embeddings=8, num_labels=3, **sizes
    )
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 20, (16, 6), generator=generator)
    data = [{"input_ids": one, "labels": torch.tensor(int(one[0]) % 3)} for one in ids]
    batch = {"input_ids": ids[:4], "labels": torch.zeros(4, dtype=torch.long)}
    callback = ScheduleCallback(Static(epochs=2, rule=Freeze(), start=0.1, largest=0.9), batch)
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="steps",
        num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        save_steps=1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    loop = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    loop.train(resume_from_checkpoint=resume)
    return loop, callback


def test_a_model_of_the_package_trains_and_goes_on_exactly(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fxlocal"):
        whole = bert(tmp_path)
    assert "bert.encoder.layer.0.attention.self.query" in caplog.text
    assert max(whole[1].driver.history) > 0
    same(whole, bert(tmp_path, str(tmp_path / "checkpoint-3"), seed=1))


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
        ("hebbian", {"world_size": 2}, "drift apart"),
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


def run_ranks(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", __file__, str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{Path(__file__).parent.parent}"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"end_{rank}.pt") for rank in (0, 1)]


def rank_of(folder, checkpoint=None):
    """Train as one of two ranks; run in a process of its own."""
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
    loop, callback = trained(folder, FREEZE, checkpoint, **options)
    driver = callback.driver
    end = {"model": loop.model.state_dict(), "losses": driver.losses, "history": driver.history}
    torch.save(end, Path(folder) / f"end_{loop.args.process_index}.pt")


@pytest.mark.slow
def test_two_ranks_train_one_model_and_go_on_exactly(tmp_path):
    first, second = run_ranks(tmp_path)
    assert same_state(first["losses"], second["losses"]) and max(first["history"]) > 0
    buffers = ("running_mean", "running_var")
    shared = [name for name in first["model"] if not name.endswith(buffers)]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in shared)
    again = run_ranks(tmp_path, str(tmp_path / "checkpoint-12"))
    assert same_state([first, second], again)


if __name__ == "__main__":
    rank_of(*sys.argv[1:])

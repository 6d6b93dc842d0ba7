"""Training that begins again: after a break, with another batch size, model or Trainer."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny import same_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.trainer import (  # noqa: E402
    BATCH,
    SCHEDULES,
    STEADY,
    Net,
    rows,
    same,
    trained,
    trainer,
)

import fxlocal  # noqa: E402
from fxlocal import LocalModules, Plan, PlanError  # noqa: E402
from fxlocal.integrations.transformers import ScheduleCallback  # noqa: E402
from fxlocal.schedules import Constant  # noqa: E402

MODULES = Constant(Plan(modules=LocalModules(2, num_classes=3, output="logits")))
TARGET = {"callback": {"target": "labels"}}


class Breaks(transformers.TrainerCallback):
    """Raises once, at a step."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error = at, error

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.at:
            self.at = None
            raise self.error("DefaultCPUAllocator: can't allocate memory")


def epochs_of(loop, callback):
    """Note the driver's epoch at each of the trainer's."""
    found = []

    class Notes(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            found.append((int(state.epoch), callback.driver.epoch))

    loop.add_callback(Notes())
    return found


@pytest.mark.parametrize("at", [3, 6, 15])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_after_one_that_was_broken_off_begins_anew(name, at, tmp_path):
    loop, callback = trainer(tmp_path, SCHEDULES[name], save_strategy="no")
    loop.add_callback(Breaks(at))
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    epochs = epochs_of(loop, callback)
    loop.train()
    assert epochs == [(epoch, epoch) for epoch in range(4) for _ in range(6)]
    assert len(callback.driver.history) == len(callback.driver.losses) == 4
    assert "forward" not in vars(loop.model) and not loop.model._forward_pre_hooks


def test_another_batch_size_that_the_trainer_finds_begins_anew(tmp_path):
    loop, callback = trainer(
        tmp_path, SCHEDULES["freeze"], auto_find_batch_size=True, save_strategy="no"
    )
    loop.add_callback(Breaks(9, RuntimeError))
    epochs = epochs_of(loop, callback)
    loop.train()
    assert len(epochs) > 9 and all(theirs == ours for theirs, ours in epochs)
    assert len(callback.driver.history) == 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_second_train_after_one_that_ended_inside_an_epoch(name, tmp_path):
    loop, callback = trainer(tmp_path, SCHEDULES[name], max_steps=9, save_strategy="no")
    loop.train()
    loop.args.max_steps = -1
    loop.train()
    assert len(callback.driver.history) == 4


@pytest.mark.parametrize("seed", [0, 1])
def test_local_modules_go_on_exactly_from_a_checkpoint(seed, tmp_path):
    whole = trained(tmp_path, MODULES, **TARGET)
    checkpoint = str(tmp_path / "checkpoint-12")
    same(whole, trained(tmp_path, MODULES, checkpoint, seed=seed, **TARGET))


def test_a_second_train_keeps_the_heads_that_the_optimizer_holds(tmp_path):
    loop, callback = trainer(tmp_path, MODULES, 1, save_strategy="no", **STEADY | TARGET)
    loop.train()
    heads, first = callback.driver.heads, list(callback.driver.heads.parameters())
    learned = [parameter.detach().clone() for parameter in first]
    loop.train()
    assert callback.driver.heads is not heads
    again = [*callback.driver.heads.parameters()]
    assert all(a is b for a, b in zip(again, first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(again, learned, strict=True))


def test_a_model_that_is_made_when_training_begins(tmp_path):
    made = []

    def make():
        torch.manual_seed(0)
        made.append(Net())
        return made[-1]

    callback = ScheduleCallback(SCHEDULES["hebbian"], BATCH)
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        num_train_epochs=4, per_device_train_batch_size=4,
    )  # fmt: skip
    loop = transformers.Trainer(
        None, arguments, callbacks=[callback], train_dataset=rows(), model_init=make
    )
    loop.train()
    loop.train()
    assert len(made) == 3 and callback.driver.model is made[-1]
    assert max(callback.driver.history) > 0
    assert not any("forward" in vars(model) for model in made)
    assert same_state(made[1].state_dict(), made[2].state_dict())


def test_a_trainer_that_is_made_again_takes_the_model_over(tmp_path):
    model = Net()
    first, ours = trainer(tmp_path, SCHEDULES["freeze"], model=model, save_strategy="no")
    second, theirs = trainer(tmp_path, SCHEDULES["freeze"], model=model, save_strategy="no")
    assert len(model._forward_pre_hooks) == 1
    second.train()
    assert len(theirs.driver.history) == 4 and "forward" not in vars(model)
    first.train()
    assert len(ours.driver.history) == 4 and not model._forward_pre_hooks


def test_two_callbacks_of_one_trainer_are_refused(tmp_path):
    _, ours = trainer(tmp_path, SCHEDULES["freeze"], save_strategy="no")
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callbacks = [ScheduleCallback(SCHEDULES[name], BATCH) for name in ("freeze", "hebbian")]
    with pytest.raises(PlanError, match="two drivers would each rewrite it"):
        transformers.Trainer(Net(), arguments, callbacks=callbacks)
    ours.driver.detach()


def test_a_model_that_the_user_attached_is_refused(tmp_path):
    model = Net()
    driver = fxlocal.attach(model, SCHEDULES["freeze"], example_inputs=BATCH)
    with pytest.raises(PlanError, match="two drivers would each rewrite it"):
        trainer(tmp_path, SCHEDULES["freeze"], model=model)
    driver.detach()


def test_smoothed_labels_are_kept_from_local_modules(tmp_path):
    model = Net()
    model.config = SimpleNamespace()  # which the trainer looks into then
    with pytest.raises(PlanError, match="label_smoothing_factor: the trainer keeps the labels"):
        trainer(tmp_path, MODULES, model=model, label_smoothing_factor=0.1, **TARGET)


class Counted(Net):
    """Divides its loss by what the trainer counts, as models of the package do."""

    accepts_loss_kwargs = True

    def forward(self, x, labels=None, num_items_in_batch=None):
        found = super().forward(x, labels)
        if num_items_in_batch is not None:
            found["loss"] = found["loss"] * len(labels) / num_items_in_batch
        return found


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_losses_that_are_parts_of_a_steps_count_whole(parts, tmp_path):
    torch.manual_seed(0)
    model = Counted()
    model.drop.p = 0.0
    model.norm = torch.nn.Identity()
    example = {"x": BATCH[0], "labels": BATCH[1]}
    callback = ScheduleCallback(SCHEDULES["freeze"], example)
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        num_train_epochs=1, per_device_train_batch_size=4, learning_rate=0.0,
        gradient_accumulation_steps=parts,
    )  # fmt: skip
    transformers.Trainer(model, arguments, callbacks=[callback], train_dataset=rows()).train()
    x = torch.stack([row["x"] for row in rows()])
    labels = torch.tensor([row["labels"] for row in rows()])
    expected = float(Net.forward(model, x, labels)["loss"])
    assert callback.driver.losses[0] == pytest.approx(expected, rel=1e-5)

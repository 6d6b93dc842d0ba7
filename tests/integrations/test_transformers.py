"""The Trainer of transformers with a model that runs the network of each step."""

import copy
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.tiny import same_state  # noqa: E402
from support.trainer import (  # noqa: E402
    BATCH,
    FREEZE,
    SCHEDULES,
    STEADY,
    Net,
    rows,
    same,
    trained,
    trainer,
)

import fxlocal  # noqa: E402
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan  # noqa: E402
from fxlocal.integrations.transformers import ScheduleCallback  # noqa: E402
from fxlocal.schedules import Constant, Static  # noqa: E402


def without_dropout():
    torch.manual_seed(3)
    model = Net()
    model.drop.p = 0.0
    return model


class Batches(transformers.TrainerCallback):
    """Keeps what the model was trained on: the micro-batches of each step."""

    def __init__(self, callback):
        self.callback, self.seen = callback, [[]]

    def on_substep_end(self, *given, **others):
        _, kwargs = self.callback.driver.inputs
        self.seen[-1].append(dict(kwargs))

    def on_pre_optimizer_step(self, *given, **others):
        self.on_substep_end()
        self.seen.append([])


# Of an epoch's six batches, four are a step, and so are the two that remain.
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_it_trains_as_a_loop_by_hand(name, parts, tmp_path):
    plain = {"max_grad_norm": 0.0, "save_strategy": "no", "optim": "sgd"} | STEADY
    plain["gradient_accumulation_steps"] = parts
    schedule, model = SCHEDULES[name], without_dropout()
    loop, callback = trainer(tmp_path, schedule, model=model, **plain)
    loop.add_callback(batches := Batches(callback))
    loop.train()

    mine = without_dropout()
    driver = fxlocal.Driver(mine, schedule, example_inputs=BATCH)
    driver.optimizer = torch.optim.SGD(driver.parameters(), lr=0.01)
    *steps, none_behind = batches.seen
    assert (len(steps), sum(map(len, steps)), none_behind) == (24 if parts == 1 else 8, 24, [])
    for epoch in range(4):
        driver.start_epoch()
        for step in steps[epoch * len(steps) // 4 : (epoch + 1) * len(steps) // 4]:
            network = driver.network()
            for i, batch in enumerate(step, 1):
                with nullcontext() if i == len(step) else fxlocal.accumulate(driver):
                    loss = network(**batch)["loss"]
                (loss / len(step)).backward()
                driver.observe(loss)
            driver.optimizer.step()
            driver.optimizer.zero_grad()
        driver.end_epoch()
    assert same_state(mine.state_dict(), model.state_dict())
    assert (driver.history, driver.losses) == (callback.driver.history, callback.driver.losses)
    assert max(driver.history) > 0
    assert not any("fxlocal" in name for name in model.state_dict())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("saved", ["epoch", "inside", "end"])
def test_a_killed_run_goes_on_exactly(name, saved, tmp_path):
    how = {}
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


def padded(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


@pytest.mark.filterwarnings("error:attributes are others")
def test_batches_are_padded_to_their_longest_text(tmp_path):
    def train(with_callback):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, num_hidden_layers=3, max_position_embeddings=16, hidden_size=8,
            intermediate_size=8, num_attention_heads=2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        texts = [torch.randint(1, 20, (3 + i * 5 % 9,)) for i in range(15)]
        data = [{"input_ids": text, "labels": text[0] % 2} for text in texts]
        plan = Plan(local=LocalPrefix("bert.encoder.layer.1.attention.self.query", Freeze()))
        callbacks = [ScheduleCallback(Constant(plan), padded(data[:4]))] if with_callback else []
        if not with_callback:
            model.bert.embeddings.requires_grad_(False)
            model.bert.encoder.layer[0].requires_grad_(False)
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            num_train_epochs=2, per_device_train_batch_size=4,
        )  # fmt: skip
        more = {"train_dataset": data, "data_collator": padded, "callbacks": callbacks}
        transformers.Trainer(model, arguments, **more).train()
        return model.state_dict()

    assert same_state(train(True), train(False))


@pytest.mark.parametrize("divided", [True, False], ids=["float", "int"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_language_model_divides_by_the_labels_of_a_step(tmp_path, accumulated, divided):
    def train(callbacks):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8, attn_pdrop=0.0,
            embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        model.transformer.wte.requires_grad_(False)
        ids = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(7))
        labels = ids.clone()
        labels[::3, 4:] = -100
        data = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            num_train_epochs=1, per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        made = [one({"input_ids": ids[:4], "labels": labels[:4]}) for one in callbacks]
        loop = Trainer(model, arguments, train_dataset=data, callbacks=made)
        loop.train()
        assert not model._forward_pre_hooks
        return model.state_dict()

    class Trainer(transformers.Trainer):
        def _get_num_items_in_batch(self, *args):
            count = super()._get_num_items_in_batch(*args)
            return count if divided else int(count)

    ours = train([lambda batch: ScheduleCallback(Constant(Plan()), batch)])
    theirs = train([])
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())


class Counting(Net):
    """Takes how many labels there are in a step, as models of the package do."""

    config = SimpleNamespace()

    def forward(self, x, labels=None, **others):
        return super().forward(x, labels)


def test_labels_that_the_trainer_keeps_for_a_smoothed_loss(tmp_path):
    states = []
    for called in (True, False):
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            num_train_epochs=1, label_smoothing_factor=0.1,
        )  # fmt: skip
        model, batch = Counting(), {"x": BATCH[0], "labels": BATCH[1]}
        callbacks = [ScheduleCallback(Constant(Plan()), batch)] if called else []
        trainer = transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)
        with pytest.warns(match="no loss was observed") if called else nullcontext():
            trainer.train()
        states.append(model.state_dict())
    assert same_state(*states)

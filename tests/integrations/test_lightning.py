"""Lightning's trainer with the callback: what a loop of one's own does, and exact resume."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.tiny import same_state
from torch import nn

import fxlocal
from fxlocal import CheckpointError, Freeze, Hebbian, LocalModules, Plan, PlanError
from fxlocal.schedules import Approximation, Constant, Dynamic, Static, combine

L = pytest.importorskip("lightning.pytorch")
ScheduleCallback = pytest.importorskip("fxlocal.integrations.lightning").ScheduleCallback

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = torch.utils.data.TensorDataset(IMAGES, torch.arange(24) % 4)
X = (DATA.tensors[0][:8],)
MODULES = Constant(Plan(modules=LocalModules(2, num_classes=4)))
MOVING = Static(epochs=4, start=0.3, largest=0.9, rule=Hebbian(0.01), weak_supervision=True)
LEARNING = Dynamic(epochs=4, average="window", rule=Hebbian(0.01))
EVERY_OTHER = combine(
    Static(epochs=4, rule=Freeze()), Approximation(fxlocal.Random(), layers=slice(0, None, 2))
)


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 4),
    )


class Module(L.LightningModule):
    """Trains a net, automatically or by hand, with local modules or without."""

    def __init__(self, by_hand=False, takes_target=False, accumulate=1, **options):
        super().__init__()
        self.net, self.takes_target, self.accumulate = cnn(), takes_target, accumulate
        self.automatic_optimization = not by_hand

    def on_train_start(self):
        if not self.automatic_optimization and self.takes_target:
            fxlocal.scale_losses(self.trainer.callbacks[-1].driver.captured, 1 / self.accumulate)

    def training_step(self, batch, batch_idx):
        x, y = batch
        is_last = self.automatic_optimization or (batch_idx + 1) % self.accumulate == 0
        with nullcontext() if is_last else fxlocal.accumulate(self.trainer.callbacks[-1].driver):
            loss = self.net(x, y)[1] if self.takes_target else F.cross_entropy(self.net(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss / self.accumulate)
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("validation", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def loader(shuffle=False):
    return torch.utils.data.DataLoader(DATA, batch_size=4, shuffle=shuffle)


def fit(module, callback, epochs=2, data=None, checkpoint=None, validation=None, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    quiet |= dict(accelerator="cpu", devices=1, max_epochs=epochs)
    if "callbacks" not in options:
        quiet["enable_checkpointing"] = False
    options["callbacks"] = [*options.get("callbacks", ()), *([callback] if callback else ())]
    trainer = L.Trainer(**quiet | options)
    torch.manual_seed(1)
    trainer.fit(module, data or loader(), validation, ckpt_path=checkpoint)
    return trainer


def by_hand(schedule, epochs=2, accumulate=1, takes_target=False):
    """The same as a plain loop around a driver's networks."""
    net = cnn()
    torch.manual_seed(1)
    driver = fxlocal.Driver(net, schedule, example_inputs=X)
    optimizer = torch.optim.SGD(driver.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    driver.optimizer = optimizer
    if takes_target:
        fxlocal.scale_losses(driver.captured, 1 / accumulate)
    for _ in range(epochs):
        driver.start_epoch()
        for i, (x, y) in enumerate(loader()):
            if i % accumulate == 0:
                network = driver.network()
            is_last = (i + 1) % accumulate == 0
            with nullcontext() if is_last else fxlocal.accumulate(driver):
                loss = network(x, y)[1] if takes_target else F.cross_entropy(network(x), y)
            (loss / accumulate).backward()
            driver.observe(loss)
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
        driver.end_epoch()
    return net, driver


def state(module):
    return copy.deepcopy(module.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(
    "schedule", [MOVING, LEARNING, EVERY_OTHER, MODULES], ids=["local", "own", "random", "modules"]
)
def test_it_trains_as_a_loop_of_ones_own(schedule, manual, accumulate):
    takes_target = schedule is MODULES
    module = Module(manual, takes_target, accumulate)
    callback = ScheduleCallback(schedule, "net", example_inputs=X)
    options = {} if manual else {"accumulate_grad_batches": accumulate}
    fit(module, callback, **options)
    net, driver = by_hand(schedule, 2, accumulate, takes_target)
    assert same_state(module.net.state_dict(), net.state_dict())
    assert same_state(callback.driver.heads.state_dict(), driver.heads.state_dict())
    assert (callback.driver.history, callback.driver.losses) == (driver.history, driver.losses)
    assert not same_state(module.net.state_dict(), cnn().state_dict())


def test_setting_gradients_to_zero_keeps_those_of_the_forward_too():
    """A module may clear them in its own way."""

    class Zeroing(Module):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    states = []
    for kind in (Module, Zeroing):
        module = kind(takes_target=True)
        fit(module, ScheduleCallback(MODULES, "net", example_inputs=X))
        states.append(state(module))
    assert same_state(*states)


def test_a_penalty_over_all_weights_leaves_the_prefix_alone():
    class Penalised(Module):
        def on_after_backward(self):
            (sum(p.square().sum() for p in self.parameters()) * 0.1).backward()

    module = Penalised()
    fit(module, ScheduleCallback(Constant(Plan(local=fxlocal.LocalPrefix(2, Freeze()))), "net"))
    frozen, plain = state(module.net), cnn().state_dict()
    assert torch.equal(frozen["0.weight"], plain["0.weight"])
    assert torch.equal(frozen["3.weight"], plain["3.weight"])
    assert not torch.equal(frozen["6.weight"], plain["6.weight"])


def test_evaluation_moves_nothing():
    module, without = Module(), Module()
    own = torch.utils.data.DataLoader(DATA, batch_size=4, generator=torch.Generator())
    fit(module, ScheduleCallback(MOVING, "net"), validation=own, num_sanity_val_steps=2)
    fit(without, ScheduleCallback(MOVING, "net"))
    assert same_state(state(module), state(without))


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize(
    "schedule", [MOVING, LEARNING, EVERY_OTHER, MODULES], ids=["local", "own", "random", "modules"]
)
def test_resume_is_exact(schedule, validates, tmp_path):
    """Lightning saves at the end of an epoch, or after its validation, while it still runs."""
    takes_target, validation = schedule is MODULES, loader() if validates else None

    def once(epochs, checkpoint=None):
        module = Module(takes_target=takes_target)
        callback = ScheduleCallback(schedule, "net", example_inputs=X)
        saving = L.callbacks.ModelCheckpoint(tmp_path / f"{epochs}", save_top_k=-1)
        options = dict(callbacks=[saving], validation=validation, data=loader(shuffle=True))
        fit(module, callback, epochs, checkpoint=checkpoint, **options)
        return state(module), callback.driver, saving.best_model_path

    whole, driver, _ = once(4)
    _, _, path = once(2)
    resumed, again, _ = once(4, path)
    assert same_state(whole, resumed)
    assert same_state(driver.heads.state_dict(), again.heads.state_dict())
    assert (driver.history, driver.losses) == (again.history, again.losses)
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(Module().state_dict())
    ours = saved["callbacks"]["ScheduleCallback{'model': 'net'}"]
    assert ours["model"] is None and ours["optimizer"] is None


@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_is_exact_from_behind_the_last_step_of_an_epoch(shuffle, tmp_path):
    def once(checkpoint=None):
        module, callback = Module(), ScheduleCallback(MOVING, "net")
        saving = L.callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1
        )
        fit(module, callback, 4, loader(shuffle), checkpoint, callbacks=[saving])
        return state(module), callback.driver

    whole, driver = once()
    for step in (12, 18):
        resumed, again = once(tmp_path / f"step={step}.ckpt")
        assert (driver.history, driver.losses) == (again.history, again.losses)
        assert same_state(whole, resumed)


def test_a_checkpoint_without_our_state(tmp_path):
    saving = L.callbacks.ModelCheckpoint(tmp_path)
    fit(Module(), None, callbacks=[saving])
    path = saving.best_model_path
    callback = ScheduleCallback(MOVING, "net")
    with pytest.warns(UserWarning, match=f"{path}.*no state of the schedule"):
        fit(Module(), callback, 3, checkpoint=path)
    assert callback.driver.epoch == 3 and len(callback.driver.history) == 1
    callback = ScheduleCallback(MOVING, "net", require_state=True)
    with pytest.raises(CheckpointError, match="require_state=False"):
        fit(Module(), callback, 3, checkpoint=path)


def test_heads_begin_anew_on_a_checkpoint_without_them(tmp_path):
    class See(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])

    trainer = fit(Module(), None, 1)
    trainer.save_checkpoint(path := tmp_path / "plain.ckpt")
    callback, see = ScheduleCallback(MODULES, "net", example_inputs=X), See()
    with pytest.warns(UserWarning, match="without the heads of local modules, which begin anew"):
        options = dict(checkpoint=path, callbacks=[see], enable_checkpointing=False)
        fit(Module(takes_target=True), callback, 2, **options)
    assert same_state(see.state, trainer.optimizers[0].state_dict()["state"])
    assert len(see.state) == 10 and callback.driver.epoch == 2


def test_the_first_step_is_reported_once(caplog):
    with caplog.at_level(logging.INFO):
        fit(Module(), ScheduleCallback(Constant(Plan(local=fxlocal.LocalPrefix(2))), "net"))
    told = [r.message for r in caplog.records if "a step in epoch" in r.message]
    assert len(told) == 1 and "4 layers: 2 by a local rule, 2 by back-propagation" in told[0]
    for report in (True, False):
        caplog.clear()
        callback = ScheduleCallback(MODULES, "net", example_inputs=X, report=report)
        with caplog.at_level(logging.INFO):
            fit(Module(takes_target=True), callback)
        assert ("4 layers: 4 by back-propagation" in caplog.text) == report


def test_the_module_itself():
    class Whole(Module):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    states = []
    for path in ("", "net"):
        module = Whole()
        fit(module, ScheduleCallback(MOVING, path))
        states.append(state(module))
    assert same_state(*states)


def test_several_optimizers():
    class Two(Module):
        def __init__(self):
            super().__init__(by_hand=True)
            self.critic = cnn()

        def training_step(self, batch, batch_idx):
            for optimizer, net in zip(self.optimizers(), (self.critic, self.net), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(n.parameters(), lr=0.1) for n in (self.critic, self.net)]

    module, callback = Two(), ScheduleCallback(MOVING, "net")
    fit(module, callback)
    assert callback.driver.history == [0, 1] and callback.driver.optimizer is None
    with pytest.raises(PlanError, match="2 of 2 optimizers hold"):
        fit(Split(), ScheduleCallback(MOVING, "net"))


class Split(Module):
    def configure_optimizers(self):
        parts = self.net[:4], self.net[4:]
        self.automatic_optimization = False
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]


def test_refusals():
    with pytest.raises(PlanError, match="compile=True to ScheduleCallback"):
        fit(torch.compile(Module(), backend="eager"), ScheduleCallback(MOVING, "net"))
    with pytest.raises(PlanError, match="model='body'"):
        fit(Module(), ScheduleCallback(MOVING, "body"))


def test_mixed_precision_and_keyword_inputs():
    class Named(Module):
        def training_step(self, batch, batch_idx):
            assert self.net.training and torch.is_autocast_enabled("cpu")
            return F.cross_entropy(self.net(input=batch[0]).float(), batch[1])

    module, callback = Named(), ScheduleCallback(MOVING, "net", example_inputs={"input": X[0]})
    fit(module, callback, precision="bf16-mixed")
    assert callback.driver.history == [0, 1]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not same_state(state(module.net), cnn().state_dict())


def test_it_compiles_by_itself():
    module, plain = Module(), Module()
    fit(module, ScheduleCallback(MOVING, "net", compile={"backend": "eager"}))
    fit(plain, ScheduleCallback(MOVING, "net"))
    assert same_state(state(module), state(plain))


def test_the_model_is_its_own_after_the_fit():
    module, callback = Module(takes_target=True), None
    callback = ScheduleCallback(MODULES, "net", example_inputs=X)
    fit(module, callback)
    assert "forward" not in vars(module.net) and list(module.net._modules) == list(cnn()._modules)
    fit(module, callback, 1)  # and may be fitted again


def test_a_fit_that_was_broken_off():
    class Broken(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module, callback = Broken(), ScheduleCallback(MOVING, "net")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fit(module, callback)

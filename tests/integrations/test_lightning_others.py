"""Lightning's own callbacks and tuners beside ours, and fits that are broken off."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny import same_state
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalModules, Plan, PlanError
from fxlocal.schedules import Constant, Static

L = pytest.importorskip("lightning.pytorch")
ScheduleCallback = pytest.importorskip("fxlocal.integrations.lightning").ScheduleCallback

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = torch.utils.data.TensorDataset(
    torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 4
)
X = (DATA.tensors[0][:4],)
MODULES = Constant(Plan(modules=LocalModules(2, num_classes=4)))
SCHEDULES = {
    "freeze": Static(epochs=4, rule=Freeze(), norm="eval", start=0.25, largest=0.9),
    "hebbian": Static(epochs=4, rule=Hebbian(0.01), start=0.25, largest=0.9),
}


class Module(L.LightningModule):
    def __init__(self, takes_target=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        )
        self.lr, self.takes_target = 0.05, takes_target

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.net(x, y)[1] if self.takes_target else F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader():
    return torch.utils.data.DataLoader(DATA, batch_size=4)


def trainer(callbacks, epochs=4, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    quiet |= dict(accelerator="cpu", devices=1, enable_checkpointing=False, max_epochs=epochs)
    return L.Trainer(callbacks=callbacks, **quiet | options)


def callback(schedule, **options):
    return ScheduleCallback(schedule, "net", example_inputs=X, report=False, **options)


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_epoch_that_estimates_norms_anew_is_none_of_the_schedules(name, ours_first):
    class Weights(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch == 4:
                weights.append(module.net[0].weight.detach().clone())

    weights, module, ours = [], Module(), callback(SCHEDULES[name])
    average = L.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
    pair = [ours, average] if ours_first else [average, ours]
    trainer([*pair, Weights()]).fit(module, loader())
    assert len(weights) == 6 and torch.equal(weights[0], weights[-1])
    norm, met = module.net[1], module.net[0](DATA.tensors[0])
    assert norm.num_batches_tracked == 6
    torch.testing.assert_close(norm.running_mean, met.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert len(ours.driver.history) == len(ours.driver.losses) == 4
    assert max(ours.driver.history) > 0


def test_a_copy_without_heads_is_refused():
    average = L.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)
    ours = callback(MODULES)
    module = Module(takes_target=True)
    with pytest.raises(PlanError, match=r"StochasticWeightAveraging has copied.*put Schedule"):
        trainer([average, ours]).fit(module, loader())
    assert "forward" not in vars(module.net) and len(module.net) == 9
    trainer([callback(MODULES), average], 1).fit(module, loader())
    trainer([average, callback(SCHEDULES["freeze"])], 1).fit(Module(), loader())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_finder_of_learning_rates_tries_the_module_as_it_is(name, tmp_path):
    tuner = pytest.importorskip("lightning.pytorch.tuner")
    module, plain = Module(), Module()
    ours = callback(SCHEDULES[name])
    mine = trainer([ours], default_root_dir=tmp_path)
    found = tuner.Tuner(mine).lr_find(module, loader(), num_training=12)
    theirs = trainer([], default_root_dir=tmp_path)
    assert found.results == tuner.Tuner(theirs).lr_find(plain, loader(), num_training=12).results
    assert same_state(module.net.state_dict(), plain.net.state_dict())
    module.lr = plain.lr = 0.05
    torch.manual_seed(1)
    mine.fit(module, loader())
    fresh, again = Module(), callback(SCHEDULES[name])
    fresh.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    trainer([again]).fit(fresh, loader())
    assert same_state(module.net.state_dict(), fresh.net.state_dict())
    assert ours.driver.history == again.driver.history and len(again.driver.history) == 4


class Breaks(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8:
            raise ValueError("broken off")


def test_a_fit_that_was_broken_off_leaves_a_plain_module():
    module, ours = Module(), callback(SCHEDULES["hebbian"])
    with pytest.raises(ValueError, match="broken off"):
        trainer([ours, Breaks()]).fit(module, loader())
    assert "forward" not in vars(module.net)
    assert ours.state_dict()["epoch"] == 1  # to be saved still
    other = callback(SCHEDULES["hebbian"])
    trainer([other]).fit(module, loader())
    assert len(other.driver.history) == 4


class Two(Module):
    """Trains a critic too, whose loss comes last, or first."""

    def __init__(self, critic_first):
        super().__init__()
        self.automatic_optimization, self.critic_first = False, critic_first
        self.critic, self.losses = Module().net, []

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.net, self.critic)]

    def training_step(self, batch, batch_idx):
        both = [*zip(self.optimizers(), (self.net, self.critic), (1.0, 100.0), strict=True)]
        for optimizer, net, factor in both[::-1] if self.critic_first else both:
            loss = F.cross_entropy(net(batch[0]), batch[1]) * factor
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if net is self.net:
                self.losses.append(loss.detach())


@pytest.mark.parametrize("critic_first", [False, True])
def test_the_loss_before_the_optimizers_step_is_observed(critic_first):
    module, ours = Two(critic_first), callback(SCHEDULES["hebbian"])
    trainer([ours], 2).fit(module, loader())
    expected = torch.stack(module.losses).view(2, 6).mean(1)
    torch.testing.assert_close(torch.tensor(ours.driver.losses), expected)


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_networks_are_asked_for_once_where_batches_add_up(compile):
    class Steps(L.Callback):
        def on_before_backward(self, *_):
            steps.append(ours.driver.step)

    steps, ours = [], callback(SCHEDULES["freeze"], compile=compile)
    trainer([ours, Steps()], 1, accumulate_grad_batches=2).fit(Module(), loader())
    assert steps == [1, 1, 2, 2, 3, 3]


def test_a_driver_is_paused_and_goes_on():
    module = Module().net
    driver = fxlocal.attach(module, Constant(Plan(local=fxlocal.LocalPrefix(2, Hebbian(0.1)))))
    driver.optimizer = torch.optim.SGD(module.parameters(), 0.1)
    driver.start_epoch()
    before = module[0].weight.detach().clone()
    driver.paused = True
    module(*X)
    assert torch.equal(module[0].weight, before) and driver.step == 0
    driver.paused = False
    module(*X)
    assert not torch.equal(module[0].weight, before) and driver.step == 1


class AsksForDtype(nn.Sequential):
    """Is captured by export, with the dtypes that it has then."""

    def forward(self, x):
        if x.shape[0] > 1:
            x = x * torch.full((1,), 1.1).to(self[0].weight.dtype)
        return super().forward(x)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_precision_train_as_they_do_without(precision):
    states = []
    for callbacks in ([], [callback(Constant())]):
        module = Module()
        module.net = AsksForDtype(*module.net)
        trainer(callbacks, epochs=1, precision=precision).fit(module, loader())
        states.append(module.state_dict())
    assert same_state(*states) and states[1]["net.0.weight"].dtype != torch.float32

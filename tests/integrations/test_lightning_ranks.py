"""Two ranks under Lightning's trainer: they agree, and a run that is broken off goes on exactly."""

import pytest
import torch
from support.tiny import same_state

from fxlocal import Freeze, Hebbian, LocalModules, Plan, Random
from fxlocal.schedules import Approximation, Constant, Static, combine

L = pytest.importorskip("lightning.pytorch")
ScheduleCallback = pytest.importorskip("fxlocal.integrations.lightning").ScheduleCallback
from test_lightning import DATA, Module, X  # noqa: E402  # behind the package that it needs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # each starts two processes
SCHEDULES = {
    "frozen": Static(epochs=4, start=0.3, largest=0.9, rule=Freeze()),
    "hebbian": Static(epochs=4, start=0.3, largest=0.9, rule=Hebbian(0.05)),
    "modules": Constant(Plan(modules=LocalModules(2, num_classes=4))),
    "random": combine(Constant(Plan()), Approximation(Random(), layers=slice(0, None, 2))),
}


class Saving(L.Callback):
    """Writes each rank's weights and driver down, as its process ends with the fit."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        driver = next(c.driver for c in trainer.callbacks if isinstance(c, ScheduleCallback))
        state = {"weights": pl_module.state_dict(), "heads": driver.heads.state_dict()}
        state |= {"history": driver.history, "losses": driver.losses, "drawn": torch.rand(3)}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def fit(name, folder, epochs, ranks=2, checkpoint=None):
    folder.mkdir()
    torch.manual_seed(1)
    module = Module(takes_target=name == "modules")
    saving = L.callbacks.ModelCheckpoint(folder, filename="last")
    callbacks = [ScheduleCallback(SCHEDULES[name], "net", example_inputs=X), Saving(folder), saving]
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    strategy = "ddp_spawn_find_unused_parameters_true" if ranks > 1 else "auto"
    how = dict(accelerator="cpu", devices=ranks, strategy=strategy, max_epochs=epochs)
    trainer = L.Trainer(callbacks=callbacks, use_distributed_sampler=True, **quiet, **how)
    loader = torch.utils.data.DataLoader(DATA, batch_size=8 // ranks)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_agree_and_resume_exactly(name, tmp_path):
    whole = fit(name, tmp_path / "whole", 3)
    for part in ("heads", "history", "losses"):
        assert same_state(whole[0][part], whole[1][part])
    for key, value in whole[0]["weights"].items():  # each rank has its own running statistics
        assert "running" in key or torch.equal(value, whole[1]["weights"][key]), key
    fit(name, tmp_path / "begun", 2)
    resumed = fit(name, tmp_path / "resumed", 3, checkpoint=tmp_path / "begun" / "last.ckpt")
    assert same_state(whole[0], resumed[0])
    assert torch.equal(whole[1]["drawn"], resumed[1]["drawn"])

"""Settings that do not fit the data, the strategy or the machine beside them."""

from typing import TYPE_CHECKING

from ....schedules import Constant
from ...data.images import InMemory
from ..objective import Pruning
from .augment import refuse_augment
from .cached import refuse_cache
from .tuning import SettingsError

if TYPE_CHECKING:  # an experiment is made with this
    from ..settings import Experiment

__all__ = ["refuse_shared", "refuse_unfit"]


def refuse_unfit(experiment: "Experiment") -> None:
    """Refuse settings that would change nothing, or what they do not say."""
    settings, data, machine = experiment.settings, experiment.data, experiment.machine
    refuse_augment(settings.augment, data)
    refuse_cache(experiment)
    if settings.label_smoothing and data.task == "segmentation":
        raise SettingsError("--label-smoothing: the Dice loss has none; leave it out")
    if machine.workers is not None and isinstance(data.train, InMemory):
        raise SettingsError(f"--workers: the images of {data.name} are in memory; leave it out")
    schedule = experiment.schedule
    prunes = isinstance(schedule, Pruning)
    modules = isinstance(schedule, Constant) and schedule.fixed.modules is not None
    if settings.ema is not None and prunes:
        raise SettingsError("--ema: there is no average of weights that are cut; leave it out")
    if settings.accumulate > 1:
        reasons = {
            "a CUDA graph holds whole batches": machine.cudagraph,
            "local modules learn inside the forward, from whole batches": modules,
            "pruning adds its penalty to each part": prunes,
            "modulation steps with each part": experiment.modulation is not None,
            "a cache has ids of whole batches": experiment.cache is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise SettingsError(f"--accumulate: {reason}; leave it out")


def refuse_shared(experiment: "Experiment", nproc: int, has_modules: bool) -> None:
    """Refuse settings of which a process would see a part alone."""
    settings = experiment.settings
    if settings.accumulate > 1:
        raise SettingsError(f"nproc={nproc}: processes share a batch out; leave out --accumulate")
    if has_modules:
        told = {"clip": settings.clip, "ema": settings.ema, "lr-of": settings.lr_of or None}
        for name, value in told.items():
            if value is not None:
                raise SettingsError(
                    f"nproc={nproc}: no process has all local modules, as --{name} asks; leave it "
                    "out"
                )

"""A trained model, out of the folder of its run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import Tensor, nn

from ....errors import CheckpointError
from ....runtime.shrink import shrink
from ...data.dataset import Data
from ...data.images import Images, InMemory
from ...training.checkpoint import read_checkpoint
from ...training.results import count_text
from ...training.settings import Experiment, Machine, Settings
from ..folders import read_job
from ..groups import option
from ..options import ImageChoice, ModelChoice

__all__ = ["Device", "RunFolder", "SkipDamaged", "Trained", "open_run"]

Kind = TypeVar("Kind", ImageChoice, ModelChoice)
RunFolder = Annotated[Path, typer.Argument(help="Folder of fxlocal train", metavar="RUN")]
Device = Annotated[str | None, option("cpu, cuda, ...; default: the run's", "Machine")]
SkipDamaged = Annotated[bool, option("Leave unreadable files out", "Data", "--skip-damaged")]


_NO_IMAGES: Images = InMemory(torch.zeros(0), torch.zeros(0))
_WHERE = ("device", "amp", "channels_last", "threads", "workers")  # of the options of a `Machine`
_FEW = 64  # images


@dataclass(frozen=True)
class Trained:
    """What a run has learned, and how it was to learn.

    Attributes:
        name: the model's.
        model: in evaluation mode, on the CPU.
        source: which of its weights these are.
        data: what it learned from, but for the images.
        images: how those are loaded.
        settings: the size of its batches, and the part of its output that counts.
        machine: the options that say where it was trained.
    """

    name: str
    model: nn.Module
    source: str
    data: Data
    images: ImageChoice
    settings: Settings
    machine: dict[str, Any]

    def experiment(self, data: Data, device: str | None) -> Experiment:
        """Return what judges the model on ``data``, where it is moved now."""
        told = self.machine | ({"device": device} if device else {})
        if not isinstance(data.test, InMemory) and len(data.test) <= _FEW:  # type: ignore[arg-type]
            told["workers"] = 0  # which take longer to start
        machine = Machine(**told)
        machine.set_threads(data.shape)
        model = machine.prepare(self.model)
        return Experiment(data, lambda seed: model, settings=self.settings, machine=machine)


def open_run(folder: Path) -> Trained:
    """Return the model that a run has trained, with the weights of least error if it kept them.

    Raises:
        CheckpointError: if there is none, or its weights are not of the model that is built now.
        ModelError: if that cannot be built any more.
    """
    job = read_job(folder, "trained model")
    if job["verb"] != "train":
        raise CheckpointError(f"{folder}: fxlocal {job['verb']} keeps no weights; train does")
    try:
        facts, options = dict(job["data"]), job["options"]
        images = _picked(ImageChoice, options)
        model = ModelChoice(str(options["model"]), options["width"])
        settings = Settings(batch_size=options["batch_size"], output=options["output"])
        machine = {name: options[name] for name in _WHERE}
        data = Data(train=_NO_IMAGES, test=_NO_IMAGES, **_tupled(facts))
        _, _, _ = map(int, data.shape)  # channels, height and width
        _, _ = data.statistics or ((), ())  # mean and standard deviation
        seed = int(options["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} was written by fxlocal {job.get('fxlocal')}, which noted less or else of a "
            f"run: {error}"
        ) from None
    built = model.build(data, seed)
    source = _load(built, folder, data)
    return Trained(model.model, built.eval(), source, data, images, settings, machine)


def _picked(kind: type[Kind], options: dict[str, Any]) -> Kind:
    names = [field.name for field in fields(kind)]
    return kind(**{name: options[name] for name in names})


def _tupled(value: Any) -> Any:
    """Return tuples where JSON has lists."""
    if isinstance(value, dict):
        return {name: _tupled(item) for name, item in value.items()}
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _load(model: nn.Module, folder: Path, data: Data) -> str:
    """Load the weights that the run has kept into ``model``; say which these are."""
    path, best = folder / "checkpoint.pt", folder / "best.pt"
    if not path.is_file() and not best.is_file():
        raise CheckpointError(
            f"{folder} has no best.pt and no checkpoint.pt: nothing is learned yet"
        )
    state = read_checkpoint(path)["state"] if path.is_file() else {}
    try:
        kept = state.get("driver", {}).get("kept", {})
        if best.is_file() and not kept:  # which does not tell what had been cut by then
            _take(model, _read_best(best), best)
            return "best.pt, of least error"
        if kept:
            shrink(model, kept, torch.zeros(2, *data.shape))
        age, weights = _age(state), _weights(state)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} lacks a part of its state: {error}") from error
    except ValueError as error:  # of cuts that the model does not take
        raise CheckpointError(f"{path} is of another model than is built now: {error}") from error
    _take(model, weights, path)
    return f"checkpoint.pt, {age}"


def _age(state: dict[str, Any]) -> str:
    step = state.get("driver", {}).get("step", 0)
    within = f" and {count_text(step, 'step')}" if step else ""
    return f"after {count_text(len(state['run']['loss']), 'epoch')}{within}"


def _read_best(path: Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises a different class for each kind of damage
        reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise CheckpointError(f"{path} is damaged: {reason[:160]}") from error


def _weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights by which the run was judged: their average, if there is one."""
    if average := state.get("average"):
        return {n.removeprefix("module."): t for n, t in average.items() if n != "n_averaged"}
    return dict(state.get("model") or state.get("driver", {}).get("model") or {})


def _take(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load all that the model has; of heads that helped it to learn there may be more."""
    mine = model.state_dict()
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    odd = [name for name, tensor in mine.items() if shapes.get(name) != tensor.shape]
    if odd:
        raise CheckpointError(
            f"{path} is of another model than is built now: {count_text(len(odd), 'tensor')} of "
            f"{len(mine)} not there, or of another shape, such as {odd[0]}"
        )
    model.load_state_dict({name: weights[name] for name in mine})

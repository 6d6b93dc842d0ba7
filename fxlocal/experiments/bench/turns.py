"""Step time and memory of plain training against local and frozen prefixes, on random data.

Variants take one step each in turn, round after round, so that a machine that grows slower or
warmer slows them all; a ratio is the median over rounds of plain training's time over the
variant's in the same mode. Each variant has its own copy of the model.

Memory is what `fxlocal.experiments.training.trainer` notes: on a CPU the bytes saved for backward
(counted in eager mode, predicted where compiled), on a GPU the peak during one step, with the
variant's own parameters and optimizer state.

`fxlocal.experiments.bench.approximation` measures approximated weight gradients in the same way.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...compiler.analysis import Analysis
from ...plan import Freeze, Hebbian, LocalPrefix, Plan
from ...runtime.driver import Driver
from ...schedules import Constant, Schedule
from ..models.catalogue import build_model
from ..training.measure import analyze_on, clock, find_versions
from ..training.settings import Machine, SettingsError
from ..training.steps import Stepper

__all__ = [
    "Mode",
    "Variant",
    "bench",
    "build_job",
    "image_shape",
    "modes_of",
    "refuse_no_repeats",
    "take_turns",
    "time_call",
]

Mode = Literal["eager", "compiled", "cudagraph"]
WARM_UP_TURNS = 2  # after the first one, which compiles: allocators and autotuning settle


def image_shape(text: str, model: str) -> tuple[int, int, int]:
    """Read channels, height and width of one image.

    Args:
        text: a side ("224"), all three ("3x32x32"), or nothing for what suits the model.
        model: its name.

    Raises:
        SettingsError: if the text is neither.
    """
    text = text or ("224" if model.startswith("torchvision:") else "32")
    numbers = text.split("x")
    if len(numbers) not in (1, 3) or not all(n.isdecimal() and int(n) for n in numbers):
        raise SettingsError(f"--input-size {text!r}: give a side (224) or 3x32x32")
    channels, height, width = map(int, ("3", text, text) if len(numbers) == 1 else numbers)
    return channels, height, width


def build_job(
    name: str,
    machine: Machine,
    *,
    input_size: str,
    batch: int,
    classes: int,
    width: int | None = None,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, one batch of random images and their labels; the same in every call.

    Raises:
        ModelError: if there is no such model.
        SettingsError: if ``input_size`` is no size.
    """
    shape = image_shape(input_size, name)
    machine.set_threads(shape)
    model = build_model(name, num_classes=classes, in_channels=shape[0], width=width, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator)
    return model, x, torch.randint(classes, (batch,), generator=generator)


def bench(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    boundaries: Sequence[str | int | float],
    machine: Machine,
    *,
    repeats: int = 10,
    norm: Literal["train", "eval"] = "train",
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure one training step of each variant.

    Args:
        name: the model's name, for the record.
        model: the network to train.
        x: one batch of images.
        y: their labels.
        boundaries: paths, layer indices or fractions, as `fxlocal.LocalPrefix` takes them.
        machine: where and how; with ``compile`` and ``cudagraph``, such variants stand beside the
            eager ones.
        repeats: rounds measured.
        norm: batch norms of the prefix use batch ("train") or running statistics.
        on_step: called with the variant when its turn comes.

    Returns:
        What ran, where, and "rows": one dict per variant; ready for JSON.

    Raises:
        PlanError: if a boundary does not fit the model; before anything is measured.
        SettingsError: if there is nothing to repeat.
    """
    refuse_no_repeats(repeats)
    model, x, y = machine.prepare(model), machine.place(x), y.to(machine.device)
    analysis = analyze_on(model, x)
    plans = _plans([analysis.boundary(until) for until in boundaries], norm)
    variants = [
        Variant(strategy, model, Constant(plan), machine, mode, analysis)
        for mode in modes_of(machine)
        for strategy, plan in plans
    ]
    take_turns(variants, x, y, repeats, on_step)
    baselines = {v.mode: v for v in variants if v.strategy == "sgd"}
    return {
        "model": name,
        "num_layers": len(analysis.layers),
        "batch_size": len(x),
        "shape": list(x.shape[1:]),
        "norm": norm,
        "repeats": repeats,
        **asdict(machine),
        "device": machine.name,
        "versions": find_versions(),
        "rows": [_row(variant, baselines[variant.mode]) for variant in variants],
    }


def refuse_no_repeats(repeats: int) -> None:
    """Refuse a measurement of no rounds."""
    if repeats < 1:
        raise SettingsError(f"repeats={repeats}: must be at least 1")


def modes_of(machine: Machine) -> list[Mode]:
    """Return the modes to measure: eager, and what else the machine is to run."""
    modes: list[Mode] = ["eager"]
    modes += ["compiled"] if machine.compile else []
    modes += ["cudagraph"] if machine.cudagraph else []
    return modes


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: on a GPU the device's, between two events."""
    if device.type != "cuda":
        start = clock(device)
        call()
        return clock(device) - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _plans(boundaries: list[int], norm: Literal["train", "eval"]) -> list[tuple[str, Plan]]:
    plans = [("sgd", Plan())]
    for boundary in dict.fromkeys(boundaries):  # two fractions may mean one block edge
        for strategy, rule in (("local", Hebbian()), ("freeze", Freeze())):
            plans.append((strategy, Plan(local=LocalPrefix(boundary, rule, norm))))
    return plans


class Variant:
    """One way to train, with its own copy of the model.

    Args:
        strategy: what it is called.
        source: the model, already where and how the machine has it.
        schedule: says which Plan holds in each step.
        machine: where and how to compute.
        mode: how its networks run.
        analysis: the model's, with costs.
        steps: how many steps make a turn, which is measured as one.
        stepper: makes what takes them.

    Attributes:
        seconds: of one step, the mean of its turn; one entry per turn.
        first_turn_seconds: of the first turn and all that is made for it.
        saved_bytes: the most that any step of a turn keeps for backward; on a GPU, the peak.
    """

    def __init__(
        self,
        strategy: str,
        source: nn.Module,
        schedule: Schedule,
        machine: Machine,
        mode: Mode,
        analysis: Analysis,
        steps: int = 1,
        stepper: Callable[[Driver, Machine], Stepper] = Stepper,
    ):
        self.strategy, self.schedule, self.analysis = strategy, schedule, analysis
        self.machine, self.mode, self.steps = machine, mode, steps
        self.build_stepper = stepper
        self.device = torch.device(machine.device)
        self.model = copy.deepcopy(source)
        self.seconds: list[float] = []

    @property
    def name(self) -> str:
        """Say which variant this is, for a progress bar."""
        return f"{self.mode} {self.strategy}"

    @property
    def predicts_memory(self) -> bool:
        """Whether the memory is the analysis', which knows of no approximation."""
        return self.mode == "compiled" and self.device.type != "cuda"

    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Emit the networks, time the first turn, warm up and measure memory."""
        start = clock(self.device)
        with self.machine.autocast():  # the shapes of the layers include their dtypes
            self.driver = Driver(
                self.model,
                self.schedule,
                compile="cudagraph" if self.mode == "cudagraph" else self.mode == "compiled",
                example_inputs=(x,),
            )
        # A rate this small keeps weights, and so the speed of a CPU's arithmetic, ordinary.
        parameters = self.driver.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        self.stepper = self.build_stepper(self.driver, self.machine)
        self.driver.start_epoch()
        self._turn(x, y)
        self.first_turn_seconds = clock(self.device) - start
        for _ in range(WARM_UP_TURNS):
            self._turn(x, y)
        self.saved_bytes = self._measure_memory(x, y)

    def _measure_memory(self, x: Tensor, y: Tensor) -> int:
        if self.device.type == "cuda":
            # Other variants' weights are on the GPU too; they are not this one's memory.
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._turn(x, y)
            peak = torch.cuda.max_memory_allocated(self.device)
            momenta = [v for state in self.optimizer.state.values() for v in state.values()]
            own = [*self.driver.parameters(), *self.model.buffers(), *momenta]
            return peak - before + sum(t.nbytes for t in own if isinstance(t, Tensor))
        if self.predicts_memory:
            return self.analysis.saved_bytes(self.driver.boundary) or 0
        return max(self._count_saved_bytes(x, y) for _ in range(self.steps))

    def _count_saved_bytes(self, x: Tensor, y: Tensor) -> int:
        loss, saved_bytes = self.stepper.measure(x, y)
        self._update(loss)
        return saved_bytes

    def _update(self, loss: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.driver.observe(loss)

    def _turn(self, x: Tensor, y: Tensor) -> None:
        for _ in range(self.steps):
            self._update(self.stepper.take(x, y))

    def time_turn(self, x: Tensor, y: Tensor) -> None:
        """Take one turn, and note the seconds of a step."""
        seconds = time_call(partial(self._turn, x, y), self.device)
        self.seconds.append(seconds / self.steps)


def take_turns(
    variants: Sequence[Variant],
    x: Tensor,
    y: Tensor,
    repeats: int,
    on_step: Callable[[str], None] | None = None,
) -> None:
    """Prepare each variant, then let each take a turn, round after round."""
    tell = on_step or (lambda name: None)
    for variant in variants:
        tell(variant.name)
        variant.prepare(x, y)
    for _ in range(repeats):
        for variant in variants:
            tell(variant.name)
            variant.time_turn(x, y)


def _row(variant: Variant, baseline: Variant) -> dict[str, Any]:
    """Sum up what was measured."""
    ratios = [b / own for b, own in zip(baseline.seconds, variant.seconds, strict=True)]
    boundary = variant.driver.boundary
    return {
        "mode": variant.mode,
        "strategy": variant.strategy,
        "boundary": boundary,
        "path": variant.analysis.layers[boundary].path,
        "milliseconds": 1000 * statistics.median(variant.seconds),
        "speedup": statistics.median(ratios),
        "saved_bytes": variant.saved_bytes,
        "first_call_seconds": variant.first_turn_seconds,
    }

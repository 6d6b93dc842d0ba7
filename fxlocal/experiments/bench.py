"""Step time and memory of plain training against local and frozen prefixes, on random data.

Variants take one step each in turn, round after round, so that a machine that grows slower or
warmer slows them all; a ratio is the median over rounds of plain training's time over the
variant's in the same mode. Each variant has its own copy of the model.

Memory is what `fxlocal.experiments.train` notes: on a CPU the bytes saved for backward (counted in
eager mode, predicted where compiled), on a GPU the peak during one step, with the variant's own
parameters and optimizer state.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..analysis import Analysis
from ..driver import Driver
from ..plan import Freeze, Hebbian, LocalPrefix, Plan
from ..schedules import Constant
from .measure import analyze_on, clock, count_saved_bytes, find_versions
from .objective import loss_of
from .settings import Machine, SettingsError

__all__ = ["bench"]

Mode = Literal["eager", "compiled", "cudagraph"]
WARM_UP_STEPS = 2  # after the first call, which compiles: allocators and autotuning settle


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
    if repeats < 1:
        raise SettingsError(f"repeats={repeats}: must be at least 1")
    tell = on_step or (lambda name: None)
    model, x, y = machine.prepare(model), machine.place(x), y.to(machine.device)
    analysis = analyze_on(model, x)
    plans = _plans([analysis.boundary(until) for until in boundaries], norm)
    variants = []
    modes: list[Mode] = ["eager"]
    modes += ["compiled"] if machine.compile else []
    modes += ["cudagraph"] if machine.cudagraph else []
    for mode in modes:
        for strategy, plan in plans:
            variant = _Variant(strategy, model, plan, machine, mode, analysis)
            tell(variant.name)
            variant.prepare(x, y)
            variants.append(variant)
    for _ in range(repeats):
        for variant in variants:
            tell(variant.name)
            variant.seconds.append(variant.time_step(x, y))
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
        "rows": [variant.row(baselines[variant.mode]) for variant in variants],
    }


def _plans(boundaries: list[int], norm: Literal["train", "eval"]) -> list[tuple[str, Plan]]:
    plans = [("sgd", Plan())]
    for boundary in dict.fromkeys(boundaries):  # two fractions may mean one block edge
        for strategy, rule in (("local", Hebbian()), ("freeze", Freeze())):
            plans.append((strategy, Plan(local=LocalPrefix(boundary, rule, norm))))
    return plans


class _Variant:
    """One way to take a step, with its own copy of the model."""

    def __init__(
        self,
        strategy: str,
        source: nn.Module,
        plan: Plan,
        machine: Machine,
        mode: Mode,
        analysis: Analysis,
    ):
        self.strategy, self.plan, self.analysis = strategy, plan, analysis
        self.machine, self.mode = machine, mode
        self.device = torch.device(machine.device)
        self.model = copy.deepcopy(source)
        # A rate this small keeps weights, and so the speed of a CPU's arithmetic, ordinary.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.seconds: list[float] = []

    @property
    def name(self) -> str:
        """Say which variant this is, for a progress bar."""
        return f"{self.mode} {self.strategy}"

    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Emit the network, time its first call, warm up and measure memory."""
        start = clock(self.device)
        self.driver = Driver(
            self.model,
            Constant(self.plan),
            optimizer=self.optimizer,
            compile="cudagraph" if self.mode == "cudagraph" else self.mode == "compiled",
            example_inputs=(x,),
        )
        self.driver.start_epoch()
        self._step(x, y)
        self.first_call_seconds = clock(self.device) - start
        for _ in range(WARM_UP_STEPS):
            self._step(x, y)
        self.saved_bytes = self._measure_memory(x, y)

    def _measure_memory(self, x: Tensor, y: Tensor) -> int:
        if self.device.type == "cuda":
            # Other variants' weights are on the GPU too; they are not this one's memory.
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._step(x, y)
            peak = torch.cuda.max_memory_allocated(self.device)
            momenta = [v for state in self.optimizer.state.values() for v in state.values()]
            own = [*self.model.parameters(), *self.model.buffers(), *momenta]
            return peak - before + sum(t.nbytes for t in own if isinstance(t, Tensor))
        if self.mode == "compiled":
            return self.analysis.saved_bytes(self.driver.boundary) or 0
        with count_saved_bytes(self.model, x) as saved_bytes:
            loss = self._loss(x, y)
        self._update(loss)
        return saved_bytes()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        net = self.driver.network()
        with self.machine.autocast():
            return loss_of(net(x), y)

    def _update(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.driver.observe(loss)

    def _step(self, x: Tensor, y: Tensor) -> None:
        self._update(self._loss(x, y))

    def time_step(self, x: Tensor, y: Tensor) -> float:
        """Take one step and return its seconds: on a GPU the device's, between two events."""
        if self.device.type != "cuda":
            start = clock(self.device)
            self._step(x, y)
            return clock(self.device) - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        self._step(x, y)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def row(self, baseline: "_Variant") -> dict[str, Any]:
        """Sum up what was measured."""
        ratios = [b / own for b, own in zip(baseline.seconds, self.seconds, strict=True)]
        layers = self.analysis.layers
        return {
            "mode": self.mode,
            "strategy": self.strategy,
            "boundary": self.driver.boundary,
            "path": layers[self.driver.boundary].path,
            "milliseconds": 1000 * statistics.median(self.seconds),
            "speedup": statistics.median(ratios),
            "saved_bytes": self.saved_bytes,
            "first_call_seconds": self.first_call_seconds,
        }

"""Time what compiling costs a run whose boundary moves: networks compiled whole, and by block.

    python -m fxlocal.experiments.bench.compiling [vit12 resnet110 resnet18] [--whole 2]

Each run is a fresh process without torch's caches: a step at each boundary of a frozen prefix
compiles what it has to, and its seconds beyond those of a later step are compiling. ``--whole``
compiles that many boundaries whole, of those spread over the run, and counts the rest as their
mean. Then one process times steps of both at the middle boundary, in turns.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ...plan import LocalPrefix, Plan
from ...runtime.driver import Driver
from ...schedules.base import Facts, Horizon
from ..models.catalogue import build_model
from .spread import explain_spread, find_spread, ratios, spread_text
from .turns import take_turns

__all__ = ["CASES", "Case", "count_compiling", "time_steps"]


def _vit() -> nn.Module:
    sizes = 32, 4, 12, 3, 192, 768  # image, patch, blocks, heads, width, width of an MLP
    model: nn.Module = torchvision.models.VisionTransformer(*sizes, num_classes=10)
    return model


@dataclass(frozen=True)
class Case:
    """A model, how many images of 32 px it takes, over how many boundaries, and the bar."""

    build: Callable[[], nn.Module]
    batch: int
    boundaries: int
    bar: float


CASES = {
    "vit12": Case(_vit, 8, 8, 0.20),
    "resnet110": Case(lambda: build_model("resnet110", num_classes=10, seed=0), 16, 8, 0.10),
    "resnet18": Case(lambda: build_model("resnet18", num_classes=10, seed=0), 16, 6, 1.0),
}


@dataclass(frozen=True)
class _Moves:
    """A frozen prefix that grows to another block in each epoch."""

    count: int
    chosen: tuple[int, ...]

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        edges = analysis.boundaries[1:]
        index = self.chosen[min(epoch, len(self.chosen) - 1)]
        return Plan(local=LocalPrefix(edges[index * (len(edges) - 1) // (self.count - 1)]))

    def horizon(self) -> Horizon:
        return Horizon(epochs=len(self.chosen))


class _Run:
    """A model that is trained by a driver."""

    def __init__(self, case: Case, how: str, chosen: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.model = case.build()
        self.x = torch.randn(case.batch, 3, 32, 32)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        compile: Any = "blocks" if how == "blocks" else {}
        schedule = _Moves(case.boundaries, chosen)
        self.driver = Driver(self.model, schedule, self.optimizer, compile=compile)
        self.driver.start_epoch()

    def step(self) -> float:
        """Take a step; return its seconds."""
        begin = time.perf_counter()
        loss: Tensor = self.driver.network()(self.x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the compilers that it called."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def count_compiling(name: str, how: str, chosen: tuple[int, ...]) -> dict[str, Any]:
    """Train over boundaries; return the seconds that each took to compile, and the graphs."""
    run, moves = _Run(CASES[name], how, chosen), list[dict[str, float]]()
    for epoch in range(len(chosen)):
        if epoch:
            run.driver.start_epoch()
        cpu = _cpu_seconds()
        first = run.step()
        cpu = _cpu_seconds() - cpu
        later = min(run.step() for _ in range(3))
        moves.append({"seconds": first - later, "cpu_seconds": cpu - later, "step": later})
        run.driver.end_epoch()
    return {"moves": moves, "graphs": counters["stats"]["unique_graphs"]}


def time_steps(name: str, repeats: int) -> dict[str, Any]:
    """Return the spread of a step's seconds at the middle boundary, of both, and of their ratio."""
    case = CASES[name]
    runs = {how: _Run(case, how, (case.boundaries // 2,)) for how in ("whole", "blocks")}
    for run in runs.values():
        for _ in range(3):
            run.step()
    seconds = take_turns({how: run.step for how, run in runs.items()}, repeats)
    return find_spread(**seconds, ratio=ratios(seconds["blocks"], seconds["whole"]))


def _in_fresh_process(*arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, "-m", __spec__.name, "--child", json.dumps(arguments)]
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def _report(name: str, num_whole: int, repeats: int) -> None:
    case, found = CASES[name], {}
    total = case.boundaries
    for how, count in (("blocks", total), ("whole", min(num_whole or total, total))):
        places = tuple(i * (total - 1) // max(count - 1, 1) for i in range(count))  # spread evenly
        result = found[how] = _in_fresh_process("compile", name, how, places)
        for unit in ("seconds", "cpu_seconds"):
            result[unit] = total * mean(move[unit] for move in result["moves"])
        moves = " ".join(f"{move['seconds']:.1f}" for move in result["moves"])
        print(
            f"{name} {how}: {result['seconds']:.1f} s of compiling over {total} boundaries "
            f"({result['cpu_seconds']:.1f} s of CPU), {result['graphs']} graphs; each: {moves}",
            flush=True,
        )
    ratios = [found["blocks"][u] / found["whole"][u] for u in ("seconds", "cpu_seconds")]
    print(f"{name}: {ratios[0]:.2f}x, of CPU time {ratios[1]:.2f}x, bar {case.bar:.2f}x")
    steps = _in_fresh_process("steps", name, repeats)
    told = ", ".join(f"{how} {spread_text(steps, how, '.4f')} s" for how in ("whole", "blocks"))
    ratio = spread_text(steps, "ratio", ".3f", same=1)
    print(f"{name}: a step {told}; {ratio} of whole's time; {explain_spread(repeats)}", flush=True)


def main() -> None:
    """Print lines for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CASES), metavar="MODEL")
    parser.add_argument("--whole", type=int, default=0, help="boundaries compiled whole; 0: all")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        what, *arguments = json.loads(options.child)
        print(json.dumps((count_compiling if what == "compile" else time_steps)(*arguments)))
        return
    if unknown := [name for name in options.models if name not in CASES]:
        parser.error(f"no model {unknown[0]!r}: give some of {', '.join(CASES)}")
    for name in options.models:
        _report(name, options.whole, options.repeats)


if __name__ == "__main__":
    main()

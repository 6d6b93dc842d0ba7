"""Time the compiler itself: ``analyze`` plus ``transform`` after capture, over graph size.

    python -m fxlocal.experiments.bench.compiler

Chains of convolution, norm and activation with 1,000 to 20,000 nodes, a residual network of the
same sizes, and ResNet-152. Linear time shows as a constant column of microseconds. A move is what a
new boundary costs a driver, but for code, which is generated when the network first runs. Then the
microseconds that a step of small linear layers, half of them frozen, takes beyond the same layers
called by hand: `network()`, `observe()` and what a network does beside its operators.
"""

import time
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from ...compiler.analysis import analyze
from ...compiler.resolve import resolve
from ...compiler.transform import rewrite, transform
from ...ir.network import Network
from ...plan import Freeze, LocalPrefix, Plan
from ...runtime.driver import Driver
from ...schedules import Static
from ...tracing.capture import capture
from .spread import find_spread, spread_text

__all__ = ["chain", "residual_chain", "seconds", "seconds_of_a_driver", "seconds_of_a_move"]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)  # type: ignore[no-any-return]


def chain(num_nodes: int) -> nn.Module:
    """Return a plain network of about ``num_nodes`` graph nodes, three a layer."""
    parts = [(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()) for _ in range(num_nodes // 3)]
    return nn.Sequential(*(module for part in parts for module in part))


def residual_chain(num_nodes: int) -> nn.Module:
    """Return a residual network of about ``num_nodes`` graph nodes, four a block."""
    return nn.Sequential(*(_Block() for _ in range(num_nodes // 4)))


def seconds(captured: Network, repeats: int = 3) -> dict[str, Any]:
    """Return the spread of the seconds of ``analyze`` and ``transform``, half the layers local."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        half = len(analyze(captured).layers) // 2
        transform(captured, Plan(local=LocalPrefix(until=half)))
        times.append(time.perf_counter() - begin)
    return find_spread(seconds=times)


def seconds_of_a_move(captured: Network, repeats: int = 9) -> float:
    """Return the least CPU seconds of a rewrite for a boundary in the middle, all facts known."""
    analysis = analyze(captured)
    plan, times = Plan(local=LocalPrefix(until=len(analysis.layers) // 2)), []
    for _ in range(repeats):
        begin = time.process_time()
        rewrite(captured, resolve(plan, analysis), analysis)
        times.append(time.process_time() - begin)
    return min(times)


def seconds_of_a_driver(num_layers: int, repeats: int = 300) -> float:
    """Return the least CPU seconds of a driver's forward, less those of its layers by hand."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))
    half, x, loss = num_layers // 2, torch.ones(2, 4), torch.zeros(())
    names = [str(index) for index in range(num_layers)]  # fetched as any model's forward does
    driver = Driver(layers, Static(epochs=2, rule=Freeze(), largest=0.5, start=0.0))
    driver.epoch = 1
    driver.start_epoch()

    def by_driver() -> None:
        driver.network()(x)
        driver.observe(loss)

    def by_hand() -> None:
        with torch.no_grad():
            value = x
            for name in names[:half]:
                value = getattr(layers, name)(value)
        value = value.detach()
        for name in names[half:]:
            value = getattr(layers, name)(value)

    least = dict.fromkeys((by_driver, by_hand), float("inf"))
    for _ in range(repeats):
        for call in least:
            begin = time.process_time()
            for _ in range(20):
                call()
            least[call] = min(least[call], (time.process_time() - begin) / 20)
    return least[by_driver] - least[by_hand]


def main() -> None:
    """Print a line per network."""
    torch.set_num_threads(1)
    models = {"resnet152": torchvision.models.resnet152(weights=None)}
    for size in (1_000, 5_000, 20_000):
        models[f"chain, {size:,} nodes"] = chain(size)
        models[f"residual, {size:,} nodes"] = residual_chain(size)
    for name, model in models.items():
        captured = capture(model)
        nodes, taken = len(captured.graph.nodes), seconds(captured)
        move = 1e3 * seconds_of_a_move(captured)
        each = f"{1e6 * taken['seconds'] / nodes:7.0f} us a node of {nodes:,}"
        shown = spread_text(taken, "seconds", ".2f")
        print(f"{name:23} {shown:>19} s {each:28} {move:7.1f} ms a move")
    for size in (6, 60):
        print(f"a driver, {size} layers: {1e6 * seconds_of_a_driver(size):.1f} us a step")


if __name__ == "__main__":
    main()

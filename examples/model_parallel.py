"""Two local modules on two processes, with an error that flows back over the border.

    torchrun --nproc-per-node 2 examples/model_parallel.py

Run by itself, it starts torchrun.
"""

import os
import subprocess
import sys

import torch
from torch import distributed, nn

import fxlocal
from fxlocal import LocalModules, Plan


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


def build() -> nn.Module:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return nn.Sequential(block(1, 8), block(8, 8), block(8, 8), block(8, 8), classifier)


def train(model: nn.Module, plan: Plan, x: torch.Tensor, y: torch.Tensor) -> None:
    with fxlocal.ModelParallel(model, plan, x) as part:
        optimizer = torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            loss = part.step(x, y)
            optimizer.step()
            optimizer.zero_grad()
        print(f"module {part.stage.index}: loss {loss:.3f} after 20 steps")
        state = part.gather_state()

    if distributed.get_rank() == 0:  # the whole, and the same in one process
        alone = fxlocal.transform(build(), plan, x)
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            alone(x, y)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
        print("weights are those of one process")


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", __file__]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        return
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) // 16
    x[:16, :, :, :4] += 1.0
    modules = LocalModules(2, link=1, num_classes=2, balance="blocks")
    train(build(), Plan(modules=modules), x, y)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

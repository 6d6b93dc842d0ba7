"""BackLink by hand and in a loop: two local modules, an error that flows back over the last block.

python examples/local_modules.py
"""

import torch
from torch import nn

import fxlocal
from fxlocal import ConvHead, LocalModules, Plan


def block(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def main() -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model = nn.Sequential(block(1, 8), block(8, 8), block(8, 8), block(8, 8), classifier)
    x = torch.randn(64, 1, 8, 8)
    x[:32, :, :, :4] += 0.3  # the classes differ in which half is brighter
    x[32:, :, :, 4:] += 0.3
    y = torch.arange(64) // 32

    modules = LocalModules(2, link=1, head=ConvHead(hidden=16), num_classes=2, balance="blocks")
    net = fxlocal.transform(model, Plan(modules=modules), x)
    for line in fxlocal.format_graph(net).splitlines():
        if "insert_losses" in line:
            print(line)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)  # heads and all
    for step in range(30):
        output, loss = net(x, y)  # the first module has been back-propagated when it returns
        loss.backward()  # the second, and the first one's last block once more
        optimizer.step()
        optimizer.zero_grad()  # not between forward and backward: gradients are there by then
        if step % 10 == 9:
            wrong = (output.argmax(1) != y).float().mean()
            print(f"step {step + 1}: loss {loss:.3f}, error {wrong:.0%}")

    assert fxlocal.strip(net) is model  # the heads were for training only
    assert wrong < 0.1


if __name__ == "__main__":
    main()

"""Freeze the first blocks of a ResNet and see every edit that it took.

The boundary lies inside a residual block, so two values cross it: the block's inner value and its
shortcut. Both are cut; a cut of one alone would let gradient leak over the skip edge.
"""

import torch
import torchvision

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10)
print(fxlocal.analyze(model))

plan = Plan(local=LocalPrefix(until="layer2.1.conv2", rule=Freeze()))
net = fxlocal.transform(model, plan)
print(fxlocal.explain(net))

images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
torch.nn.functional.cross_entropy(net(images), labels).backward()

without = [name for name, p in model.named_parameters() if p.grad is None]
print(f"{len(without)} parameters have no gradient, the last of them {without[-1]}")

net.eval()
assert torch.equal(net(images), model(images)), "evaluation is the source model's own"

"""Cut a U-Net in its decoder: the long skip edges cross the boundary too.

Where a local layer's input is a concat with a long-range skip, the Hebbian rule correlates the
input with output plus skip (LoCal+SGD, section 3.7), if their shapes agree.
"""

import torch

import fxlocal
from fxlocal import Hebbian, LocalPrefix, Plan
from fxlocal.experiments.models.catalogue import build_model

torch.manual_seed(0)
model = build_model("unet", num_classes=2, in_channels=1)
images = torch.randn(2, 1, 32, 32)

analysis = fxlocal.analyze(model, images)
print(analysis)
for skip in analysis.skips:
    print(skip)

last = analysis.boundaries[-2]
net = fxlocal.transform(model, Plan(local=LocalPrefix(until=last, rule=Hebbian(rate=1e-3))))
print(fxlocal.explain(net))

before = {name: p.detach().clone() for name, p in model.named_parameters()}
net(images).square().mean().backward()
for layer in analysis.layers[: last + 1]:
    moved = (model.get_parameter(str(layer.weight)) - before[str(layer.weight)]).norm()
    print(f"{layer.index:2d} {layer.path:24} moved by {moved:.1e}")

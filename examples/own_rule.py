"""A local rule of your own, tried against freezing: is it worth its product?

The rule correlates the inputs of a layer with its *centred* outputs, so that a channel that is
always on learns nothing (a covariance rule, after Sejnowski 1977). ``product`` is the layer's own
weight-gradient product, whatever its stride, padding or groups.
"""

import copy

import torch
from torch import Tensor

import fxlocal
from fxlocal import Custom, Freeze, Hebbian, Plan, schedules
from fxlocal.experiments.data.catalogue import batches, load_data
from fxlocal.experiments.models.catalogue import build_model

EPOCHS = 6
torch.set_num_threads(1)  # on 8x8 images two threads wait for each other
data = load_data("digits")


def covariance(weight: Tensor, pre: Tensor, post: Tensor, product) -> Tensor:
    """Return the delta of a layer whose outputs are compared with their mean over the batch."""
    return product(pre, post - post.mean(0, keepdim=True))


def train(model: torch.nn.Module, schedule: schedules.Schedule) -> float:
    """Train ``model`` and return its test error, in percent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    driver = fxlocal.Driver(model, schedule, optimizer=optimizer)
    for epoch in range(EPOCHS):
        model.train()
        driver.start_epoch()
        for images, labels in batches(
            data.train, 64, generator=torch.Generator().manual_seed(epoch)
        ):
            loss = torch.nn.functional.cross_entropy(driver.network()(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
    model.eval()
    wrong = torch.cat([model(x).argmax(1) != y for x, y in batches(data.test, 250)])
    return 100 * wrong.float().mean().item()


torch.manual_seed(0)
model = build_model("resnet14", num_classes=data.num_classes, in_channels=data.shape[0])
plan = Plan(local=fxlocal.LocalPrefix(until="layer1.1", rule=Custom(covariance)))
print(fxlocal.explain(fxlocal.transform(model, plan)))

for rule in (Freeze(), Hebbian(1e-4), Custom(covariance, 1e-4)):
    error = train(copy.deepcopy(model), schedules.Static(EPOCHS, largest=0.7, start=0.2, rule=rule))
    print(f"{rule}: {error:.1f} % error")

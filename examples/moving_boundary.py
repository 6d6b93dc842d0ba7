"""Move the boundary by the epoch, stop half-way, and resume exactly.

The Driver rewrites the model once per distinct Plan; its state holds the model, the optimizer, the
boundary and every random generator.
"""

import copy

import torch

import fxlocal
from fxlocal import schedules
from fxlocal.experiments.data.catalogue import batches, load_data
from fxlocal.experiments.models.catalogue import build_model

EPOCHS = 6
torch.set_num_threads(1)  # on 8x8 images two threads wait for each other
data = load_data("digits")


def make_driver() -> fxlocal.Driver:
    """Build the model, its optimizer and the driver, the same each time."""
    torch.manual_seed(0)
    model = build_model("resnet14", num_classes=data.num_classes, in_channels=data.shape[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = schedules.Static(EPOCHS, largest=0.7, start=0.2)
    return fxlocal.Driver(model, schedule, optimizer=optimizer)


def run_epochs(driver: fxlocal.Driver, until: int) -> None:
    """Train up to epoch ``until``."""
    for epoch in range(driver.epoch, until):
        driver.start_epoch()
        order = torch.Generator().manual_seed(epoch)
        for images, labels in batches(data.train, 128, generator=order):
            loss = torch.nn.functional.cross_entropy(driver.network()(images), labels)
            loss.backward()
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
        print(f"epoch {epoch}: boundary {driver.history[-1]}, loss {driver.losses[-1]:.3f}")


straight = make_driver()
run_epochs(straight, 3)
checkpoint = copy.deepcopy(straight.state_dict())  # or torch.save
run_epochs(straight, EPOCHS)
print(fxlocal.explain(straight.network()))

print("again, from the checkpoint:")
resumed = make_driver()
resumed.load_state_dict(checkpoint)
run_epochs(resumed, EPOCHS)
pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
assert all(torch.equal(a, b) for a, b in pairs), "resume is exact"

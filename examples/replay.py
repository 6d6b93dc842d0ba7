"""A trick of your own around the Driver: replay the last full step in the frozen ones.

Every fourth step back-propagates through all layers; in the three between them the prefix, which
would stand still, moves once more along its last change by back-propagation, shrunk each time.
That costs no product at all. `python examples/replay.py glyphs` is the trial that docs/results
reports: it gains less than seeds differ by.
"""

import sys

import torch

import fxlocal
from fxlocal import Freeze, schedules
from fxlocal.experiments.data.catalogue import batches, load_data
from fxlocal.experiments.models.catalogue import build_model

if sys.argv[1:] == ["glyphs"]:
    data = load_data("glyphs", size=16, strength=0.1, num_train=8000, num_test=4000)
    EPOCHS, SEEDS, MODEL, WIDTH = 15, (0, 1, 2), "resnet18", 8
else:
    data = load_data("digits")
    EPOCHS, SEEDS, MODEL, WIDTH = 4, (0,), "resnet8", 8
    torch.set_num_threads(1)  # on 8x8 images two threads wait for each other


def train(seed: int, decay: float) -> float:
    """Train with replayed steps ``decay``, ``decay`` ** 2, ... long; return the test error in %."""
    torch.manual_seed(seed)
    sizes = {"num_classes": data.num_classes, "in_channels": data.shape[0], "width": WIDTH}
    model = build_model(MODEL, **sizes, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    falls = [EPOCHS // 3, 2 * EPOCHS // 3]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
    prefix = {"rule": Freeze(), "norm": "eval", "refresh_every": 4}
    schedule = schedules.Static(EPOCHS, largest=0.85, start=0.1, **prefix)
    driver = fxlocal.Driver(model, schedule, optimizer=optimizer)
    weights = [model.get_parameter(layer.weight) for layer in driver.analysis.layers]
    for epoch in range(EPOCHS):
        model.train()
        driver.start_epoch()
        local, changes, power = weights[: driver.boundary], [], 1.0
        order = torch.Generator().manual_seed(1000 * seed + epoch)
        for images, labels in batches(data.train, 64, generator=order, drop_last=True):
            full = (driver.step + 1) % 4 == 0
            before = [w.detach().clone() for w in local] if full else []
            loss = torch.nn.functional.cross_entropy(driver.network()(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(loss)
            if full:
                changes, power = [w.detach() - b for w, b in zip(local, before, strict=True)], 1.0
            elif changes and decay:
                power *= decay
                with torch.no_grad():
                    torch._foreach_add_(local, changes, alpha=power)
        driver.end_epoch()
        scheduler.step()
    model.eval()
    wrong = torch.cat([model(x).argmax(1) != y for x, y in batches(data.test, 500)])
    return 100 * wrong.float().mean().item()


for decay in (0.0, 0.5, 1.0):
    errors = [train(seed, decay) for seed in SEEDS]
    print(f"replay with decay {decay}: " + ", ".join(f"{error:.2f}" for error in errors) + " %")

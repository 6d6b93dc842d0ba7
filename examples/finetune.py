"""Fine-tune a torchvision ResNet on a folder of images, its first layers computed once per image.

    python examples/finetune.py FOLDER [--epochs 10] [--augmentations 4]

FOLDER holds a folder of images for each class; without one, a few are drawn. Of the usual loop
three lines change, marked below; two more say where an epoch begins and ends.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan, schedules


def draw_images(folder: Path) -> Path:
    """Draw eight images of each of two colours."""
    for name, colour in (("green", (40, 180, 60)), ("red", (200, 50, 40))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            Image.new("RGB", (32, 32), tuple(c + 3 * i for c in colour)).save(
                folder / name / f"{i}.png"
            )
    return folder


parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", type=Path)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--until", default="layer4", help="the first part that learns")
parser.add_argument("--augmentations", type=int, help="random crops of each image; default: none")
parser.add_argument("--weights", action="store_true", help="download those of ImageNet")
given = parser.parse_args()

torch.manual_seed(0)
size = 224 if given.folder else 32
crop = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
if given.augmentations is None:  # the same image is the same input in each epoch
    crop = [T.Resize(size), T.CenterCrop(size)]
normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
images = ImageFolder(
    given.folder or draw_images(Path("images")), T.Compose([*crop, T.ToTensor(), normalise])
)
data = fxlocal.WithIds(images, given.augmentations)  # 1: samples end with their id
loader = DataLoader(data, batch_size=8, shuffle=True)

model = models.resnet18(weights="DEFAULT" if given.weights else None)
model.fc = nn.Linear(model.fc.in_features, len(images.classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
plan = Plan(local=LocalPrefix(given.until, Freeze(), norm="eval"))
cache = fxlocal.ActivationCache("4GiB")
driver = fxlocal.Driver(model, schedules.Constant(plan), optimizer, cache=cache)  # 2

for epoch in range(given.epochs):
    model.train()
    driver.start_epoch()
    for x, y, ids in loader:
        loss = nn.functional.cross_entropy(driver.network()(x, sample_ids=ids), y)  # 3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.observe(loss)
    driver.end_epoch()
    print(f"epoch {epoch}: loss {driver.losses[-1]:.3f}")
print(cache.explain())

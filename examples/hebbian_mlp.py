"""Train a perceptron on scikit-learn's digits, its first layers by a Hebbian rule.

The loop is the one that you have; only the network is another.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fxlocal
from fxlocal import Hebbian, LocalPrefix, Plan

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

model = nn.Sequential(
    *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def run_epochs(net: nn.Module, epochs: int) -> float:
    """Train ``net`` and return the model's test error, in percent."""
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(50):
            loss = nn.functional.cross_entropy(net(images[train][batch]), labels[train][batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    wrong = model(images[test]).argmax(1) != labels[test]
    return 100 * wrong.float().mean().item()


print(f"all layers by back-propagation: {run_epochs(model, 8):.1f} % error")
net = fxlocal.transform(model, Plan(local=LocalPrefix(until=1, rule=Hebbian(rate=1e-4))))
print(fxlocal.explain(net))
print(f"then the first layer by the Hebbian rule: {run_epochs(net, 8):.1f} % error")

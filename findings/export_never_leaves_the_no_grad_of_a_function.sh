#!/usr/bin/env bash
# torch 2.14.1. torch.export.export of a training model that calls an autograd Function whose forward
# holds `with torch.no_grad()`: the exported graph enters no_grad there and does not leave it, so that
# all that follows runs without gradients. Reentrant checkpointing is such a Function. Values agree and
# nothing is warned about; only the output that requires no gradient shows it, and a loss that adds a
# term from another path would train without a word. Without the Function the gradients are there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with torch.no_grad():
            return x * 2

    @staticmethod
    def backward(ctx, error):
        return error * 2


class Net(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.hidden, self.head, self.first = nn.Linear(4, 4), nn.Linear(4, 4), first

    def forward(self, x):
        return self.head(self.first(self.hidden(x)))


def reentrant(x):
    return checkpoint(torch.tanh, x, use_reentrant=True)


x = torch.ones(2, 4)
for name, first in (("tanh", torch.tanh), ("Function", Doubled.apply), ("checkpoint", reentrant)):
    net = Net(first)
    exported = torch.export.export(net, (x,)).module()
    eager, found = net(x), exported(x)
    same = torch.allclose(eager, found)
    print(f"{name}: gradients eager {eager.requires_grad}, exported {found.requires_grad}; {same=}")
PY
cat > "$folder/expected" <<'OUT'
tanh: gradients eager True, exported True; same=True
Function: gradients eager True, exported False; same=True
checkpoint: gradients eager True, exported False; same=True
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

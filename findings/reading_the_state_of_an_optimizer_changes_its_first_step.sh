#!/usr/bin/env bash
# torch 2.14.1. get_state_dict of torch.distributed.checkpoint, called before an optimizer's first step
# (to save a checkpoint at the start, or to make the dict that a checkpoint is loaded into), runs a
# step on gradients of zero at a rate of 0 to make the state. It stays: Adam has counted a step, so
# that the first real update is 0.74 of what it would be; SGD's momentum holds the weight decay. Rates
# are put back and no weight moves, so nothing shows it until the first real step, in one process too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
}


def first_step(make, read):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = make(model.parameters())
    if read:
        get_state_dict(model, optimizer)
    assert model.weight.item() == 1 and optimizer.param_groups[0]["lr"] == 0.1
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    return 1 - model.weight.item()


for name, make in OPTIMIZERS.items():
    print(f"{name}: first step {first_step(make, False):.4f}, after reading {first_step(make, True):.4f}")
PY
cat > "$folder/expected" <<'OUT'
Adam: first step 0.1000, after reading 0.0744
SGD: first step 0.1500, after reading 0.1950
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

#!/usr/bin/env bash
# torch 2.14.1. Where a stage under torch.utils.checkpoint (use_reentrant=False) ends in rrelu, its
# gradient is computed with noise that was never drawn. The operator makes room for its noise, saves
# it for the backward and then fills it; the second forward ends as soon as the last saved tensor is
# there, so that the room holds whatever was in that memory before. No error is raised. With
# set_checkpoint_early_stop(False), or another operator behind rrelu that saves something, the
# gradient is that of plain training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

x = torch.linspace(-1, 1, 24).view(6, 4)


def gradient(model, run):
    model.zero_grad()
    torch.manual_seed(0)
    loss = run().square().sum()
    for _ in range(8):  # what the memory holds that the noise will have
        torch.full((64, 6, 8), 100.0)
    loss.backward()
    return model[0].weight.grad.clone()


def twice(model):
    return checkpoint(model, x, use_reentrant=False)


for last in ("rrelu", "rrelu, tanh"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.RReLU(), *([nn.Tanh()] if "tanh" in last else []))
    plain = gradient(model, lambda: model(x))
    early = gradient(model, lambda: twice(model))
    with set_checkpoint_early_stop(False):
        whole = gradient(model, lambda: twice(model))
    print(f"{last}: early stop {torch.equal(plain, early)}, none {torch.equal(plain, whole)}")
PY
cat > "$folder/expected" <<'OUT'
rrelu: early stop False, none True
rrelu, tanh: early stop True, none True
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

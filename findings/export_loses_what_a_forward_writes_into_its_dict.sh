#!/usr/bin/env bash
# torch 2.14.1. A forward that puts a tensor into the dict that it was given, as models do that hand
# features on to a loss, is exported without that: torch.export.export, strict or not, gives a program
# that returns the same and leaves the dict as it was. There is no error and no warning, though the
# mutation of a tensor in that dict is kept.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import warnings

import torch
from torch import nn


class HandsOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch):
        hidden = self.layer(batch["x"])
        batch["features"] = hidden
        batch["seen"].add_(1)
        return hidden.relu()


def given():
    return {"x": torch.ones(2, 4), "seen": torch.zeros(1)}


model, eager = HandsOn(), given()
expected = model(eager)
print("eager", sorted(eager), eager["seen"].item())
assert sorted(eager) == ["features", "seen", "x"]
for strict in (False, True):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        program = torch.export.export(model, (given(),), strict=strict)
        batch = given()
        found = program.module()(batch)
    mine = [str(w.message) for w in told if "features" in str(w.message)]
    print("strict" if strict else "non-strict", sorted(batch), batch["seen"].item(), mine)
    assert torch.equal(found, expected)
    assert sorted(batch) == ["seen", "x"] and batch["seen"].item() == 1 and not mine
PY
"$folder/venv/bin/python" -W ignore "$folder/seen.py"

#!/usr/bin/env bash
# torch 2.14.1. A forward with torch.randn(x.shape) is exported with a dynamic batch. One with
# torch.randn(x.shape, generator=None), which says the same and is how libraries pass an optional
# generator on, is exported with a fixed batch alone: with a dynamic one export ends in a RuntimeError
# about symbolic integers, which names neither the generator nor the way out, to leave the argument
# out where it is None.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch
from torch import nn


class Noisy(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return x + torch.randn(x.shape, **self.options)


def export(model, **shapes):
    return torch.export.export(model, (torch.ones(2, 3),), **shapes).module()


dynamic = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
for size in (2, 5):
    assert export(Noisy(), **dynamic)(torch.ones(size, 3)).shape == (size, 3)
assert export(Noisy(generator=None))(torch.ones(2, 3)).shape == (2, 3)
print("without the argument, or with a fixed batch: exported")
try:
    export(Noisy(generator=None), **dynamic)
except Exception as error:
    said = str(error)
    print(type(error).__name__, said.splitlines()[0][:120])
    assert "concrete integers" in said and "generator" not in said.splitlines()[0]
else:
    raise AssertionError("generator=None is exported with a dynamic batch")
PY
"$folder/venv/bin/python" "$folder/seen.py"

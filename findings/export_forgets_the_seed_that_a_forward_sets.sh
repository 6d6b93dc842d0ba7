#!/usr/bin/env bash
# torch 2.14.1. A forward that calls torch.manual_seed, so that its dropout is the same mask in each
# call, is exported by the non-strict torch.export.export, the default, without that line: the program
# draws another mask each time, and exporting has moved the process's own seed. Nothing is warned
# about. The strict export refuses the call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import warnings

import torch
from torch import nn


class SameMask(nn.Module):
    def forward(self, x):
        torch.manual_seed(5)
        return nn.functional.dropout(x, 0.5, training=True)


x, model = torch.ones(64), SameMask()
assert torch.equal(model(x), model(x))
torch.manual_seed(1)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    program = torch.export.export(model, (x,)).module()
print("seed after exporting", torch.initial_seed(), "warnings", len(told))
assert torch.initial_seed() == 5 and not told
first, second = program(x), program(x)
print("the program's masks are equal:", torch.equal(first, second))
assert not torch.equal(first, second)
try:
    torch.export.export(model, (x,), strict=True)
except Exception as error:
    print("strict:", type(error).__name__)
else:
    raise AssertionError("strict export takes it")
PY
"$folder/venv/bin/python" "$folder/seen.py"

#!/usr/bin/env bash
# torch 2.14.1. The non-strict torch.export.export, its default, does not call a root GraphModule: it
# interprets the module's graph. A subclass whose forward does something else in evaluation mode, or
# a `GraphModule` whose `__call__` is its own, is exported as if it had neither; strict export follows
# the forward. Both exports finish without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch
from torch import fx, nn


class Doubling(nn.Module):
    def forward(self, x):
        return x * 2


class Switched(fx.GraphModule):
    """In evaluation mode it adds one; its graph doubles."""

    def recompile(self):
        code = super().recompile()
        of_the_graph = type(self).forward

        def forward(self, x):
            return of_the_graph(self, x) if self.training else x + 1

        type(self).forward = forward
        return code


model = Doubling()
switched = Switched(model, fx.symbolic_trace(model).graph).eval()
x = torch.full((2,), 5.0)
print("called:", switched(x).tolist())
for strict in (True, False):
    exported = torch.export.export(switched, (x,), strict=strict).module()
    print(f"exported, strict={strict}:", exported(x).tolist())
PY
cat > "$folder/expected" <<'OUT'
called: [6.0, 6.0]
exported, strict=True: [6.0, 6.0]
exported, strict=False: [10.0, 10.0]
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

#!/usr/bin/env bash
# torch 2.14.1. torch.export.export is given example inputs, and takes two that are one tensor object
# for one input: the program has both placeholders and reads only the second. Given two tensors it
# returns what the model would for the second one twice, strict or not, with no error and no guard.
# Equal values in two tensors are told apart. So f(x, x) is no example for f(x, y): a source sequence
# as its own target, a query as its own key.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch


class Weighed(torch.nn.Module):
    def forward(self, first, second):
        return 10 * first + second


one, two = torch.tensor([1.0]), torch.tensor([2.0])
print("model:", Weighed()(one, two).tolist())
for strict in (False, True):
    for name, other in (("one tensor", one), ("a copy", one.clone())):
        program = torch.export.export(Weighed(), (one, other), strict=strict)
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        unread = [n.name for n in inputs if not n.users]
        print(f"{strict=}, {name}: {program.module()(one, two).tolist()}, never read: {unread}")
PY
cat > "$folder/expected" <<'OUT'
model: [12.0]
strict=False, one tensor: [22.0], never read: ['first']
strict=False, a copy: [12.0], never read: []
strict=True, one tensor: [22.0], never read: ['first']
strict=True, a copy: [12.0], never read: []
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

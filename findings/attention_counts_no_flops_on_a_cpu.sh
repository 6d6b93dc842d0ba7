#!/usr/bin/env bash
# torch 2.14.1. FlopCounterMode counts scaled_dot_product_attention on a CPU as 0, forward and
# backward, as the fused operator that runs there has no formula. With dropout, which the fused one
# cannot do, the same attention is computed by matrix products and counted. So a vision transformer
# seems to cost less on a CPU than on a GPU, and less without dropout than with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def by_hand(x, dropout):
    return torch.softmax(x @ x.mT / x.shape[-1] ** 0.5, -1) @ x


def fused(x, dropout):
    return scaled_dot_product_attention(x, x, x, dropout_p=dropout)


for name, attention, dropout in (("by hand", by_hand, 0), ("fused", fused, 0), ("fused", fused, 0.1)):
    x = torch.ones(1, 2, 16, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = attention(x, dropout).sum()
    with FlopCounterMode(display=False) as backward:
        out.backward()
    print(f"{name}, {dropout=}: {forward.get_total_flops()} + {backward.get_total_flops()}")
PY
cat > "$folder/expected" <<'OUT'
by hand, dropout=0: 16384 + 32768
fused, dropout=0: 0 + 0
fused, dropout=0.1: 16384 + 32768
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

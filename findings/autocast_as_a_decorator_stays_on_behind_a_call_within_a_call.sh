#!/usr/bin/env bash
# torch 2.14.1. A function that is decorated with torch.autocast shares one context object with all its
# calls, which notes there what was before. Where a call runs within another of the same function (a
# recursion, a module whose forward a wrapper calls again) the outer one restores what the inner one
# found: autocast stays enabled for all that follows in this thread, products of float32 are bfloat16,
# and no error is raised. torch.no_grad as a decorator makes a context for each call, and so does a
# `with torch.autocast(...)` inside the function; both are off again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import torch


@torch.autocast("cpu", torch.bfloat16)
def decorated(depth):
    return decorated(depth - 1) if depth else None


def within(depth):
    with torch.autocast("cpu", torch.bfloat16):
        return within(depth - 1) if depth else None


@torch.no_grad()
def without_gradients(depth):
    return without_gradients(depth - 1) if depth else None


def product():
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


without_gradients(1)
print("no_grad as a decorator, a call within a call: gradients again", torch.is_grad_enabled())
for name, call, depth in (
    ("with autocast, a call within a call", within, 1),
    ("autocast as a decorator, one call", decorated, 0),
    ("autocast as a decorator, a call within a call", decorated, 1),
):
    call(depth)
    print(f"{name}: still enabled {torch.is_autocast_enabled('cpu')}, products {product()}")
PY
cat > "$folder/expected" <<'OUT'
no_grad as a decorator, a call within a call: gradients again True
with autocast, a call within a call: still enabled False, products torch.float32
autocast as a decorator, one call: still enabled False, products torch.float32
autocast as a decorator, a call within a call: still enabled True, products torch.bfloat16
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

#!/usr/bin/env bash
# torch 2.14.1. DistributedDataParallel at its defaults, and a step that cuts the first layer off
# (a detach, or requires_grad of its output): no bucket is complete, so no gradient of that step is
# averaged, of the second layer's neither. backward() says nothing, the optimizer steps, and replicas
# are apart from then on. The error comes in the next forward, and never if that step was the last
# before an evaluation or a checkpoint. With find_unused_parameters=True it is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/seen.py" <<'PY'
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x, cut):
        hidden = self.first(x)
        return self.second(hidden.detach() if cut else hidden)


def step(replica, x, cut):
    replica.zero_grad()
    try:
        replica(x, cut).sum().backward()
    except RuntimeError as error:
        return str(error).split(".")[0]
    found = [None, None]
    dist.all_gather_object(found, replica.module.second.weight.grad.tolist())
    return f"equal gradients of the second layer: {found[0] == found[1]}"


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for find in (False, True):
        torch.manual_seed(0)
        replica = DistributedDataParallel(Net(), find_unused_parameters=find)
        for cut in (False, True, True):
            said = step(replica, torch.full((1, 2), rank + 1.0), cut)
            if rank == 0:
                print(f"{find=}, {cut=}: {said}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder,), nprocs=2)
PY
cat > "$folder/expected" <<'OUT'
find=False, cut=False: equal gradients of the second layer: True
find=False, cut=True: equal gradients of the second layer: False
find=False, cut=True: Expected to have finished reduction in the prior iteration before starting a new one
find=True, cut=False: equal gradients of the second layer: True
find=True, cut=True: equal gradients of the second layer: True
find=True, cut=True: equal gradients of the second layer: True
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

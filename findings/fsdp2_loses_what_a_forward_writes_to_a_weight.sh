#!/usr/bin/env bash
# torch 2.14.1. Under fully_shard a module whose forward writes to its own parameter (a moving average,
# a local update) sees what it wrote only until the weights are sharded again: they are gathered anew
# from the shards, which the write never reached. With reshard_after_forward=False it seems to work,
# call after call, and is lost at the next reshard, such as the one behind a backward. No warning.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Counting(nn.Linear):
    """Each call adds one to every weight."""

    def forward(self, x):
        with torch.no_grad():
            self.weight += 1
        return super().forward(x)


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for after in (True, False):
        layer = Counting(2, 2, bias=False)
        nn.init.zeros_(layer.weight)
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=after)
        x = torch.ones(1, 2)
        outputs = [layer(x).sum().item() for _ in range(3)]
        layer(x).sum().backward()
        shard = layer.weight.to_local().tolist()
        if rank == 0:
            print(f"reshard_after_forward={after}: {outputs}, then a backward: {shard}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder,), nprocs=2)
PY
cat > "$folder/expected" <<'OUT'
reshard_after_forward=True: [4.0, 4.0, 4.0], then a backward: [[0.0, 0.0]]
reshard_after_forward=False: [4.0, 8.0, 12.0], then a backward: [[0.0, 0.0]]
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"

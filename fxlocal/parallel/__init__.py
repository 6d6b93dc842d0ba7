"""Several processes: local modules, one for each, and data parallel training."""

from .model_parallel import ModelParallel
from .ranks import ParallelError
from .replicate import replicate
from .shard import shard

__all__ = ["ModelParallel", "ParallelError", "replicate", "shard"]

"""Several processes: local modules, one for each, and data parallel training."""

from .model_parallel import ModelParallel
from .ranks import ParallelError
from .replicate import replicate

__all__ = ["ModelParallel", "ParallelError", "replicate"]

"""Local modules on several processes, one for each module (or several, as replicas)."""

from .model_parallel import ModelParallel
from .ranks import ParallelError

__all__ = ["ModelParallel", "ParallelError"]

"""Graph rewriting over torch.fx that makes training cheaper.

Capture a model, analyse it, rewrite its graph by a `Plan`, and train the result, a GraphModule
that shares the model's parameters, in your own loop and under `torch.compile`.

What needs torch is imported when it is first asked for, so that a command line can say what it can
do without waiting for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import schedules
from .errors import (
    BoundaryWarning,
    CaptureError,
    CheckpointError,
    NoEffectWarning,
    PassError,
    PlanError,
)
from .facts import Block, BlockInput, Cost, Layer, Shapes, SkipEdge, StageBoundary
from .plan import (
    Checkpoint,
    ConvHead,
    Custom,
    Freeze,
    Full,
    Hebbian,
    InfoProHead,
    LinearHead,
    LocalModules,
    LocalPrefix,
    Oja,
    Plan,
    Random,
    StochasticDepth,
    TopK,
    Zero,
)

if TYPE_CHECKING:
    __version__: str

    from .budget.auto import auto
    from .compiler.analysis import Analysis, analyze
    from .compiler.local_modules import scale_losses, strip
    from .compiler.transform import transform
    from .inspection.explain import explain
    from .inspection.report import LayerReport, Verification
    from .inspection.verify import verify
    from .integrations.backend import backend
    from .ir.stages import Stage, find_stages
    from .ir.text import diff_graphs, format_graph
    from .parallel import ModelParallel, ParallelError
    from .parallel.replicate import replicate
    from .parallel.shard import shard
    from .runtime.accumulate import accumulate
    from .runtime.attach import attach
    from .runtime.cache.activation_cache import ActivationCache
    from .runtime.cache.samples import WithIds
    from .runtime.compile import compile_blocks
    from .runtime.driver import Driver
    from .runtime.prune_train import PruneTrain
    from .runtime.shrink import shrink
    from .tracing.capture import capture

__all__ = [
    "ActivationCache",
    "Analysis",
    "Block",
    "BlockInput",
    "BoundaryWarning",
    "CaptureError",
    "Checkpoint",
    "CheckpointError",
    "ConvHead",
    "Cost",
    "Custom",
    "Driver",
    "Freeze",
    "Full",
    "Hebbian",
    "InfoProHead",
    "Layer",
    "LayerReport",
    "LinearHead",
    "LocalModules",
    "LocalPrefix",
    "ModelParallel",
    "NoEffectWarning",
    "Oja",
    "ParallelError",
    "PassError",
    "Plan",
    "PlanError",
    "PruneTrain",
    "Random",
    "Shapes",
    "SkipEdge",
    "Stage",
    "StageBoundary",
    "StochasticDepth",
    "TopK",
    "Verification",
    "WithIds",
    "Zero",
    "accumulate",
    "analyze",
    "attach",
    "auto",
    "backend",
    "capture",
    "compile_blocks",
    "diff_graphs",
    "explain",
    "find_stages",
    "format_graph",
    "replicate",
    "scale_losses",
    "schedules",
    "shard",
    "shrink",
    "strip",
    "transform",
    "verify",
]

# Where what needs torch is found, when it is first asked for.
_HOMES = {
    "budget.auto": ["auto"],
    "compiler.analysis": ["Analysis", "analyze"],
    "compiler.local_modules": ["scale_losses", "strip"],
    "compiler.transform": ["transform"],
    "inspection.explain": ["explain"],
    "inspection.report": ["LayerReport", "Verification"],
    "inspection.verify": ["verify"],
    "integrations.backend": ["backend"],
    "ir.stages": ["Stage", "find_stages"],
    "ir.text": ["diff_graphs", "format_graph"],
    "parallel": ["ModelParallel", "ParallelError", "replicate", "shard"],
    "runtime.accumulate": ["accumulate"],
    "runtime.attach": ["attach"],
    "runtime.cache.activation_cache": ["ActivationCache"],
    "runtime.cache.samples": ["WithIds"],
    "runtime.compile": ["compile_blocks"],
    "runtime.driver": ["Driver"],
    "runtime.prune_train": ["PruneTrain"],
    "runtime.shrink": ["shrink"],
    "tracing.capture": ["capture"],
}

if not TYPE_CHECKING:  # which knows the names, and would take any other for one

    def __getattr__(name: str) -> Any:
        """Import a name of `_HOMES`, or find the version that is installed."""
        if name == "__version__":
            return import_module("importlib.metadata").version("fxlocal")
        for home, names in _HOMES.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f".{home}", __name__), name)
                return found
        raise AttributeError(f"module 'fxlocal' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

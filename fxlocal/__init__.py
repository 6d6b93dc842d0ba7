"""Graph rewriting over torch.fx that makes training cheaper.

Capture a model, analyse it, rewrite its graph by a `Plan`, and train the result, a GraphModule
that shares the model's parameters, in your own loop and under `torch.compile`.
"""

from . import schedules
from .compiler.analysis import Analysis, analyze
from .compiler.local_modules import scale_losses, strip
from .compiler.transform import transform
from .errors import CaptureError, CheckpointError, NoEffectWarning, PassError, PlanError
from .facts import Block, BlockInput, Cost, Layer, Shapes, SkipEdge, StageBoundary
from .inspection.explain import explain
from .inspection.report import LayerReport, Verification
from .inspection.verify import verify
from .ir.stages import Stage, find_stages
from .ir.text import diff_graphs, format_graph
from .parallel import ModelParallel, ParallelError
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
    TopK,
    Zero,
)
from .runtime.driver import Driver
from .tracing.capture import capture

__all__ = [
    "Analysis",
    "Block",
    "BlockInput",
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
    "Random",
    "Shapes",
    "SkipEdge",
    "Stage",
    "StageBoundary",
    "TopK",
    "Verification",
    "Zero",
    "analyze",
    "capture",
    "diff_graphs",
    "explain",
    "find_stages",
    "format_graph",
    "scale_losses",
    "schedules",
    "strip",
    "transform",
    "verify",
]

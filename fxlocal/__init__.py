"""Graph rewriting over torch.fx that makes training cheaper.

Capture a model, analyse it, rewrite its graph by a `Plan`, and train the result, a GraphModule
that shares the model's parameters, in your own loop and under `torch.compile`.
"""

from . import schedules
from .analysis import Analysis, analyze
from .capture import capture
from .driver import Driver
from .errors import CaptureError, CheckpointError, NoEffectWarning, PassError, PlanError
from .facts import Block, Border, Cost, Edge, Layer, Shapes, SkipEdge
from .local_modules import scale_losses, strip
from .parallel import ModelParallel, ParallelError
from .plan import (
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
from .show import diff_graphs, explain, format_graph
from .stages import Stage, find_stages
from .transform import transform
from .verification import LayerReport, Verification
from .verify import verify

__all__ = [
    "Analysis",
    "Block",
    "Border",
    "CaptureError",
    "CheckpointError",
    "ConvHead",
    "Cost",
    "Custom",
    "Driver",
    "Edge",
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

"""Graph rewriting over torch.fx that makes training cheaper.

Capture a model, analyse it, rewrite its graph by a `Plan`, and train the result, a GraphModule
that shares the model's parameters, in your own loop and under `torch.compile`.
"""

from . import schedules
from .analysis import Analysis, analyze
from .capture import capture
from .driver import Driver
from .errors import CaptureError, CheckpointError, NoEffectWarning, PassError, PlanError
from .facts import Block, Cost, Layer, Shapes, SkipEdge
from .plan import (
    Custom,
    Freeze,
    Full,
    Hebbian,
    LocalPrefix,
    Oja,
    Plan,
    Random,
    TopK,
    Zero,
)
from .show import diff_graphs, explain, format_graph
from .transform import transform
from .verification import LayerReport, Verification
from .verify import verify

__all__ = [
    "Analysis",
    "Block",
    "CaptureError",
    "CheckpointError",
    "Cost",
    "Custom",
    "Driver",
    "Freeze",
    "Full",
    "Hebbian",
    "Layer",
    "LayerReport",
    "LocalPrefix",
    "NoEffectWarning",
    "Oja",
    "PassError",
    "Plan",
    "PlanError",
    "Random",
    "Shapes",
    "SkipEdge",
    "TopK",
    "Verification",
    "Zero",
    "analyze",
    "capture",
    "diff_graphs",
    "explain",
    "format_graph",
    "schedules",
    "transform",
    "verify",
]

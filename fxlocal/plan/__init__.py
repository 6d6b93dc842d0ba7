"""What to do to a model in one training step: frozen, hashable, printable; imports no torch.

A Plan's ``repr`` can be pasted back into Python, but for the function of a `Custom` rule, which
it names only.
"""

from .checkpoint import Checkpoint
from .drop import StochasticDepth
from .modules import ConvHead, Head, InfoProHead, LinearHead, LocalModules
from .plan import LocalPrefix, Plan
from .rules import Custom, Freeze, Hebbian, LearningRule, Oja, Rule
from .weight_grads import Full, Random, TopK, WeightGrad, WeightGrads, Zero

__all__ = [
    "Checkpoint",
    "ConvHead",
    "Custom",
    "Freeze",
    "Full",
    "Head",
    "Hebbian",
    "InfoProHead",
    "LearningRule",
    "LinearHead",
    "LocalModules",
    "LocalPrefix",
    "Oja",
    "Plan",
    "Random",
    "Rule",
    "StochasticDepth",
    "TopK",
    "WeightGrad",
    "WeightGrads",
    "Zero",
]

"""The equations that inserted nodes compute; they know nothing of graphs."""

from . import custom, hebbian, oja, topk, values, weight_grads

__all__ = ["custom", "hebbian", "oja", "topk", "values", "weight_grads"]

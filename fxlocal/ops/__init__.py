"""The equations that inserted nodes compute; they know nothing of graphs."""

from . import checkpoint, custom, hebbian, oja, shards, topk, values, weight_grads

__all__ = ["checkpoint", "custom", "hebbian", "oja", "shards", "topk", "values", "weight_grads"]

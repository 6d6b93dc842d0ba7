"""The equations that inserted nodes compute; they know nothing of graphs."""

from . import custom, hebbian, oja, values

__all__ = ["custom", "hebbian", "oja", "values"]

"""The equations that inserted nodes compute; they know nothing of graphs."""

from . import hebbian, values

__all__ = ["hebbian", "values"]

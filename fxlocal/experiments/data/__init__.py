"""Images to learn from."""

from .catalogue import DataError, load_data

__all__ = ["DataError", "load_data"]

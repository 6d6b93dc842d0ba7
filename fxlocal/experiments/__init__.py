"""The command line and what stands behind it; `compare` is its door for scripts and notebooks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .python import Machine, Results, Settings, compare, load_data

__all__ = ["Machine", "Results", "Settings", "compare", "load_data"]

if not TYPE_CHECKING:  # which knows the names, and would take any other for one

    def __getattr__(name: str) -> Any:
        """Import what needs torch when it is first asked for."""
        if name in __all__:
            return getattr(import_module(".python", __name__), name)
        raise AttributeError(f"module 'fxlocal.experiments' has no attribute {name!r}")

"""Buffers while a model is traced: their sizes are known, their values are not.

    for i in range(self.table.shape[0]):        # runs as often as the model's own
    if self.table.dtype == torch.float32:       # takes the branch that the model takes
    x * self.table                              # fetched anew in each step

A size is a number, and what a branch saw of dtype or device is checked in each step, as both may
change with the model. Given to a call, dtype and device are asked for anew.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from ..ops.values import require_shape, require_value

__all__ = ["BufferProxy"]

_SIZES = {"shape", "ndim", "size", "dim", "ndimension", "numel", "nelement"}


class BufferProxy(fx.Proxy):
    """Stands for a buffer of the model, whose sizes it knows."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: Tensor) -> None:
        super().__init__(node, tracer)
        vars(self)["buffer"] = buffer

    def _sized(self) -> Tensor:
        """Return the buffer, to ask its sizes, and check them in each step from now on."""
        if "asked" not in vars(self):
            vars(self)["asked"] = True
            bounds = tuple((size, size) for size in self.buffer.shape)
            self.tracer.create_proxy("call_function", require_shape, (self, bounds), {})
        buffer: Tensor = self.buffer
        return buffer

    def __getattr__(self, name: str) -> Any:
        if name in _SIZES:
            return getattr(self._sized(), name)
        if name in ("dtype", "device"):
            return _Fact(self, name)
        if name in ("is_floating_point", "is_complex"):
            return lambda: getattr(_Fact(self, "dtype"), name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self._sized())

    def __iter__(self) -> Iterator[Any]:
        row: Any = self
        return (row[index] for index in range(len(self)))


class _Fact(fx.proxy.Attribute):
    """The dtype or the device of a buffer: known to a branch, asked for anew by a call."""

    def __init__(self, root: BufferProxy, attr: str) -> None:
        super().__init__(root, attr)
        vars(self)["value"] = getattr(root.buffer, attr)

    def _known(self) -> Any:
        """Return what it is, and check in each step from now on that it still is."""
        if "asked" not in vars(self):
            vars(self)["asked"] = True
            self.tracer.create_proxy("call_function", require_value, (self, self.value), {})
        return self.value

    def __getattr__(self, name: str) -> Any:  # device.type, dtype.is_floating_point
        return getattr(self._known(), name)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, _Fact):
            other = other._known()
        return NotImplemented if isinstance(other, fx.Proxy) else self._known() == other

    def __ne__(self, other: object) -> Any:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return hash(self._known())

    def __str__(self) -> str:
        return str(self._known())

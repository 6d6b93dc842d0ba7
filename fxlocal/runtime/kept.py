"""Which channels a user names to be kept, and so which ones are to be cut."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from ..errors import PlanError, nearest
from ..facts import Channels

__all__ = ["find_cut"]


def find_cut(channels: Channels, kept: Mapping[str, Iterable[int]]) -> set[int]:
    """Return the numbers of the channels that are not kept.

    Args:
        channels: of the model.
        kept: by the path of a layer, what it keeps of its outputs.

    Raises:
        PlanError: if there is no such layer or channel, or one cannot be cut.
    """
    if not isinstance(kept, Mapping):
        raise PlanError(f"kept is a {type(kept).__name__}: give a dict, layer by layer")
    cut, stays = dict[int, str](), dict[int, str]()
    for path, given in kept.items():
        if path not in channels.outputs:
            raise PlanError(
                f"kept: no layer {path!r} whose channels are known. Nearest: "
                f"{nearest(str(path), channels.outputs)}"
            )
        own = channels.outputs[path]
        left = _indices(path, given, len(own))
        for i, channel in enumerate(own):
            (stays if i in left else cut).setdefault(channel, f"{i} of {path!r}")
    for channel, what in cut.items():
        if channel in channels.fixed:
            raise PlanError(f"channel {what} cannot be cut: {channels.fixed[channel]}. Keep it")
        if channel in stays:
            raise PlanError(
                f"channel {what} is to be cut, and {stays[channel]} kept, which is added to it, or "
                "else can only be cut with it: name one layer of them alone, or give the same"
            )
    return set(cut)


def _indices(path: str, given: Iterable[int], count: int) -> set[int]:
    indices: Any = given.tolist() if hasattr(given, "tolist") else given  # an array, a tensor
    wanted = f"give whole numbers from 0 to {count - 1}, the outputs that {path!r} has"
    if not isinstance(indices, Iterable):
        raise PlanError(f"kept[{path!r}] is {given!r}: {wanted}, in a list")
    found = set[int]()
    for index in indices:
        whole = isinstance(index, Integral) and not isinstance(index, bool)
        if not whole or not 0 <= index < count or index in found:
            twice = ", and none twice" if index in found else ""
            raise PlanError(f"kept[{path!r}] has {index!r}: {wanted}{twice}")
        found.add(int(index))
    return found

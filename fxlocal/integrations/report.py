"""What a trainer's log says of the first step."""

from ..inspection.verify import verify
from ..runtime.attach import AttachedDriver

__all__ = ["report_step"]


def report_step(driver: AttachedDriver) -> str:
    """Return what a step on the batch at hand does to each layer, as `verify` finds on a copy.

    A Plan without effect is warned of by `verify` itself.
    """
    args, kwargs = driver.inputs
    try:
        assert driver.in_use is not None
        found = verify(driver.in_use, *args, **kwargs)
    except Exception as error:  # of whatever kind: a report must not end a run
        return f"fxlocal: no report of the first step: {type(error).__name__}: {error}"
    return f"fxlocal: a step in epoch {driver.epoch} trains\n{found}"

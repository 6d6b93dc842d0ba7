"""What fxlocal adds to a model, and the names that it has there.

It lives in one child of a `Network`, called ``fxlocal``: tensors outside the ``state_dict``, and
modules whose state is part of it.
"""

__all__ = ["ADDITIONS", "LOSS_SCALE", "RATE", "SKIPPED"]

ADDITIONS = "fxlocal"  # the child
RATE = "rate"  # the 0-dim tensor that holds the rate of local updates
SKIPPED = "skipped"  # the one that counts deltas that were not finite
LOSS_SCALE = "loss_scale"  # the factor of losses that are back-propagated in the forward

"""What the process imports first that ranks are forked from; torch takes it seconds."""

from .stopping import end_with_parent

__all__: list[str] = []

end_with_parent()

"""Start the processes of a run, and hear from them until they have ended."""

from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, get_all_start_methods, get_context
from typing import Any

from ...errors import CaptureError, CheckpointError, PlanError
from ...parallel import ParallelError
from ..data.catalogue import DataError
from .settings import SettingsError

__all__ = ["MISTAKES", "Processes"]

END = 10.0  # seconds for the others to see that one failed, and to end
MISTAKES = (CaptureError, CheckpointError, DataError, PlanError, SettingsError)  # of the user's


class Processes:
    """Processes with a pipe from each, on which it says how it goes: (kind, *values).

    The last that each says is its result. Of the kind "failed", it holds the error. At the end of
    the ``with`` block, or an exception in it, none goes on.

    Args:
        function: what each runs, given its index, what it is told, and its end of the pipe.
        told: one for each; a function of a module, as ``function`` is, can be pickled.
    """

    def __init__(self, function: Callable[[int, bytes, Any], None], told: Sequence[bytes]) -> None:
        if "forkserver" in get_all_start_methods():  # imports once, and fork does not suit CUDA
            context: Any = get_context("forkserver")
            context.set_forkserver_preload([function.__module__])
        else:
            context = get_context("spawn")
        self._processes, self._pipes = [], {}
        for index, value in enumerate(told):
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=function, args=(index, value, theirs), name=f"rank {index}"
            )
            process.start()
            theirs.close()  # so that the pipe ends with the process
            self._processes.append(process)
            self._pipes[pipe] = index

    def watch(self, events: Mapping[str, Callable[..., object]]) -> list[tuple[Any, ...]]:
        """Return the results.

        Args:
            events: what to call, with the values, when a process says something of this kind.

        Raises:
            ParallelError: if a process failed; or a mistake of the user's, if that is why.
        """
        results: dict[int, tuple[Any, ...]] = {}
        open_pipes = dict(self._pipes)
        while open_pipes:
            failed = any(kind == "failed" for kind, *_ in results.values())
            ready = connection.wait(list(open_pipes), END if failed else None)
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                try:
                    kind, *values = pipe.recv()
                except EOFError:
                    kind, values = "failed", [None]
                if kind in events:
                    events[kind](*values)
                else:
                    results[open_pipes.pop(pipe)] = kind, *values
        errors = [values[0] for kind, *values in results.values() if kind == "failed"]
        if errors:
            mistakes = [error for error in errors if isinstance(error, MISTAKES)]
            lost = ParallelError("the processes of the run were killed")
            raise next(iter([*mistakes, *filter(None, errors)]), lost)
        return [results[index] for index in sorted(results)]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            process.join(END if kind is None else 0)
            process.kill()
            process.join()

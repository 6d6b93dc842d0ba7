"""Let all that later modules take of earlier ones go through replay buffers (DGL).

    %conv = call_module conv(%cut)  ->  %replay_0 = call_module fxlocal.replay.0(%cut, %target)
                                        %replayed_cut = call_function getitem(%replay_0, 0)
                                        %replayed_target = call_function getitem(%replay_0, 1)
                                        %conv = call_module conv(%replayed_cut)

Rule (DGL, Algorithm 2): a buffer before each module but the first keeps batches, of which the
module takes the one used least; with them go the target and, where it is read, the model's input.
Sizes too: the batch that comes out may be smaller or larger than the one that goes in.
"""

import operator
from collections.abc import Sequence
from functools import partial

from fxlocal.facts import StageBoundary
from fxlocal.ir.additions import ADDITIONS
from fxlocal.ir.boundary import first_of_stage
from fxlocal.ir.edit import insert_in_stage
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import STAGE

__all__ = ["insert_replay"]


def insert_replay(gm: Network, *, stages: Sequence[StageBoundary]) -> None:
    """Insert a buffer, which is there, behind each of ``stages``: those that learn, in order.

    They have been cut, and their losses inserted.
    """
    for boundary in stages:
        _replay(gm, boundary.stage)


def _replay(gm: Network, k: int) -> None:
    first = first_of_stage(gm, k + 1)
    insert = partial(insert_in_stage, first, k + 1, pass_name="insert_replay")
    made = [n for n in gm.graph.nodes if n.op != "get_attr" and n.meta[STAGE] <= k]
    uses = {n: [user for user in n.users if user.meta[STAGE] > k] for n in made}
    taken = tuple(node for node in made if uses[node])
    batch = insert("call_module", f"{ADDITIONS}.replay.{k}", taken, f"replay_{k}")
    for i, node in enumerate(taken):
        name = f"replayed_{node.name}"
        replayed = insert("call_function", operator.getitem, (batch, i), name)
        for user in uses[node]:
            user.replace_input_with(node, replayed)

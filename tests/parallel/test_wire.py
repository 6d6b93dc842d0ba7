"""How many bytes a rank sends, as the reducer counts them and as the process group sees them."""

import pytest
from support.ranks import build_in_turn, in_threads
from test_deltas import RULES, batch, build
from torch import distributed

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan


def sent_by(rank, rule):
    """Return what one step sends, counted in both ways."""
    plan = Plan(local=LocalPrefix("5", rule)) if rule else Plan()
    net = fxlocal.replicate(build_in_turn(lambda: fxlocal.transform(build(0), plan)))
    group, seen = distributed.group.WORLD, []

    def counted(whole):
        def count(tensors, *options):
            seen.append(sum(t.nbytes for t in tensors))
            return whole(tensors, *options)

        return count

    for name in ("allreduce", "allreduce_coalesced"):
        setattr(group, name, counted(getattr(group, name)))
    net(batch(0, 2)).square().mean().backward()  # the ranks meet
    reducer = net.meta["reducer"]
    seen.clear()
    before = reducer.sent_bytes
    net(batch(0, 2)).square().mean().backward()
    return reducer.sent_bytes - before, sum(seen)


@pytest.mark.parametrize("rule", [None, Freeze(), RULES["hebbian"]], ids=str)
def test_the_reducer_counts_what_the_group_is_given(rule):
    for counted, seen in in_threads(sent_by, rule):
        assert counted == seen
    learned = sum(p.nbytes for p in build().parameters())
    prefix = 0 if rule is None else sum(p.nbytes for p in build()[:4].parameters())
    deltas = sum(p.nbytes for p in build()[:4].parameters() if p.dim() > 1)
    expected = learned - prefix + (deltas if rule == RULES["hebbian"] else 0)
    assert expected <= counted <= expected + 8 * 16

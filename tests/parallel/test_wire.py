"""How many bytes a rank sends, as the reducer counts them and as the process group sees them."""

import pytest
import torch
from support.ranks import build_in_turn, in_processes, in_threads
from test_deltas import RULES, batch, build
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.measure import count_wire_bytes


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


def resnet(rule=None):
    model = build_model("resnet18", num_classes=10, in_channels=3, width=32, seed=0).float()
    local = LocalPrefix(15, rule, norm="eval") if rule else None
    return fxlocal.transform(model, Plan(local=local))


def sent_by_resnets(rank):
    """Return what a step of each sends, as the profiler is told of it by the gloo backend."""
    held = nn.Sequential(resnet(Freeze()))  # whose prefix the wrapper is not told of
    made = {
        "freeze": fxlocal.replicate(resnet(Freeze())),
        "hebbian": fxlocal.replicate(resnet(Hebbian(1e-3))),
        "ddp freeze": DistributedDataParallel(resnet(Freeze())),
        "ddp unused": DistributedDataParallel(held, find_unused_parameters=True),
    }
    x, found = torch.ones(2, 3, 8, 8, dtype=torch.float32), {}
    for name, net in made.items():
        net(x).square().mean().backward()  # the ranks meet
        with count_wire_bytes() as count:
            net(x).square().mean().backward()
        found[name] = count()
    return found


@pytest.mark.slow  # starts processes
def test_a_prefix_of_resnet18_is_not_sent_by_gloo(tmp_path):
    found, _ = in_processes(sent_by_resnets, tmp_path)
    named = dict(resnet().named_parameters())
    first = list(named).index("layer4.0.conv1.weight")  # layer 15 of 21
    prefix, behind = list(named.values())[:first], list(named.values())[first:]
    behind = sum(p.nbytes for p in behind)
    deltas = sum(p.nbytes for p in prefix if p.dim() > 1)
    assert behind <= found["freeze"] <= found["ddp freeze"] <= 1.01 * behind
    assert behind + deltas <= found["hebbian"] <= 1.01 * behind + deltas
    assert found["ddp unused"] >= sum(p.nbytes for p in named.values()) > 1.3 * behind

"""What a layer costs, against the formula and against what autograd really keeps."""

import copy
import gc
import resource
import weakref

import pytest
import torch
from expecttest import assert_expected_inline
from support import laws
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Cost, Freeze, LocalPrefix, Plan, analyze


def kept_bytes(network, source, inputs):
    """Bytes of the storages that autograd keeps in one forward: what is the model's aside."""
    aside = {t.untyped_storage().data_ptr() for t in (*source.state_dict().values(), *inputs)}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # autograd holds it, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(*inputs)
    del output
    return sum(kept.values())


# --- golden --------------------------------------------------------------------------------------


def test_costs_add_up_in_the_table():
    table = str(analyze(NETS["residual"].build(), torch.zeros(16, 3, 32, 32)))
    assert_expected_inline(
        table,
        """\
#  block   layers  kinds     skip edges             parameters  MFLOPs  saved KiB
0  stem.0  0       1 conv                                  116     3.5        256
1  block1  1-2     2 conv    residual                      304     9.4      1,024
2  block2  3-5     3 conv    residual (projection)         944     7.3        896
3  fc      6       1 linear                                 45     0.0          0
7 layers, 4 blocks, 2 skip edges, 1,409 parameters, 20.3 MFLOPs forward, 2.1 MiB kept for backward""",  # noqa: E501
    )


def test_the_model_can_be_freed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))  # keeps its output
    analyze(model, torch.zeros(2, 3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETS if name != "shared"])
def test_saved_bytes_are_those_that_autograd_keeps(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    analysis = analyze(model, *inputs)
    for until in range(len(analysis.layers)):
        network = fxlocal.transform(model, Plan(local=LocalPrefix(until=until, rule=Freeze())))
        kept = kept_bytes(network, model, inputs)
        if (name, until) == ("autoencoder", 2):
            kept += 2 * 4 * 8 * 8 * 4  # its reflect padding keeps its input, unless that is cut
        assert analysis.saved_bytes(until) == kept, analysis.layers[until].path


def test_flops_of_each_kind_of_layer_are_the_formulas():
    batch, positions = 2, 8 * 8
    chain = [
        2 * batch * positions * 4 * 3 * 9,
        2 * batch * 4 * 4 * 6 * 4 * 9,  # stride 2
        2 * batch * 4 * 4 * 8 * 6,
        2 * batch * 8 * 5,
    ]
    assert [c.flops for c in analyze(NETS["chain"].build(), *NETS["chain"].inputs()).costs] == chain
    autoencoder = [
        2 * batch * 4 * 4 * 6 * 3 * 9,
        2 * batch * 4 * 4 * 6 * (4 // 2) * 9,  # transposed: per position of its input
        2 * batch * positions * 3 * 4 * 9,
    ]
    costs = analyze(NETS["autoencoder"].build(), *NETS["autoencoder"].inputs()).costs
    assert [c.flops for c in costs] == autoencoder


@pytest.mark.parametrize("name", NETS)
def test_each_parameter_counts_once(name):
    model = NETS[name].build()
    costs = analyze(model, *NETS[name].inputs()).costs
    assert sum(c.parameters for c in costs) == sum(p.numel() for p in model.parameters())


def test_block_cost_is_the_sum_of_its_layers():
    analysis = analyze(NETS["residual"].build(), *NETS["residual"].inputs())
    block = analysis.blocks[1]
    assert analysis.block_cost(block) == analysis.costs[1] + analysis.costs[2]
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


# --- does nothing when it should -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "dropout"])
def test_nothing_is_computed_and_nothing_moves(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    analyze(model, *inputs)
    laws.assert_equal(model.state_dict(), state, "state")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_a_module_of_two_names_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.append(model[0])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    analyze(model, torch.ones(2, 4))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name], name


def test_a_huge_batch_takes_no_memory():
    model = NETS["residual"].build()
    batch = torch.zeros(1, 3, 1024, 1024).expand(4096, 3, 1024, 1024)  # 48 GiB if it were real
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = analyze(model, batch).costs
    assert sum(c.saved_bytes for c in costs) > 2**36
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB: 128 MiB


def test_no_inputs_no_costs():
    analysis = analyze(NETS["chain"].build())
    assert analysis.costs is None
    assert analysis.saved_bytes(1) is None
    assert analysis.block_cost(analysis.blocks[0]) is None


def test_costs_of_a_model_without_layers_are_not_asked_for():
    assert analyze(nn.Sequential(nn.ReLU()), torch.ones(2)).costs is None

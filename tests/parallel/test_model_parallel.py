"""Model parallel training: the weights of one process, and one message when a rank fails."""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.nets import NETS, BasicBlock, conv_norm
from torch import distributed, multiprocessing, nn

import fxlocal
from fxlocal import ConvHead, Hebbian, LocalModules, LocalPrefix, Plan, PlanError
from fxlocal.parallel import ModelParallel, ParallelError

STEPS, BATCH, TIMEOUT = 5, 4, 10.0


class Narrow(nn.Module):
    """Four residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 4)
        self.blocks = nn.Sequential(*(BasicBlock(4, 4) for _ in range(4)))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


MODELS = {"narrow": Narrow, "unet": NETS["unet"].model}


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().double()


def batch(name, step, replica=0, size=BATCH):
    generator = torch.Generator().manual_seed(100 * step + replica)
    x = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    shape = (size, 8, 8) if name == "unet" else (size,)
    return x, torch.randint(2, shape, generator=generator)


def plan_of(name, count, **options):
    classes = 2 if name == "unet" else 5
    modules = LocalModules(count, num_classes=classes, balance="blocks", **options)
    return Plan(modules=modules)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


# The ranks' side


def in_rank(rank, size, folder, function, arguments):
    """Run ``function`` with a process group, and leave behind what it returns or why it failed."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    try:
        result = function(rank, *arguments)
    except (ParallelError, PlanError) as error:
        result = f"{type(error).__name__}: {error}"
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def launch(folder, size, function, *arguments, patience=60.0):
    """Return what each of ``size`` ranks returned, or None of one that died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fxlocal.parallel", "fxlocal.passes"])
    processes = [
        context.Process(target=in_rank, args=(rank, size, folder, function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"ranks {hung} did not end"
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path) if path.exists() else None for path in paths]


def train(rank, cases):
    """Train one model after the other; return the states that rank 0 gathered."""
    states = []
    for name, plan, replicas in cases:
        model = build(name, seed=rank)  # rank 0's weights count
        replica = rank // plan.modules.count
        part = ModelParallel(model, plan, batch(name, 0)[0], timeout=TIMEOUT)
        assert replicas == part.ranks.num_replicas
        optimizer = sgd(part.parameters())
        for step in range(STEPS):
            inputs = batch(name, step, replica) if part.stage.index == 0 else ()
            assert part.step(*inputs).isfinite()
            optimizer.step()
            optimizer.zero_grad()
        states.append(part.gather_state())
        part.close()
    return states


def train_alone(name, plan, replicas=1):
    """Train in one process; each replica's batch is a micro-batch."""
    net = fxlocal.transform(build(name), plan, batch(name, 0)[0]).train()
    fxlocal.scale_losses(net, 1 / replicas)
    optimizer = sgd(net.parameters())
    buffers = list(net.buffers())
    for step in range(STEPS):
        for replica in reversed(range(replicas)):
            before = [buffer.clone() for buffer in buffers]
            with fxlocal.accumulate(net) if replica > 0 else nullcontext():
                _, loss = net(*batch(name, step, replica))
                (loss / replicas).backward()
            if replica > 0:  # the first one's running statistics count
                for buffer, old in zip(buffers, before, strict=True):
                    buffer.copy_(old)
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def compare(tmp_path, size, *cases):
    gathered, *nothing = launch(tmp_path, size, train, cases)
    assert not isinstance(gathered, str), gathered
    for others in nothing:
        assert others == [None] * len(cases)
    for (name, plan, replicas), state in zip(cases, gathered, strict=True):
        expected = train_alone(name, plan, replicas)
        assert list(state) == list(expected)
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow  # starts processes, as most tests here do
def test_two_ranks_equal_one_process(tmp_path):
    compare(
        tmp_path,
        2,
        ("narrow", plan_of("narrow", 2), 1),
        ("narrow", plan_of("narrow", 2, link=1, head=ConvHead(hidden=8)), 1),
        ("unet", plan_of("unet", 2, link=1), 1),
    )


@pytest.mark.slow
def test_three_ranks_equal_one_process(tmp_path):
    compare(
        tmp_path,
        3,
        ("narrow", plan_of("narrow", 3, link=1, alpha=0.25), 1),
        ("narrow", plan_of("narrow", 3, link=2, alpha=0.25, weighting="compound"), 1),
        ("unet", plan_of("unet", 3), 1),  # a skip over the module in the middle
    )


@pytest.mark.slow
def test_replicas_equal_one_process_with_all_their_batches(tmp_path):
    prefix = LocalPrefix("blocks.1", Hebbian(0.05))
    compare(
        tmp_path,
        4,
        ("narrow", plan_of("narrow", 2, link=1), 2),
        ("narrow", replace(plan_of("narrow", 2), local=prefix), 2),
    )


def accumulate_and_restore(rank, name, plan):
    """Train with micro-batches, go on from the state of the end, and then from zeros."""
    part = ModelParallel(build(name), plan, batch(name, 0)[0], timeout=TIMEOUT)
    fxlocal.scale_losses(part.network, 0.5)
    optimizer = sgd(part.parameters())
    for step in range(4):
        part.step(*batch(name, step))
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    trained = part.gather_state()
    part.load_state_dict(None if rank else {n: 0 * value for n, value in trained.items()})
    zeroed = part.gather_state()
    part.load_state_dict(trained)
    assert part.step(*batch(name, 0)) > 0
    return trained, zeroed, part.gather_state()


@pytest.mark.slow
def test_gradients_of_micro_batches_add_up_and_states_can_be_loaded(tmp_path):
    name, plan = "narrow", plan_of("narrow", 2, link=1)
    net = fxlocal.transform(build(name), plan, batch(name, 0)[0]).train()
    fxlocal.scale_losses(net, 0.5)
    optimizer = sgd(net.parameters())
    for step in range(4):
        _, loss = net(*batch(name, step))
        (loss / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    (trained, zeroed, restored), nothing = launch(tmp_path, 2, accumulate_and_restore, name, plan)
    assert nothing == (None, None, None)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-12, atol=1e-12)
        assert not zeroed[key].any()
        if "running" not in key and "num_batches" not in key:  # the step after moved these
            assert torch.equal(restored[key], trained[key])


# At their own pace


def decoupled(rank, name, plan, pauses):
    """Let each rank take 30 steps, at its own pace; return how long it took and what came of it."""
    with ModelParallel(build(name), plan, batch(name, 0)[0], timeout=TIMEOUT) as part:
        optimizer = torch.optim.SGD(part.parameters(), lr=0.02)
        first = None
        for step in range(30):
            assert part.step(*batch(name, step % 3)).isfinite()
            first = first or time.monotonic()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(pauses[rank])
        seconds = time.monotonic() - first
        state = part.gather_state()
    return seconds, state


def loss_of(net):
    """Sum the modules' losses over the three batches: which of them a rank repeats is chance."""
    return sum(net(*batch("narrow", step))[1].item() for step in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("pauses", [(0.05, 0.0, 0.0), (0.0, 0.0, 0.05)], ids=["rising", "falling"])
def test_modules_at_their_own_pace_learn_and_come_to_an_end(tmp_path, pauses):
    plan = plan_of("narrow", 3, replay=2)
    results = launch(tmp_path, 3, decoupled, "narrow", plan, pauses)
    assert not any(isinstance(result, str) for result in results), results
    seconds = [seconds for seconds, _ in results]
    if pauses[0]:  # the last rank repeats batches instead of waiting
        assert seconds[2] < 0.6 * seconds[0]
    else:  # the first one is not far ahead, so that no batch is lost
        assert seconds[0] > 0.6 * seconds[2]
    net = fxlocal.transform(build("narrow"), plan, batch("narrow", 0)[0]).train()
    before = loss_of(net)
    net.load_state_dict(results[0][1])
    assert loss_of(net) < 0.5 * before


# Failures


def fail(rank, name, plan, how, folder):
    """Save a checkpoint after two steps and fail in the third, on rank 0 or 1."""
    if rank == 1 and how == "differs":
        plan = plan_of(name, 3, head=ConvHead(hidden=4))
    with ModelParallel(build(name), plan, batch(name, 0)[0], timeout=TIMEOUT) as part:
        optimizer = sgd(part.parameters())
        for step in range(8):
            if step == 2:
                if (state := part.gather_state()) is not None:
                    torch.save(state, folder / "checkpoint.pt")
                if rank == 1 and how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank == 1 and how == "raises":
                    raise ZeroDivisionError("on purpose")
                if rank == 0 and how == "hangs":
                    time.sleep(2.2 * TIMEOUT)
            wrong = how == "shape" and step == 2
            part.step(*batch(name, step, size=BATCH - wrong))
            optimizer.step()
            optimizer.zero_grad()


MESSAGES = {
    "killed": "rank 1 (module 1) ended or did not answer within 10 s",
    "hangs": "rank 0 (module 0) ended or did not answer within 10 s",
    "raises": "rank 1 (module 1): ZeroDivisionError: on purpose",
    "differs": "rank 1 (module 1): ValueError: 'fxlocal.heads.0.",
    "shape": "rank 0 (module 0): ValueError: 'x' is float64 (3, 3, 8, 8), and was float64 "
    "(4, 3, 8, 8) in the first batch: every batch must have the same shapes, so leave out a "
    "smaller last one",
}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "replay"), [*((how, 0) for how in MESSAGES), ("killed", 2)])
def test_a_failure_ends_all_ranks_with_one_message(tmp_path, how, replay):
    plan = plan_of("narrow", 3, replay=replay)
    begun = time.monotonic()
    results = launch(tmp_path, 3, fail, "narrow", plan, how, tmp_path)
    for rank, result in enumerate(results):
        if rank == 1 and how == "killed":
            assert result is None
        else:
            assert result == results[0]
            assert result.startswith(f"ParallelError: {MESSAGES[how]}")
    assert time.monotonic() - begun < 9 * TIMEOUT  # a busy machine starts processes slowly
    if how != "differs":
        net = fxlocal.transform(build("narrow"), plan, batch("narrow", 0)[0])
        net.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))


# What is refused at once


@pytest.fixture
def alone():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def refused(name, plan, error=PlanError):
    with pytest.raises(error) as raised:
        ModelParallel(build(name), plan, batch(name, 0)[0])
    return str(raised.value)


def test_a_plan_without_two_modules_is_refused():
    for plan in (Plan(), plan_of("narrow", 1)):
        assert "needs two modules or more" in refused("narrow", plan)


def test_no_process_group_is_refused():
    message = refused("narrow", plan_of("narrow", 2), RuntimeError)
    assert "torchrun --nproc-per-node 2" in message


def test_too_few_ranks_are_refused(alone):
    message = refused("narrow", plan_of("narrow", 2))
    assert "2 modules cannot be shared out to 1 processes" in message

"""What only a GPU shows; every test skips without one. The CPU suite covers the rest."""

import copy
import itertools
import warnings
from collections import Counter

import pytest
import torch
from support.nets import Written
from torch import nn

import fxlocal
from fxlocal import ConvHead, Freeze, Hebbian, LocalModules, LocalPrefix, Plan, Random, TopK, Zero
from fxlocal.ops.local_modules import let_backward_compile
from fxlocal.ops.topk import conv_topk
from fxlocal.plan import WeightGrad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def _step(net: nn.Module, images: torch.Tensor, amp: bool) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        loss = net(images).float().square().mean()
    loss.backward()
    return loss.detach()


@pytest.fixture
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("rule", [Hebbian(rate=0.1), Freeze()])
def test_a_step_on_the_gpu_is_the_cpus(rule, no_tf32) -> None:
    here, there = _model(), _model().cuda()
    images = torch.randn(8, 3, 16, 16)
    plan = Plan(local=LocalPrefix(until=2, rule=rule))
    loss = _step(fxlocal.transform(here, plan), images, amp=False)
    assert torch.allclose(
        _step(fxlocal.transform(there, plan), images.cuda(), amp=False).cpu(), loss, rtol=1e-4
    )
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-4)
        assert (a.grad is None) == (b.grad is None)


def test_compiled_bf16_channels_last_moves_by_the_rate() -> None:
    model = _model().cuda().to(memory_format=torch.channels_last)
    before = copy.deepcopy(model)
    images = torch.randn(8, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until=2, rule=Hebbian(rate=0.1))))
    _step(torch.compile(net, fullgraph=True), images, amp=True)
    for index in (0, 3):
        moved = model[index].weight - before[index].weight
        assert moved.norm().item() == pytest.approx(0.1, rel=1e-3)
        assert model[index].weight.is_contiguous(memory_format=torch.channels_last)
        assert model[index].weight.grad is None


def test_a_prefix_frees_its_activations() -> None:
    peaks = []
    for until in (0, 2):
        model = _model().cuda()
        net = fxlocal.transform(model, Plan(local=LocalPrefix(until=until, rule=Freeze())))
        images = torch.randn(256, 3, 64, 64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        _step(net, images, amp=False)
        peaks.append(torch.cuda.max_memory_allocated())
        del net, model
    assert peaks[1] < 0.8 * peaks[0]


def test_resume_keeps_the_gpus_generator() -> None:
    model = _model().cuda()
    driver = fxlocal.Driver(model, fxlocal.schedules.Constant())
    state = driver.state_dict()
    drawn = torch.rand(4, device="cuda")
    driver.load_state_dict(state)
    assert torch.equal(torch.rand(4, device="cuda"), drawn)


# --- CUDA graphs ---------------------------------------------------------------------------------


def _train(compile: object, steps: int, amp: bool) -> tuple[nn.Module, list[str]]:
    """Train with dropout over a moving boundary, the last loss alive; return what warned, too."""
    torch.manual_seed(0)
    model = nn.Sequential(*_model(), nn.Dropout(0.5), nn.Linear(10, 10)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = fxlocal.schedules.Static(4, c1=2.0, c2=1.0, rule=Hebbian(2**-7))
    driver = fxlocal.Driver(model, schedule, optimizer=optimizer, compile=compile)
    images = torch.randn(8, 3, 16, 16, device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            driver.start_epoch()
            for _ in range(steps):
                loss = _step(driver.network(), images, amp)
                optimizer.step()
                optimizer.zero_grad()
                driver.observe(loss)
            driver.end_epoch()
    assert driver.history == [0, 0, 1, 2]
    return model, [str(w.message) for w in caught if "cudagraph" in str(w.message)]


@pytest.mark.parametrize("amp", [False, True])
def test_graphed_steps_are_the_eager_ones(amp, no_tf32) -> None:
    eager, _ = _train(False, 5, amp)
    graphed, warned = _train("cudagraph", 5, amp)
    assert warned == []
    for (name, a), b in zip(eager.named_parameters(), graphed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-2 if amp else 1e-4), name


def test_a_forward_that_waits_for_the_device_falls_back() -> None:
    def waits(net, x):
        return net.net(x) * _peek(x)

    model = Written(waits, net=_model()).cuda()
    driver = fxlocal.Driver(model, fxlocal.schedules.Constant(), compile="cudagraph")
    driver.start_epoch()
    with pytest.warns(UserWarning, match="capture failed"):
        _step(driver.network(), torch.randn(8, 3, 16, 16, device="cuda"), amp=False)
    assert torch.rand(3, device="cuda").shape == (3,)  # the generator has come out of it


@torch.fx.wrap
def _peek(x: torch.Tensor) -> float:
    return float(x.mean().item()) + 1


def test_a_compiled_local_update_issues_at_most_two_kernels_beside_its_product() -> None:
    """Counted as the kernels of a compiled step with the update less those of one without."""
    counts = []
    for rule in (Freeze(), Hebbian(rate=0.1)):
        model = _model().cuda()
        net = fxlocal.transform(model, Plan(local=LocalPrefix(until=1, rule=rule)))
        compiled = torch.compile(net, fullgraph=True)
        images = torch.randn(8, 3, 16, 16, device="cuda")
        for _ in range(3):
            _step(compiled, images, amp=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _step(compiled, images, amp=False)
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if "memcpy" not in e.name.lower()]
        products = [e for e in kernels if any(w in e.name.lower() for w in _PRODUCTS)]
        counts.append(len(kernels) - len(products))
    assert counts[1] - counts[0] <= 2


_PRODUCTS = ("gemm", "conv", "wgrad", "cutlass", "cudnn", "xmma", "nchw", "nhwc")


# --- Approximated weight gradients ---------------------------------------------------------------


def _convs() -> nn.Module:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    return nn.Sequential(convs[0], nn.ReLU(), convs[1]).cuda()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (4, 2)])
def test_topk_on_the_gpu_is_the_cpus(k, dtype, layout, groups, dilation) -> None:
    pre = torch.randn(16, 24, 14, 14).to(dtype)
    # No two of a map are equal in size, in any dtype: which are kept is then not open.
    sizes = torch.stack([torch.randperm(49) + 1 for _ in range(16 * 40)]).view(16, 40, 7, 7)
    grad = (sizes * torch.randn(16, 40, 7, 7).sign()).to(dtype)
    kernel, stride, padding = [3, 3], [2, 2], [dilation, dilation]
    options = (kernel, stride, padding, [dilation, dilation], groups, k, 0.5)
    expected = conv_topk(pre, grad, *options)
    there = (value.cuda().to(memory_format=layout) for value in (pre, grad))
    actual = conv_topk(*there, *options).cpu()
    assert actual.dtype == expected.dtype == torch.float32
    assert (actual - expected).norm() < 1e-5 * expected.norm()  # the order of a float32 sum


@pytest.mark.parametrize("method", [Zero(), Zero(none=True), *(TopK(k) for k in (1, 3))])
def test_compiled_approximations_are_the_eager_ones(method, no_tf32) -> None:
    images, found = torch.randn(8, 3, 16, 16, device="cuda"), []
    for compiled in (False, True):
        model = _convs()
        net = fxlocal.transform(model, Plan(weight_grads={"2": method}))
        _step(torch.compile(net, fullgraph=True) if compiled else net, images, amp=False)
        found.append([p.grad for p in model.parameters()])
    for eager, compiled in zip(*found, strict=True):
        assert (eager is None) == (compiled is None)
        assert eager is None or (eager - compiled).norm() <= 1e-3 * eager.norm()


def _kernels(method: WeightGrad | None) -> Counter:
    """Count the kernels of one step of a convolution; None for a weight without a gradient."""
    torch.use_deterministic_algorithms(False)  # which fill all new memory, by a kernel each
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False).cuda()
    layer.weight.requires_grad_(method is not None)
    plan = Plan() if method is None else Plan(weight_grads={"0": method})
    net = fxlocal.transform(nn.Sequential(layer), plan)
    images = torch.randn(8, 16, 16, 16, device="cuda", requires_grad=True)
    for _ in range(3):
        images.grad = layer.weight.grad = None  # a gradient to add to would be a kernel more
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _step(net, images, amp=False)
            torch.cuda.synchronize()
    return Counter(e.name for e in profile.events() if e.device_type.name == "CUDA")


@pytest.mark.parametrize(
    ("method", "names"),
    [(Zero(none=True), ()), (Zero(), ("memset", "fill")), (Random(), ("normal", "distribution"))],
)
def test_zero_and_random_compute_no_weight_gradient(method, names) -> None:
    """Beside the kernels of a frozen weight there is the one that fills its gradient, or none."""
    extra = _kernels(method) - _kernels(None)
    assert sum(extra.values()) == (1 if names else 0), extra
    assert all(any(name in kernel.lower() for name in names) for kernel in extra), extra


@pytest.mark.parametrize("compile", [True, "cudagraph"])
@pytest.mark.parametrize("method", [Zero(), TopK(1, force=True)])
def test_a_cycling_schedule_runs_compiled_and_graphed(method, compile, no_tf32) -> None:
    images, trained = torch.randn(8, 3, 16, 16, device="cuda"), []
    for how in (False, compile):
        model = _convs()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = fxlocal.schedules.Approximation.named("schedule-2", method)
        driver = fxlocal.Driver(model, schedule, optimizer=optimizer, compile=how)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*cudagraph.*")
            driver.start_epoch()
            for _ in range(6):
                driver.observe(_step(driver.network(), images, amp=False))
                optimizer.step()
                optimizer.zero_grad()
        trained.append(model)
    parameters = (net.parameters() for net in (_convs(), *trained))
    for start, eager, other in zip(*parameters, strict=True):
        moved = (eager - start).norm()
        assert moved > 0 and (eager - other).norm() < 1e-2 * moved


def test_random_gradients_differ_in_each_replay() -> None:
    model = _convs()
    schedule = fxlocal.schedules.Constant(Plan(weight_grads={"2": Random(std=2.0)}))
    driver = fxlocal.Driver(model, schedule, compile="cudagraph")
    driver.start_epoch()
    drawn = []
    for _ in range(3):
        model.zero_grad()
        _step(driver.network(), torch.randn(8, 3, 16, 16, device="cuda"), amp=False)
        drawn.append(model[2].weight.grad.clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(drawn))
    assert all(gradient.std().item() == pytest.approx(2.0, rel=0.1) for gradient in drawn)


def _step_of_modules(net, images, labels, *, amp=None):
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        _, loss = net(images, labels)
    loss.backward()
    return [p.grad.float().cpu() for p in net.parameters()]


def _modules(link: int) -> Plan:
    head = ConvHead(hidden=8)
    names = LocalModules(2, link=link, head=head, num_classes=10, balance=("3",))
    return Plan(modules=names)


LABELS = torch.arange(8) % 10


@pytest.mark.parametrize("link", [0, 1])
def test_local_modules_on_the_gpu_are_the_cpus(link, no_tf32) -> None:
    images = torch.randn(8, 3, 16, 16)
    here = fxlocal.transform(_model(), _modules(link), images)
    there = copy.deepcopy(here).cuda()
    expected = _step_of_modules(here, images, LABELS)
    found = _step_of_modules(there, images.cuda(), LABELS.cuda())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not let_backward_compile(), reason="traces no backward")
def test_compiled_local_modules_learn_as_eager_ones() -> None:
    images = torch.randn(8, 3, 16, 16, device="cuda")
    eager = fxlocal.transform(_model().cuda(), _modules(1), images)
    compiled = copy.deepcopy(eager)
    expected = _step_of_modules(eager, images, LABELS.cuda())
    call = torch.compile(compiled, fullgraph=True)
    _, loss = call(images, LABELS.cuda())
    loss.backward()
    found = [p.grad.cpu() for p in compiled.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_a_grad_scaler_and_scaled_losses_give_the_unscaled_gradients() -> None:
    images, labels = torch.randn(8, 3, 16, 16, device="cuda"), LABELS.cuda()
    net = fxlocal.transform(_model().cuda(), _modules(1), images)
    expected = _step_of_modules(copy.deepcopy(net), images, labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    fxlocal.scale_losses(net, scaler.get_scale())
    with torch.autocast("cuda", torch.float16):
        _, loss = net(images, labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert (parameter.grad.cpu() - gradient).norm() <= 0.05 * gradient.norm() + 1e-3


def test_local_modules_free_their_activations() -> None:
    peaks = {}
    for count in (1, 4):
        layers = [(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())] * 16
        model = nn.Sequential(*(copy.deepcopy(part) for parts in layers for part in parts))
        model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(16, 10))
        images = torch.randn(64, 16, 64, 64, device="cuda")
        modules = LocalModules(count, num_classes=10, balance="blocks")
        net = fxlocal.transform(model.cuda(), Plan(modules=modules), images)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step_of_modules(net, images, torch.zeros(64, dtype=torch.int64, device="cuda"))
        peaks[count] = torch.cuda.max_memory_allocated() - before
    assert peaks[4] < 0.5 * peaks[1]

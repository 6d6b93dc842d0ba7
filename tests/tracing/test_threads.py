"""Captures in several threads: one at a time, as each puts functions in the place of torch's."""

import threading

import torch
from torch import nn

import fxlocal
from fxlocal import Plan

PLACES = [(torch.autograd.Function, "apply"), (torch, "manual_seed"), (nn.Module, "__call__")]
PLACES += [(torch.autocast, "__enter__"), (nn.Module, "__setattr__")]


def test_all_are_captured_and_torch_is_as_it_was():
    before = [getattr(*place) for place in PLACES]
    models = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(4)]
    made = []

    def work(model):
        for _ in range(5):
            made.append((model, fxlocal.transform(model, Plan())))

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [getattr(*place) for place in PLACES] == before
    assert len(made) == 20
    x = torch.randn(2, 4)
    assert all(torch.equal(network(x), model(x)) for model, network in made)


def test_other_threads_may_call_modules_meanwhile():
    found, done = [], threading.Event()
    other, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(2, 4)
    expected = other(x)

    def call():
        while not done.is_set():
            try:
                found.append(torch.equal(other(x), expected))
            except Exception:
                found.append(False)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for _ in range(5):
            fxlocal.transform(nn.Sequential(*(nn.Linear(4, 4) for _ in range(30))), Plan())
    finally:
        done.set()
        thread.join()
    assert found and all(found)


def test_another_thread_may_enter_inference_mode_while_a_model_is_captured():
    done = []

    def enter():
        with torch.inference_mode():
            done.append(torch.ones(1))

    class Starts(nn.Module):
        def forward(self, x):
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
            return x * 2

    fxlocal.capture(Starts())
    assert done

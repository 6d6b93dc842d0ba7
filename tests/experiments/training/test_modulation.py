"""Momentum and Adam on local updates, an ablation: against a loop by hand, and exact resume."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tiny import SETTINGS, dropout_net, experiment, run
from torch import nn

from fxlocal import Driver, Hebbian
from fxlocal.experiments.training.parts.stepper import Stepper
from fxlocal.experiments.training.settings import Machine
from fxlocal.experiments.training.specs import StrategyError, parse_spec
from fxlocal.experiments.training.trainer import train_run
from fxlocal.schedules import Static

RATE, LR, LOSSES = 2**-4, 0.1, [1.0, 2.0, 3.0, 2.0, 2.5, 2.0]
# The boundary is 0, 1, 1, 2, 2, 2.
SCHEDULE = Static(6, "linear", c1=0.0, c2=0.5, rule=Hebbian(RATE), rate_decay=(0.5, 2))


def build():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def batch(epoch, step):
    generator = torch.Generator().manual_seed(2 * epoch + step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def by_hand(modulation):
    """Each weight after each epoch: the text's steps, with m (and v) of Adam or of momentum."""
    model, m, v, count, begun, found = build(), {}, {}, {}, {}, []
    for epoch in range(6):
        boundary = min((epoch + 1) // 2, 2)
        sign = -1 if epoch > 1 and LOSSES[epoch - 2] < LOSSES[epoch - 1] else 1
        for step in range(2):
            x, y = batch(epoch, step)
            steps = []
            for i, layer in enumerate((model[0], model[2], model[4])):
                x = x.detach() if i <= boundary else x
                z = layer(x)
                if i < boundary:
                    rate = RATE * 0.5 ** ((epoch - begun.setdefault(i, epoch)) // 2)
                    delta = sign * (z.t() @ x).detach()
                    d = delta / delta.square().sum().sqrt()
                    count[i] = count.get(i, 0) + 1
                    if modulation == "momentum":
                        m[i] = 0.9 * m[i] + d if i in m else d
                        steps.append((layer, rate * m[i]))
                    else:
                        m[i] = 0.9 * m.get(i, 0) + 0.1 * d
                        v[i] = 0.999 * v.get(i, 0) + 0.001 * d.square()
                        mean, square = m[i] / (1 - 0.9 ** count[i]), v[i] / (1 - 0.999 ** count[i])
                        steps.append((layer, rate * mean / (square.sqrt() + 1e-8)))
                x = torch.relu(z)
            trained = [model[2 * i] for i in range(boundary, 3)]
            loss = F.cross_entropy(z, y)
            parameters = [p for layer in trained for p in layer.parameters()]
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p -= LR * gradient
                for layer, move in steps:
                    layer.weight += move
        found.append([p.detach().clone() for p in model.parameters()])
    return found


@pytest.mark.parametrize("modulation", ["momentum", "adam"])
def test_twelve_steps_and_a_resume_between_are_those_by_hand(modulation):
    def make():
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        driver = Driver(model, SCHEDULE, optimizer=optimizer)
        return driver, Stepper(driver, Machine(), "classification", modulation)

    driver, stepper = make()
    for epoch, expected in enumerate(by_hand(modulation)):
        if epoch == 3:
            states = driver.state_dict(), stepper.state_dict()
            driver, stepper = make()
            driver.load_state_dict(states[0])
            stepper.load_state_dict(states[1])
        driver.start_epoch()
        for step in range(2):
            stepper.take(*batch(epoch, step))
            driver.optimizer.step()
            driver.optimizer.zero_grad()
        driver.observe(torch.tensor(LOSSES[epoch]))
        driver.end_epoch()
        found = [p.detach() for p in driver.model.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert driver.history == [0, 1, 1, 2, 2, 2]


def test_a_run_of_a_spec_has_it_and_resumes_exactly(tmp_path):
    class Break(Exception):
        pass

    def stop(record):
        if len(record.loss) == 2:
            raise Break

    spec = parse_spec("local-static(start=0,largest=0.7,rate=0.01,modulation=adam)")
    path, settings = tmp_path / "checkpoint.pt", replace(SETTINGS, epochs=3)
    plain, whole, broken, again = (experiment(dropout_net(), None, settings) for _ in "abcd")
    first = train_run(whole.by(spec))
    with pytest.raises(Break):
        train_run(broken.by(spec), checkpoint=path, on_epoch=stop)
    second = train_run(again.by(spec), checkpoint=path, resume=True)
    assert (first.loss, first.errors, first.boundary[-1] > 0) == (second.loss, second.errors, True)
    assert first.loss != run(dropout_net(), plain.by(spec).schedule, settings).loss


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local-static(modulation=rmsprop)", "modulation=rmsprop is not one of momentum, adam"),
        ("local-dynamic(modulation=1)", "modulation=1 is not one of momentum, adam"),
        ("freeze(modulation=adam)", "freeze has no argument 'modulation'"),
        ("local-static(modulation=adam,relative=true)", "relative=True: changes nothing beside"),
    ],
)
def test_what_is_no_modulation_is_refused(text, message):
    with pytest.raises(StrategyError, match=message):
        parse_spec(text).schedule(9)

"""What an adapter adds to a step."""

import threading

import pytest

from fxlocal.experiments.bench.trainers import Job, Turns, time_trainers


def test_the_loop_alone_needs_no_package():
    found = time_trainers(Job(steps=5, batch_size=2, size=8, width=4), [])
    assert found["milliseconds"]["loop"] > 0 and found["adapter_percent"] == {}


def test_each_adapter_is_timed_beside_its_trainer_without_it():
    pytest.importorskip("accelerate")
    found = time_trainers(Job(steps=5, batch_size=2, size=8, width=4), ["accelerate"])
    assert set(found["milliseconds"]) == {"loop", "accelerate", "accelerate without"}
    assert set(found["adapter_microseconds"]) == {"accelerate"}


def test_threads_take_turns_until_each_has_left():
    turns, taken = Turns(["a", "b", "c"]), []

    def run(name, steps):
        turns.wait(name)
        for _ in range(steps):
            taken.append(name)
            turns.give(name)
        turns.leave(name)

    threads = [threading.Thread(target=run, args=job) for job in (("a", 3), ("b", 1), ("c", 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert "".join(taken) == "abccaac"

"""The memory behind "once": nothing forgotten early, nothing made new, and a bound."""

import threading

import pytest

from broker.errors import Reason, Refused
from broker.guard.once import OnceMemory

START = 1_900_000_000.0


def take(memory: OnceMemory, key: str, *, until: float = START + 60, principal: str = "a", now: float = START) -> None:
    memory.take(key, until=until, principal=principal, now=now, again=Reason.ALREADY_USED)


def refusal(memory: OnceMemory, key: str, **changes: float | str) -> Reason:
    with pytest.raises(Refused) as caught:
        take(memory, key, **changes)
    return caught.value.reason


def test_a_key_is_taken_once_until_its_time_has_passed() -> None:
    memory = OnceMemory()
    take(memory, "k")
    take(memory, "another")
    for now in (START, START + 30, START + 59.9):
        assert refusal(memory, "k", now=now) is Reason.ALREADY_USED


def test_what_can_no_longer_be_used_is_forgotten() -> None:
    memory = OnceMemory()
    for number in range(1000):
        take(memory, f"k{number}", now=START + number, until=START + number + 60)
    assert len(memory) <= 60 + 8


def test_a_clock_that_jumps_ahead_and_back_makes_nothing_new() -> None:
    memory = OnceMemory()
    take(memory, "k")
    take(memory, "later", now=START + 3600, until=START + 3660)
    assert refusal(memory, "k") is Reason.EXPIRED
    assert refusal(memory, "later") is Reason.ALREADY_USED


def test_a_full_memory_refuses_and_drops_nothing() -> None:
    memory = OnceMemory(capacity=2)
    take(memory, "k1")
    take(memory, "k2")
    assert refusal(memory, "k3") is Reason.QUOTA
    assert refusal(memory, "k1") is Reason.ALREADY_USED
    take(memory, "k3", now=START + 120, until=START + 180)


def test_one_caller_cannot_fill_it_for_all() -> None:
    memory = OnceMemory(per_principal=2)
    take(memory, "k1", principal="flood")
    take(memory, "k2", principal="flood")
    assert refusal(memory, "k3", principal="flood") is Reason.QUOTA
    take(memory, "k3", principal="another")
    take(memory, "k4", principal="flood", now=START + 120, until=START + 180)


def test_of_many_threads_one_takes_a_key() -> None:
    memory, taken, start = OnceMemory(), [], threading.Barrier(8)

    def attempt() -> None:
        start.wait()
        for number in range(200):
            try:
                take(memory, f"k{number}")
            except Refused:
                continue
            taken.append(number)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(200))

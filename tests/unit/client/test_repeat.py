"""What failed on the way is tried again, within its deadline; what was answered never is."""

import asyncio

import pytest

from broker.client.faults import Unreachable, refusal
from broker.client.repeat import repeat
from broker.errors import BrokerError, Reason, Refused, Unavailable


class Attempts:
    def __init__(self, *ends):
        self.ends, self.left = list(ends), []

    async def __call__(self, left):
        self.left.append(left)
        end = self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        return end


def broken():
    return Unreachable("Socket closed", may_retry=True)


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_a_broken_transport_is_tried_three_times_in_all(failures):
    attempts = Attempts(*(broken() for _ in range(failures)), "yes")
    assert await repeat(attempts, 5) == "yes"
    assert len(attempts.left) == failures + 1


async def test_a_third_failure_is_the_answer():
    attempts = Attempts(broken(), broken(), broken(), "never")
    with pytest.raises(Unavailable):
        await repeat(attempts, 5)
    assert attempts.ends == ["never"]


@pytest.mark.parametrize(
    "answer",
    [
        refusal(Reason.DENIED, "1"),
        refusal(Reason.ATTESTATION_UNAVAILABLE, "1"),
        refusal("of_the_future", "1"),
        Unreachable("late"),
        asyncio.CancelledError(),
        ValueError("a bug"),
    ],
)
async def test_anything_else_is_never_repeated(answer):
    attempts = Attempts(answer, "never")
    with pytest.raises(type(answer)):
        await repeat(attempts, 5)
    assert attempts.ends == ["never"]


async def test_each_attempt_has_what_is_left_of_one_deadline():
    attempts = Attempts(broken(), broken(), "yes")
    await repeat(attempts, 2)
    first, second, third = attempts.left
    assert 2 >= first > 1.9
    assert first - 0.1 > second > third > 0


async def test_no_attempt_begins_after_the_deadline():
    attempts = Attempts(broken(), "never")
    begun = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable):
        await repeat(attempts, 0.1)
    assert attempts.ends == ["never"]
    assert asyncio.get_running_loop().time() - begun < 0.1


def test_the_tree_of_answers_is_that_of_the_broker():
    assert issubclass(Unreachable, Unavailable)
    assert isinstance(refusal(Reason.DENIED, None), Refused)
    assert issubclass(Unreachable, BrokerError)

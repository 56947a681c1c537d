"""Quotas: a caller gets its burst and its rate, and nobody else's; strangers cannot use up the memory."""

import pytest

from broker.decision.quota import Quota
from broker.errors import Invalid, Reason, Refused


def refused(quota, caller, now):
    with pytest.raises(Refused) as caught:
        quota.take(caller, now)
    assert caught.value.reason is Reason.QUOTA
    return caught.value.retry_after_ms


def test_a_burst_is_admitted_and_what_follows_it_is_not():
    quota = Quota(1.0, 3, 10)
    for _ in range(3):
        quota.take("a", 0.0)
    assert refused(quota, "a", 0.0) == 1001


def test_after_the_told_wait_one_more_is_admitted():
    quota = Quota(2.0, 1, 10)
    quota.take("a", 5.0)
    wait = refused(quota, "a", 5.1)
    quota.take("a", 5.1 + wait / 1000)
    refused(quota, "a", 5.1 + wait / 1000)


def test_in_the_long_run_the_rate_holds():
    quota, admitted = Quota(10.0, 5, 10), 0
    for step in range(1000):
        try:
            quota.take("a", step / 100)
        except Refused:
            continue
        admitted += 1
    assert 100 <= admitted <= 106


def test_being_refused_costs_nothing():
    quota = Quota(1.0, 1, 10)
    quota.take("a", 0.0)
    for _ in range(100):
        refused(quota, "a", 0.5)
    quota.take("a", 1.0)


def test_one_caller_does_not_use_up_anothers_quota():
    quota = Quota(1.0, 1, 10)
    quota.take("a", 0.0)
    refused(quota, "a", 0.0)
    quota.take("b", 0.0)


def test_an_idle_caller_saves_up_no_more_than_its_burst():
    quota = Quota(1.0, 2, 10)
    quota.take("a", 0.0)
    for _ in range(2):
        quota.take("a", 1000.0)
    refused(quota, "a", 1000.0)


def test_memory_is_bounded_and_no_active_caller_is_forgotten_for_a_stranger():
    quota = Quota(1.0, 2, 3)
    for caller in "abc":
        quota.take(caller, 0.0)
        quota.take(caller, 0.0)
    for number in range(100):
        refused(quota, f"stranger-{number}", 0.1)
    assert len(quota) == 3
    refused(quota, "a", 0.1)  # many names won it nothing


def test_a_caller_whose_bucket_is_full_again_makes_room():
    quota = Quota(1.0, 2, 1)
    quota.take("a", 0.0)
    wait = refused(quota, "b", 0.5)
    quota.take("b", 0.5 + wait / 1000)
    assert len(quota) == 1


def test_a_clock_that_steps_back_gives_nothing_away():
    quota = Quota(1.0, 1, 10)
    quota.take("a", 10.0)
    refused(quota, "a", 5.0)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_quota_that_admits_nobody_or_everybody_is_not_made(wrong):
    with pytest.raises(ValueError, match="a quota needs"):
        Quota(*wrong)


def test_many_are_admitted_all_or_none_and_the_told_wait_is_true():
    quota = Quota(2.0, 5, 10)
    quota.take("a", 0.0, 3)
    with pytest.raises(Refused) as caught:
        quota.take("a", 0.0, 4)
    wait = caught.value.retry_after_ms / 1000
    assert 1.0 <= wait <= 1.01
    quota.take("a", 0.0, 2)  # none of the four was counted
    with pytest.raises(Refused) as caught:
        quota.take("a", 0.0, 4, ahead=1)
    wait = caught.value.retry_after_ms / 1000
    quota.take("a", wait, 1)
    quota.take("a", wait, 4)


def test_more_than_ever_fit_is_malformed_and_not_a_matter_of_waiting():
    quota = Quota(2.0, 5, 10)
    with pytest.raises(Invalid, match=r"at most 5 requests .* these are 6"):
        quota.take("a", 0.0, 6)
    quota.take("a", 0.0, 5)

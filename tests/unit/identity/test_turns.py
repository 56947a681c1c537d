"""Sharing a question is no cache: nobody hears what was asked before he came."""

import asyncio

import pytest

from broker.identity.turns import Turns


class Oracle:
    """Answers with how many questions it heard about a thing by now, once it may."""

    def __init__(self):
        self.heard = []
        self.may_answer = asyncio.Event()

    async def put(self, key):
        self.heard.append(key)
        number = len(self.heard)
        await self.may_answer.wait()
        return number


async def turns_of_the_loop():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_answer_is_never_to_a_question_that_was_put_before_it_was_asked_for():
    oracle = Oracle()
    turns = Turns(oracle.put)
    first = asyncio.create_task(turns.ask("a"))
    await turns_of_the_loop()
    later = [asyncio.create_task(turns.ask("a")) for _ in range(3)]
    await turns_of_the_loop()
    assert oracle.heard == ["a"], "one question at a time"
    oracle.may_answer.set()
    assert await first == 1
    assert await asyncio.gather(*later) == [2, 2, 2], "one question for all who came meanwhile"
    assert await turns.ask("a") == 3, "nothing is kept"
    assert not turns._current
    assert not turns._next


async def test_other_keys_are_asked_about_at_once():
    oracle = Oracle()
    turns = Turns(oracle.put)
    asked = [asyncio.create_task(turns.ask(key)) for key in ("a", "b")]
    await turns_of_the_loop()
    assert oracle.heard == ["a", "b"]
    oracle.may_answer.set()
    await asyncio.gather(*asked)


async def test_who_goes_away_takes_no_answer_from_the_others():
    oracle = Oracle()
    turns = Turns(oracle.put)
    impatient, patient = (asyncio.create_task(turns.ask("a")) for _ in range(2))
    await turns_of_the_loop()
    impatient.cancel()
    await asyncio.wait((impatient,))
    oracle.may_answer.set()
    assert await patient == 1


async def test_a_question_that_fails_fails_those_who_shared_it_alone():
    async def put(_key):
        heard.append(1)
        await asyncio.sleep(0)
        if len(heard) == 1:
            raise ValueError
        return "answer"

    heard = []
    turns = Turns(put)
    together = [asyncio.create_task(turns.ask("a")) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    after = asyncio.create_task(turns.ask("a"))
    assert [type(found) for found in await asyncio.gather(*together, return_exceptions=True)] == [ValueError] * 2
    assert await after == "answer"


async def test_closing_ends_what_is_not_answered():
    oracle = Oracle()
    turns = Turns(oracle.put)
    first = asyncio.create_task(turns.ask("a"))
    await turns_of_the_loop()
    second = asyncio.create_task(turns.ask("a"))
    await turns_of_the_loop()
    await turns.close()
    for ended in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await ended
    assert oracle.heard == ["a"]

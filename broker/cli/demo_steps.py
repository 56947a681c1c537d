"""The demo's story: what is done in each step, what is expected of it, and what came."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.cli.demo_stage import Stage, StageError, stage
from broker.cli.starter_policy import LIMIT
from broker.ledger import reading
from broker.ledger.verify import verify

_JOSE: Final = b"eyJ"  # how every JWT begins: base64url of '{"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step as it went. note: what else there was to see; nothing is expected of it."""

    title: str
    why: str
    expected: str
    came: str
    took_ms: int
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it came as expected."""
        return self.came == self.expected


_Came = tuple[str, str]  # what came, and a note


class _Teller:
    def __init__(self, told: Callable[[Step], None]) -> None:
        self._told = told

    async def step(self, title: str, why: str, expected: str, act: Awaitable[_Came]) -> None:
        began = time.monotonic()
        came, note = await act
        took_ms = round((time.monotonic() - began) * 1000)
        self._told(Step(title=title, why=why, expected=expected, came=came, took_ms=took_ms, note=note))


async def story(told: Callable[[Step], None]) -> None:
    """Plays it. told: called with each step when it has been played.

    Raises: StageError where a process does not start, answer or end.
    """
    teller = _Teller(told)
    async with stage() as actors:
        await actors.register_agent()
        await _used(teller, actors)
        stolen = await _stolen(teller, actors)
        await _withdrawn(teller, actors)
        carried_out = (await actors.orders.do("carried_out"))["carried_out"]
        ended = await actors.dev.end()
        await teller.step(
            "The record: the broker is stopped, and its ledger verified against the checkpoint outside it",
            "Each decision is in a hash chain, and no token is. The service carried out what it should and no more.",
            "stopped in good order; good; no token in it; carried out: 30 on order 17, 20 on order 18",
            _record(actors.shown, ended, stolen, carried_out),
        )


async def _used(teller: _Teller, actors: Stage) -> None:
    agent = actors.agent
    await teller.step(
        "The support agent asks for a token to refund 30 on order 17, and refunds it",
        "It has no secret: the broker knows its PID from the Unix socket and has it attested, now. The token is bound "
        "to a key that the agent made.",
        "token, then refunded",
        _ask_and_refund(actors, order=17, amount=30),
    )
    await teller.step(
        "It uses the same token again",
        "A token counts once.",
        "already_used",
        _came(agent.do("refund", order=17, amount=30)),
    )
    await _fresh_token(actors)
    await teller.step(
        "With a new token for order 17 it refunds order 18",
        "The service rebuilds what a request means and compares it with what was approved.",
        "out_of_scope",
        _came(agent.do("refund", order=18, amount=30)),
    )
    await teller.step(
        "... or refunds 31 on order 17",
        "The amount is part of what was approved.",
        "out_of_scope",
        _came(agent.do("refund", order=17, amount=31)),
    )
    await teller.step(
        f"It asks to refund {LIMIT + 1}",
        f"The policy permits {LIMIT} at most. The answer is a reason code, never the policy.",
        "denied",
        _came(agent.do("ask", order=17, amount=LIMIT + 1)),
    )


async def _stolen(teller: _Teller, actors: Stage) -> str:
    token = str((await actors.agent.do("leak"))["token"])
    await teller.step(
        "Another process gets hold of the agent's new token and uses it for exactly what it is for",
        "It cannot prove the agent's key, only one of its own.",
        "key_mismatch",
        _came(actors.stranger.do("steal", order=17, amount=30, token=token)),
    )
    await teller.step(
        "That process asks the broker for a token of its own",
        "Nobody vouches for it.",
        "not_attested",
        _came(actors.stranger.do("ask", order=17, amount=30)),
    )
    return token


async def _withdrawn(teller: _Teller, actors: Stage) -> None:
    agent = actors.agent
    await teller.step(
        "The agent refunds 20 on order 18 where the service asks the broker each time",
        "A guard's rule says where that is worth a round trip.",
        "token, then refunded",
        _ask_and_refund(actors, order=18, amount=20, carefully=True),
    )
    await _fresh_token(actors)
    await actors.unregister_agent()
    await teller.step(
        "The agent gets one more token, then its registration is deleted, and it asks again",
        "It is the same process on the same connection, but it is attested at each request.",
        "not_attested",
        _came(agent.do("ask", order=17, amount=30)),
    )
    await teller.step(
        "It uses the token that it got just before, where the service asks the broker",
        "The broker decides again, by what is true now.",
        "not_attested",
        _came(agent.do("refund", order=17, amount=30, carefully=True)),
    )


async def _fresh_token(actors: Stage) -> None:
    """Raises: StageError when none is given; the steps that follow would show nothing."""
    came = (await actors.agent.do("ask", order=17, amount=30))["came"]
    if came != "token":
        raise StageError(f"the agent should get a token here, and gets {came}")


async def _ask_and_refund(actors: Stage, **told: Any) -> _Came:
    asked = await actors.agent.do("ask", **told)
    called = await actors.agent.do("refund", **told)
    return f"{asked['came']}, then {called['came']}", f"the token lives {asked.get('lives_s', 0)} s"


async def _came(answer: Awaitable[dict[str, Any]]) -> _Came:
    return str((await answer)["came"]), ""


async def _record(shown: dict[str, Any], ended: int, stolen: str, carried_out: list[dict[str, int]]) -> _Came:
    ledger = Path(shown["ledger"])
    report = await asyncio.to_thread(verify, ledger, Path(shown["checkpoint"]), shown["verifier_key"])
    bodies = [row.body for row in reading.read(ledger)]
    secrets = [_JOSE, stolen.encode(), stolen.rpartition(".")[2].encode()]
    clean = stolen and not any(secret in body for body in bodies for secret in secrets)
    vouched = report.good and report.checkpoint_size == report.size == len(bodies) > 0
    done = ", ".join(f"{one['amount']} on order {one['order']}" for one in carried_out)
    parts = [
        "stopped in good order" if ended == 0 else f"the broker ended with {ended}",
        "good" if vouched else f"not good: {report}",
        "no token in it" if clean else "a token in it",
        f"carried out: {done}",
    ]
    return "; ".join(parts), f"{report.size} records, head {report.head.hex()[:16]}"

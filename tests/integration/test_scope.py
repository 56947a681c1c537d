"""A credential dies the moment its reasons do: a whole broker, and a guard that hears its feed."""

import asyncio

from support.processes import Child
from support.receiving import claims_of
from support.scoped import receiver
from support.whole_broker import AGENT, ORDERS, POLICY, RESOURCE, Whole, serving, whole_broker

from broker.client import ActionToken, Client
from broker.ledger.records import ScopeRefused


async def read(agent: Client, name: str = "orders.read") -> ActionToken:
    return await agent.request(name, RESOURCE, ORDERS)


def write_policy(whole: Whole, text: str) -> None:
    """Replaces the policy in one step."""
    folder = whole.broker.folder / "policy"
    new = folder / "new"
    new.write_text(text)
    new.replace(folder / "orders.cedar")


def refusals(whole: Whole) -> list[ScopeRefused]:
    return [one for one in whole.records() if isinstance(one, ScopeRefused)]


async def test_a_policy_that_changes_kills_what_it_no_longer_permits_and_nothing_else() -> None:
    """The second half of the flow (DESIGN section 2): the same decide as at minting, at every change."""
    with whole_broker() as whole:
        async with receiver(whole) as orders, whole.client(AGENT) as agent:
            hit, spared = await read(agent, "orders.long"), await read(agent)
            assert orders.reason(hit.access_token) == orders.reason(spared.access_token) == ""
            write_policy(whole, POLICY.replace('action == Action::"orders.long"', 'action == Action::"orders.brief"'))
            await orders.hears(hit.access_token, "denied")
            assert await orders.refused(hit) == "denied"
            assert await orders.refused(spared) == ""
            (record,) = refusals(whole)
            assert record.jtis == (claims_of(hit.access_token).jti,)
            assert record.cause.startswith("policy:sha256:")

            write_policy(whole, POLICY)  # the reasons come back; the credential does not
            again = None
            async with asyncio.timeout(20):
                while again is None:
                    try:
                        again = await read(agent, "orders.long")
                    except Exception:  # noqa: BLE001 - not in force yet
                        await asyncio.sleep(0.05)
            assert orders.reason(hit.access_token) == "denied"
            assert await orders.refused(again) == ""


async def token_of(child: Child, action: str = "orders.read") -> str:
    """What a process of its own was given."""
    if child not in _GREETED:
        assert await child.line() == "ready"
        _GREETED.append(child)
    child.tell(f"token {action}")
    return await child.line()


_GREETED: list[Child] = []


async def test_a_process_that_exits_takes_its_credentials_with_it() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders:
            with whole.caller() as child:
                token = await token_of(child)
                assert orders.reason(token) == ""
                child.end()
                await orders.hears(token, "not_attested")


async def test_a_process_that_is_replaced_by_another_program_takes_them_too() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders:
            with whole.caller() as child:
                token = await token_of(child)
                assert orders.reason(token) == ""
                child.tell("replace")
                assert await child.line() == "replaced"
                await orders.hears(token, "not_attested")


async def test_a_deleted_entry_kills_what_was_given_for_it_and_not_what_another_process_has() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders:
            with whole.caller() as child, whole.caller() as other:
                token, spared = await token_of(child), await token_of(other)
                assert orders.reason(token) == orders.reason(spared) == ""
                whole.domain.delete(whole.entries[f"build/agent of {child.pid}"])
                await orders.hears(token, "not_attested")
                assert orders.reason(spared) == ""


async def test_nothing_that_was_refused_comes_back_with_a_broker_that_was_killed_and_started_again() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders, whole.client(AGENT) as agent:
            dead, alive = await read(agent, "orders.long"), await read(agent, "orders.longest")
            write_policy(whole, POLICY.replace('action == Action::"orders.long"', 'action == Action::"orders.closed"'))
            await orders.hears(dead.access_token, "denied")
            whole.broker.process.kill()
            whole.broker.process.wait()
            await orders.hears(alive.access_token, "scope_stale")  # within max_silence, by itself
            write_policy(whole, POLICY)  # what killed it is no more when the next broker starts
            with serving(whole.broker.folder / "broker.toml", whole.domain):
                await orders.hears(alive.access_token, "")
                assert orders.reason(dead.access_token) == "denied"
                assert await orders.refused(alive) == ""

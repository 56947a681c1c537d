"""The guard in front of MCP tools, with the SDK's own client and server: over stdio, a real process, and over HTTP."""

import asyncio
from datetime import timedelta

import pytest
from mcp.shared.exceptions import MCPError
from support.http_orders import nearly_dead, token
from support.issuer import CALLER
from support.mcp_tools import (
    AUDIENCE,
    HISTORY,
    URL,
    WAIT,
    WAYS,
    Tools,
    connected,
    drop_of,
    held,
    now,
    query_of,
)
from support.processes import PATIENCE_S

from broker.action import Action
from broker.guard.mcp import CODE

INCIDENTS = {"table": "incidents"}

pytestmark = pytest.mark.parametrize("way", WAYS)


async def history(tools: Tools) -> list[str]:
    """What the tools did, as the server tells it to who may hear of it."""
    if tools.http:
        return tools.done
    result = await tools.client.call_tool("history", meta=held(HISTORY).mcp_meta("history"))
    return result.structured_content["result"]


async def test_each_call_has_a_token_of_its_own_and_does_its_one_act(way: str) -> None:
    async with connected(way) as tools:
        assert "2025" in way or tools.client.protocol_version.startswith("2026")
        assert await tools.call("query", INCIDENTS, held(query_of())) == f"{CALLER} read 10 of incidents"
        limited = held(query_of(limit=3))
        assert await tools.call("query", {**INCIDENTS, "limit": 3}, limited) == f"{CALLER} read 3 of incidents"
        assert await tools.call("drop-table", INCIDENTS, held(drop_of())) == "dropped incidents"
        assert await history(tools) == ["query incidents 10", "query incidents 3", "drop incidents"]


async def test_invariant_13_another_tool_or_argument_than_approved_is_refused(way: str) -> None:
    """Invariant 13: the act is rebuilt from the call's arguments, defaults included."""
    async with connected(way) as tools:
        access = token(query_of())
        for tool, arguments in (
            ("query", {"table": "people"}),
            ("query", {"table": "incidents", "limit": 11}),
            ("drop-table", INCIDENTS),
        ):
            assert await tools.refusal(tool, arguments, tools.shown(access, tool)) == "out_of_scope"
        for arguments in (
            {},
            {"table": 7},
            {"table": "incidents", "limit": "many"},
            {"table": "incidents", "limit": None},
        ):
            assert await tools.refusal("query", arguments, tools.shown(access, "query")) == "malformed"
        assert await history(tools) == []
        shown = tools.shown(access, "query")
        assert not (await tools.raw("query", {**INCIDENTS, "limit": 10}, shown)).is_error  # nothing of it was used up


async def test_no_token_no_call_and_what_only_describes_the_server_is_for_all(way: str) -> None:
    async with connected(way) as tools:
        names = {tool.name for tool in (await tools.client.list_tools()).tools}
        assert names == {"query", "drop-table", "wait", "nested", "history", "shell"}
        assert [str(one.uri) for one in (await tools.client.list_resources()).resources] == ["notes://today"]
        assert await tools.refusal("query", INCIDENTS, {}) == "unauthenticated"
        assert await history(tools) == []


async def test_invariant_6_a_tool_without_a_rule_and_whatever_else_is_done_is_refused(way: str) -> None:
    """Invariant 6: whoever asks, and whatever with."""
    async with connected(way) as tools:
        shell = Action("db.shell", "https://db.acme.test", AUDIENCE)
        for tool in ("shell", "no-such-tool", "../query", "query\n", "q" * 5000):
            assert await tools.refusal(tool, {"command": "id"}, tools.shown(token(shell), tool)) == "out_of_scope"
        with pytest.raises(MCPError) as caught:
            await tools.client.read_resource("notes://today")
        assert (caught.value.code, caught.value.data["reason"]) == (CODE, "out_of_scope")
        assert await history(tools) == []


async def test_tokens_and_proofs_count_once(way: str) -> None:
    async with connected(way) as tools:
        access, lasting = token(query_of()), token(query_of(), use="ttl")
        assert not (await tools.raw("query", INCIDENTS, tools.shown(access, "query"))).is_error
        assert await tools.refusal("query", INCIDENTS, tools.shown(access, "query")) == "already_used"
        shown = tools.shown(lasting, "query")
        assert not (await tools.raw("query", INCIDENTS, shown)).is_error
        assert await tools.refusal("query", INCIDENTS, shown) == "proof_replayed"
        assert not (await tools.raw("query", INCIDENTS, tools.shown(lasting, "query"))).is_error


async def test_a_token_is_worth_nothing_elsewhere_or_in_other_hands(way: str) -> None:
    async with connected(way) as tools:
        foreign = Action(
            "db.query", "https://db.acme.test/incidents", "spiffe://acme.test/service/other", {"limit": 10}
        )
        assert await tools.refusal("query", INCIDENTS, tools.shown(token(foreign), "query")) == "wrong_audience"
        access = token(query_of(), use="ttl")
        for wrong in (
            {"htu": f"{AUDIENCE}/drop-table"},
            {"htu": f"{AUDIENCE}/query" if tools.http else URL},
            {"htu": f"{URL}/query"},
            {"htm": "GET"},
            {"ath": "x"},
            {"now": now() - timedelta(minutes=2)},
        ):
            assert (
                await tools.refusal("query", INCIDENTS, tools.shown(access, "query", **wrong)) == "invalid_dpop_proof"
            )
        bearer = {"authorization": f"Bearer {access}"}
        assert await tools.refusal("query", INCIDENTS, bearer) == "key_mismatch"
        assert await tools.refusal("query", INCIDENTS, {"authorization": f"DPoP {access}"}) == "invalid_dpop_proof"
        other = {"cnf": {"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}}
        assert (
            await tools.refusal("query", INCIDENTS, tools.shown(token(query_of(), **other), "query")) == "key_mismatch"
        )
        expired = token(query_of(), now=now() - timedelta(minutes=2))
        assert await tools.refusal("query", INCIDENTS, tools.shown(expired, "query")) == "expired"
        assert await history(tools) == []


async def test_forged_and_oversized_credentials_are_refused(way: str) -> None:
    async with connected(way) as tools:
        access = token(query_of(), use="ttl")
        shown = tools.shown(access, "query")
        head, payload, _ = access.split(".")
        another = token(query_of()).rpartition(".")[2]
        for forged, reason in (
            ({"authorization": f"DPoP {head}.{payload}.{another}"}, "unauthenticated"),
            ({"authorization": f"DPoP {head}.{payload}."}, "malformed"),
            ({"authorization": f"DPoP {access}{'A' * 20_000}"}, "malformed"),
            ({"authorization": f"Basic {access}"}, "malformed"),
            ({"authorization": access}, "malformed"),
            ({"authorization": ""}, "malformed"),
            ({"dpop": "A" * 20_000}, "invalid_dpop_proof"),
        ):
            assert await tools.refusal("query", INCIDENTS, shown | forged) == reason, forged
        large = {"table": "x" * 3000}
        assert (
            await tools.refusal("query", large, shown | {"dpop": tools.shown(access, "query")["dpop"]}) == "malformed"
        )
        assert await history(tools) == []


async def test_a_credential_counts_in_its_own_place_alone(way: str) -> None:
    """Over HTTP in the headers, elsewhere in `_meta`; in two places it is none, and no other type is."""
    async with connected(way) as tools:
        shown = tools.shown(token(query_of(), use="ttl"), "query")
        in_meta = {f"action-broker/{name}": value for name, value in shown.items()}
        if tools.http:
            assert await tools.refusal("query", INCIDENTS, {}, meta=in_meta) == "malformed"
            assert await tools.refusal("query", INCIDENTS, shown, meta=in_meta) == "malformed"
        else:
            for wrong in (7, None, [shown["dpop"]], {"a": 1}):
                reason = "invalid_dpop_proof" if wrong is None else "malformed"
                assert (
                    await tools.refusal("query", INCIDENTS, {}, meta=in_meta | {"action-broker/dpop": wrong}) == reason
                )
            bare = {"authorization": shown["authorization"], "dpop": shown["dpop"]}
            assert await tools.refusal("query", INCIDENTS, {}, meta=bare) == "unauthenticated"
        result = await tools.raw("query", INCIDENTS, tools.shown(token(query_of()), "query"), meta={"acme.test/x": 1})
        assert not result.is_error


async def test_a_tool_does_not_lend_its_admission_to_another(way: str) -> None:
    """A call inside a call was admitted by nobody."""
    async with connected(way) as tools:
        nested = Action("db.nested", "https://db.acme.test/incidents", AUDIENCE)
        with pytest.raises(MCPError) as caught:
            await tools.call("nested", INCIDENTS, held(nested))
        assert caught.value.data["reason"] == "out_of_scope"
        assert await history(tools) == []


async def test_invariant_8_a_call_whose_credential_expires_is_cancelled(way: str) -> None:
    """Invariant 8: also where the tool told of its progress, and its caller still listens."""
    async with connected(way) as tools:
        heard: list[float] = []

        async def progress(done: float, _: float | None, __: str | None) -> None:
            heard.append(done)

        shown = tools.shown(nearly_dead(WAIT), "wait")
        if tools.http:
            tools.http.headers.update(shown)
        meta = None if tools.http else {f"action-broker/{name}": value for name, value in shown.items()}
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(MCPError) as caught:
                await tools.client.call_tool("wait", INCIDENTS, progress_callback=progress, meta=meta)
        assert (caught.value.code, caught.value.data["reason"]) == (CODE, "expired")
        assert heard == ([] if "json" in way else [1])
        assert await history(tools) == ["wait was cancelled"]

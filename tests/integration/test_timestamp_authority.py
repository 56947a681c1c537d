"""Sigstore's timestamp-server, for real: our client believes it, and only it."""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from support.sigstore_tools import TimestampServer, timestamp_authority
from support.timestamps import Tsa

from attestors.rfc3161 import TimestampError, TimestampRoot, verify_timestamp
from broker.errors import Reason, Unavailable
from broker.signing.timestamp import TimestampAuthority

pytestmark = pytest.mark.cosign

SIGNATURE = b"a signature"
SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
def server() -> Iterator[TimestampServer]:
    with timestamp_authority() as found:
        yield found


async def test_a_real_authority_proves_the_time(server: TimestampServer) -> None:
    before = datetime.now(UTC)
    async with TimestampAuthority(server.url, [server.root]) as authority:
        response = await authority.stamp(SIGNATURE)
    proven = verify_timestamp(response, SIGNATURE, [server.root])
    assert before - SECOND <= proven <= datetime.now(UTC) + SECOND
    with pytest.raises(TimestampError):
        verify_timestamp(response, SIGNATURE + b"!", [server.root])


async def test_its_root_is_enough_where_the_answer_has_the_rest_of_the_chain(server: TimestampServer) -> None:
    async with TimestampAuthority(server.url, [server.root]) as authority:
        response = await authority.stamp(SIGNATURE)
    above = TimestampRoot(chain=server.root.chain[1:])  # the intermediate and the root
    assert verify_timestamp(response, SIGNATURE, [above])


async def test_each_answer_is_a_new_one(server: TimestampServer) -> None:
    async with TimestampAuthority(server.url, [server.root]) as authority:
        first, second = [await authority.stamp(SIGNATURE) for _ in range(2)]
    assert first != second


async def test_it_is_not_believed_by_another_chain(server: TimestampServer) -> None:
    async with TimestampAuthority(server.url, [Tsa.made(datetime.now(UTC)).root]) as authority:
        with pytest.raises(Unavailable, match="not signed by a trusted authority") as error:
            await authority.stamp(SIGNATURE)
    assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE


async def test_another_place_on_it_is_no_authority(server: TimestampServer) -> None:
    for path in ("ping", "api/v1/timestamp/certchain", "nothing"):
        async with TimestampAuthority(f"{server.base}/{path}", [server.root]) as authority:
            with pytest.raises(Unavailable, match="status 40") as error:
                await authority.stamp(SIGNATURE)
        assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE


async def test_when_it_is_gone_there_is_no_timestamp(server: TimestampServer) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody answers there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/api/v1/timestamp"
        async with TimestampAuthority(url, [server.root]) as authority:
            with pytest.raises(Unavailable) as error:
                await authority.stamp(SIGNATURE)
    assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE

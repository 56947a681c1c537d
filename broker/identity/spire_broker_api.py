"""What SPIRE says, now, of a process on this node: the SPIFFE IDs it is entitled to.

A client of the SPIFFE Broker API. `FetchJWTSVID` makes the agent attest the process anew at each call. We ask for an
audience that nobody accepts, verify the answer's tokens like any JWT-SVID, keep the ID and drop the token.
Source: https://github.com/spiffe/spiffe (standards/brokerapi.proto); SPIRE 1.15.3's codes are not the standard's, so
every error but "could not ask" means "not attested".
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

import grpc

from attestors.contract import AttestationFailed, AttestationUnavailable
from broker._proto.spiffe_broker import brokerapi_pb2, brokerapi_pb2_grpc
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_context import own_svid
from broker.identity.tls_dial import Matcher, SpiffeDialer
from broker.identity.trust import TrustSnapshot
from broker.identity.turns import Turns

ENTITLEMENT_AUDIENCE = "urn:action-broker:entitlement"
"""Reserved: a token for it says what a process is entitled to and opens nothing. identify.py wants the issuer's URL."""

METADATA = (("broker.spiffe.io", "true"),)  # required by the standard, against requests forged by a third party
MAX_MESSAGE = 1024 * 1024
REMEMBERED = 4096  # verified tokens: about as many processes on one node
DRAIN_S = 5.0
_UNASKED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,  # also when the agent is not who it should be: the dialer cut it off
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # by our own side, when a channel is put away
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entitlement:
    """An ID that the process may have, as of now. expires_at: of the JWT-SVID that proved it."""

    spiffe_id: SpiffeId
    expires_at: datetime


def any_agent(spiffe_id: SpiffeId) -> bool:
    """Matches the agents of a SPIRE server, whatever way they attested: `/spire/agent/…`."""
    return spiffe_id.path.startswith("/spire/agent/")


class SpireBrokerApi:
    """Asks the agent on this node. Use as an async context manager, or `start()` and `close()`.

    socket: `unix:/path`, `unix:///path` or `tcp://host:port` (SPIFFE_BROKER_SOCKET). agent: its SPIFFE ID, or a matcher
    for IDs of our own trust domain. deadline_s: for one question; who comes while it is asked about the same process
    waits for the next one, which is asked for all of them.
    """

    def __init__(
        self,
        socket: str,
        snapshot: Callable[[], TrustSnapshot],
        clock: Callable[[], datetime],
        *,
        agent: SpiffeId | Matcher = any_agent,
        deadline_s: float = 2.0,
    ) -> None:
        self._dialer = SpiffeDialer(socket, agent, snapshot, clock)
        self._snapshot = snapshot
        self._clock = clock
        self._deadline_s = deadline_s
        self._target = ""
        self._channel: tuple[int, grpc.aio.Channel, brokerapi_pb2_grpc.APIAsyncStub] | None = None
        self._draining: set[asyncio.Task[None]] = set()
        self._remembered: OrderedDict[tuple[bytes, int], Entitlement] = OrderedDict()
        self._questions = Turns(self._ask)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def last_error(self) -> str | None:
        """Why the newest connection to the agent failed, for `doctor`."""
        return self._dialer.last_error

    async def start(self) -> None:
        """Connects at the first question, so the agent may come up later than we do."""
        self._target = await self._dialer.start()

    async def close(self) -> None:
        """Questions under way end unanswered."""
        await self._questions.close()
        if self._channel is not None:
            await self._channel[1].close()
            self._channel = None
        for task in self._draining:
            task.cancel()
        if self._draining:
            await asyncio.wait(self._draining)
        await self._dialer.close()

    async def fetch(self, pid: int) -> tuple[Entitlement, ...]:
        """What the process with this PID, in the agent's PID namespace, is entitled to now: one ID or more, by ID.

        SPIRE is asked after this is called, never before; once for all who call it meanwhile.

        Raises: Refused(not_attested) when SPIRE says nothing good of it, or something that does not verify;
        Unavailable when SPIRE could not be asked in time.
        Not checked: that the PID still is the process that was meant. Look at its pidfd after this returns.
        """
        if not 0 < pid < 2**31:
            raise Refused(Reason.NOT_ATTESTED, f"{pid} is no process")
        found = await self._questions.ask(pid)
        if isinstance(found, BrokerError):  # one each: raising an error changes it
            raise (Refused if isinstance(found, Refused) else Unavailable)(found.reason, found.detail) from found
        return found

    async def _ask(self, pid: int) -> tuple[Entitlement, ...] | Refused | Unavailable:
        request = brokerapi_pb2.FetchJWTSVIDRequest(audience=[ENTITLEMENT_AUDIENCE])
        request.reference.reference.Pack(brokerapi_pb2.WorkloadPIDReference(pid=pid))
        try:
            answer = await self._stub().FetchJWTSVID(request, metadata=METADATA, timeout=self._deadline_s)
            found = {self._verify(svid) for svid in answer.svids}
        except grpc.aio.AioRpcError as error:
            return self._explain(pid, error)
        except (Refused, Unavailable) as error:
            return error
        if not found:
            return Refused(Reason.NOT_ATTESTED, f"SPIRE has no registration entry for process {pid}")
        return tuple(sorted(found, key=lambda entitlement: str(entitlement.spiffe_id)))

    def _stub(self) -> "brokerapi_pb2_grpc.APIAsyncStub":
        """On a channel of the newest snapshot: a long connection would rest on an SVID of ours that has since ended."""
        revision = self._snapshot().revision
        if self._channel is None or self._channel[0] != revision:
            if self._channel is not None:
                task = asyncio.create_task(self._channel[1].close(DRAIN_S))
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)
            channel = _channel(self._target)
            self._channel = (revision, channel, brokerapi_pb2_grpc.APIStub(channel))
        return self._channel[2]

    def _explain(self, pid: int, error: grpc.aio.AioRpcError) -> Refused | Unavailable:
        said = f"{error.code().name} {error.details()}"
        if error.code() in _UNASKED:
            why = self._dialer.last_error or said
            return Unavailable(Reason.ATTESTATION_UNAVAILABLE, f"SPIRE's Broker API: {why}")
        return Refused(Reason.NOT_ATTESTED, f"SPIRE's Broker API, asked about process {pid}: {said}")

    def _verify(self, svid: brokerapi_pb2.JWTSVID) -> Entitlement:
        """What a token says, remembered by its hash and the snapshot: the agent hands the same one out again."""
        snapshot, now = self._snapshot(), self._clock()
        key = (hashlib.sha256(svid.svid.encode()).digest(), snapshot.revision)
        known = self._remembered.get(key)
        if known is None:
            known = self._remembered[key] = _entitlement(svid, snapshot, now)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        if now >= known.expires_at or str(known.spiffe_id) != svid.spiffe_id:
            raise Refused(Reason.NOT_ATTESTED, "SPIRE's Broker API gave a token that has expired or is another ID's")
        return known


def _entitlement(svid: brokerapi_pb2.JWTSVID, snapshot: TrustSnapshot, now: datetime) -> Entitlement:
    try:
        verified = verify_jwt_svid(svid.svid, snapshot, now, audience=ENTITLEMENT_AUDIENCE)
    except Refused as error:
        raise Refused(
            Reason.NOT_ATTESTED, f"SPIRE's Broker API gave a token that is refused: {error.detail}"
        ) from error
    if verified.spiffe_id.trust_domain != own_svid(snapshot).spiffe_id.trust_domain:
        raise Refused(Reason.NOT_ATTESTED, f"SPIRE's Broker API named {verified.spiffe_id}, of another trust domain")
    return Entitlement(spiffe_id=verified.spiffe_id, expires_at=verified.expires_at)


def _channel(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.default_authority", "localhost"),
            ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, so a new check of the agent
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.http2.bdp_probe", 0),  # a ping beside each answer, to size windows that an SVID never fills
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),  # an agent that comes back is asked again within a second
        ],
    )


class AttestorEntitlements:
    """`SpireBrokerApi` in the words of attestors/contract.py, for attestors/spire.py, which knows no broker."""

    def __init__(self, api: SpireBrokerApi) -> None:
        self._api = api

    async def fetch(self, pid: int) -> Sequence[Entitlement]:
        """As `SpireBrokerApi.fetch`. Raises: AttestationFailed, AttestationUnavailable."""
        try:
            return await self._api.fetch(pid)
        except Refused as error:
            raise AttestationFailed(error.detail) from error
        except Unavailable as error:
            raise AttestationUnavailable(error.detail) from error

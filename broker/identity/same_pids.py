"""Whether the SPIRE agent means the same processes by the same numbers as we do.

A PID is a number in a PID namespace. In a container without the host's namespace our PID 42 is another process than the
agent's, and what it says of 42 would be the identity of whoever has that number there. The agent knows us twice: by the
SVID it gave us, for which the kernel translated our PID, and by the PID that we name ourselves. Both must agree.
"""

import os
from collections.abc import Callable, Sequence

from attestors.contract import AttestationFailed, AttestationUnavailable
from attestors.spire import Entitlement, Entitlements
from broker.identity.tls_context import own_svid
from broker.identity.trust import TrustSnapshot


class SamePids:
    """Passes questions on to `entitlements` once the agent has shown that it counts PIDs as we do.

    It has to show it again after it could not be asked: another one may have taken its place.
    """

    def __init__(self, entitlements: Entitlements, snapshot: Callable[[], TrustSnapshot]) -> None:
        self._entitlements, self._snapshot = entitlements, snapshot
        self._shown = False

    async def fetch(self, pid: int) -> Sequence[Entitlement]:
        """As `Entitlements.fetch`. Raises: AttestationFailed; AttestationUnavailable also when PIDs are not ours."""
        try:
            if not self._shown:
                await self.check()
            return await self._entitlements.fetch(pid)
        except AttestationUnavailable:
            self._shown = False
            raise

    async def check(self) -> None:
        """Asks about ourselves. Raises: AttestationUnavailable when the agent says that our PID is somebody else."""
        own = str(own_svid(self._snapshot()).spiffe_id)
        try:
            found = {str(entitlement.spiffe_id) for entitlement in await self._entitlements.fetch(os.getpid())}
        except AttestationFailed:
            found = set()
        if own not in found:
            raise AttestationUnavailable(
                f"the agent does not know PID {os.getpid()} as {own}: run the broker in the agent's PID namespace "
                "(Kubernetes: hostPID: true), under the entry that gives it its SVID"
            )
        self._shown = True

"""Envoy with its SVID and bundle from a real SPIRE agent, as deploy/envoy/README.md shows it."""

import asyncio
import os
import re
import ssl
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.envoy import DEPLOY, HOST, Answer, Edge, serving
from support.envoy_calls import ISSUER, REFUND, TABLE, bearer, now, refund, token
from support.issuer import guard_for, x5t
from support.pki import CA
from support.processes import PATIENCE_S
from support.spire import Spire, identity_from

from broker.identity.trust import TrustSnapshot

pytestmark = pytest.mark.spire

FILES = re.compile(r" *# Files that are replaced.*?(?=          filters:)", re.DOTALL)


def from_spire(spire: Spire, folder: Path) -> dict[str, str]:
    """What the README says to write, and where."""
    shipped = (DEPLOY / "envoy.yaml").read_text()
    secrets, cluster = re.findall(r"^```yaml\n(.*?)^```$", (DEPLOY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (files,) = FILES.findall(shipped)
    socket = "/run/spire/agent/public/api.sock"
    assert cluster.count(socket) == 1
    cluster = cluster.replace(socket, spire.workload_api.removeprefix("unix:").replace("//", "/"))
    return {
        files.replace("/run/action-broker/tls", f"{folder}/tls"): secrets,
        "  clusters:\n": f"  clusters:\n{cluster}",
    }


def client_tls(snapshot: TrustSnapshot, folder: Path) -> ssl.SSLContext:
    """Of who the snapshot says that we are."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    for bundle in snapshot.bundles.values():
        for authority in bundle.x509_authorities:
            context.load_verify_locations(cadata=authority.public_bytes(Encoding.DER))
    own, file = snapshot.own, folder / "own.pem"
    chain = b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in own.chain)
    key = ssl.DER_cert_to_PEM_cert(own.private_key_pkcs8).replace("CERTIFICATE", "PRIVATE KEY").encode()
    file.write_bytes(chain + key)
    context.load_cert_chain(file)
    return context


async def act(edge: Edge, access: str, tls: ssl.SSLContext) -> Answer:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as http,
        http.post(edge.origin + REFUND, headers=[("host", HOST), *bearer(access)], json={"amount": 30}) as response,
    ):
        return Answer.of(response.status, response.headers, await response.read())


async def shown(edge: Edge, tls: ssl.SSLContext) -> x509.Certificate:
    """What Envoy shows of itself now."""
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=tls)
    try:
        return x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    finally:
        writer.transport.abort()


async def test_envoy_has_its_svid_and_bundle_from_spire_and_follows_its_renewals(new_spire, tmp_path: Path) -> None:
    spire: Spire = new_spire(broker=False, x509_ttl=20)
    spire.create_entry("service/orders", uid=os.geteuid())
    async with identity_from(spire) as ours:
        guard = await guard_for(ISSUER, clock=now)
        async with serving(guard, TABLE, tmp_path, CA(now=now()), from_spire(spire, tmp_path)) as edge:
            tls = client_tls(ours.snapshot(), tmp_path)
            first = await shown(edge, tls)
            names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.UniformResourceIdentifier) == [spire.id("service/orders")]
            bound = token(refund(), cnf=x5t(ours.snapshot().own.chain[0]))
            assert (await act(edge, bound, tls)).status == 200
            with pytest.raises(aiohttp.ClientError):
                await act(edge, bound, edge.tls())  # trusts another CA than SPIRE's
            async with asyncio.timeout(PATIENCE_S):  # SPIRE renews at half of the 20 s
                while (await shown(edge, tls)).serial_number == first.serial_number:
                    pass  # each look is a handshake

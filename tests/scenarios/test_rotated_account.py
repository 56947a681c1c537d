"""A service keeps its SPIFFE ID and loses a permission: its token dies in its hand, and so does every other way in."""

import re
import time

from support.postgres import postgres
from support.receiving import claims_of
from support.scenario import Service, joins, policies_of, refusals, service, write_policy
from support.shop import say
from support.whole_broker import Whole, eventually, whole_broker

from broker.client import ActionToken, Client, Refused
from broker.errors import Reason
from broker.ledger.records import Intent, Refusal

EXAMPLE = "rotated-account"
ACCOUNTS, BASE = "spiffe://acme.test/service/accounts", "https://accounts.acme.test"
OLD, NEW = "/v1/accounts/17", "/v2/accounts/17"
DATABASE = (
    "CREATE TABLE accounts (id text PRIMARY KEY, name text, iban text, balance int)",
    "INSERT INTO accounts VALUES ('17', 'Dora', 'DE02120300000000202051', 1250)",
    "CREATE ROLE accounts LOGIN",
    "GRANT SELECT ON accounts TO accounts",
)


async def ask(client: Client, name: str, path: str) -> ActionToken:
    return await client.request(name, BASE + path, ACCOUNTS)


async def why_not(client: Client, name: str, path: str) -> str:
    """Why the broker gives no token; "" where it does."""
    try:
        await ask(client, name, path)
    except Refused as refused:
        return refused.reason
    return ""


async def test_an_account_is_rotated_and_what_was_given_to_it_is_dead_at_the_service_itself() -> None:
    with whole_broker(policies_of(EXAMPLE)) as whole, postgres(*DATABASE) as database:
        billing, archive = joins(whole, "service/billing"), joins(whole, "service/archive")
        program = (f"{EXAMPLE}/accounts.py", "--database", database.url("accounts"))
        async with (
            service(whole, "service/accounts", BASE, *program) as accounts,
            whole.client(billing) as as_billing,
            whole.client(archive) as as_archive,
        ):
            say(
                f"The accounts service has its data in PostgreSQL {database.version}. Billing holds a token for its old"
            )
            say("endpoint, which shows everything. So does the archive.")
            old, kept = await ask(as_billing, "accounts.read-all", OLD), await ask(as_archive, "accounts.read-all", OLD)
            shown = (await accounts.get(OLD, old)).body
            assert shown == {
                "account": {"name": "Dora", "iban": "DE02120300000000202051", "balance": 1250},
                "told": billing,
            }
            say(f"    GET {OLD}: {shown['account']}")

            await _cut_off(whole, accounts, old)
            refused = await accounts.get(OLD, old)
            assert (refused.status, old.is_usable()) == (403, True)
            say("Billing tries again, with another proof by its key: denied. The token has not expired:")
            say(f"it would have been good until {old.expires_at:%H:%M:%S}.")

            assert await why_not(as_billing, "accounts.read-all", OLD) == Reason.DENIED
            say("It asks the broker for another token for the old endpoint: denied.")
            new = await ask(as_billing, "accounts.read", NEW)
            answer = await accounts.get(NEW, new)
            assert answer.body == {"account": {"name": "Dora", "balance": 1250}, "told": billing}
            say("It is attested as ever, under the same SPIFFE ID, and gets a token for the new endpoint:")
            say(f"    GET {NEW}: {answer.body['account']}, told {billing}")
            assert await accounts.why(OLD, new) == Reason.OUT_OF_SCOPE
            say("It shows that token at the old endpoint: out_of_scope.")
            refused = await accounts.get(OLD)
            assert (refused.status, refused.reason) == (401, Reason.UNAUTHENTICATED)
            say("It calls the old endpoint without a token: unauthenticated. To be billing is not enough.")

            answer = await accounts.get(OLD, kept)
            assert (answer.status, answer.body["told"]) == (200, archive)
            say("The archive's token for the old endpoint works as before: nobody else was cut off.")
            asked = [one for one in database.statements("accounts") if "iban" in one]
            assert len(asked) == accounts.served[OLD]
            say(f"The old endpoint asked the database {len(asked)} times: once for each answer, never for a refusal.")
        _check_the_ledger(whole, billing, old)


async def _cut_off(whole: Whole, accounts: Service, token: ActionToken) -> None:
    file = whole.broker.folder / "policy" / "accounts.cedar"
    cut, found = re.subn(r'@id\("billing-reads-all"\)[^;]*;', "", file.read_text())
    assert found == 1
    assert await accounts.why(OLD, token) == ""
    write_policy(whole, file.name, cut)
    began = time.monotonic()
    await eventually(lambda: accounts.why(OLD, token), Reason.DENIED)
    took = time.monotonic() - began
    say("The account is rotated: somebody deletes the permit `billing-reads-all` from the policy folder.")
    say(f"{took:.1f} s later the accounts service refuses what billing holds (the folder is looked at each second).")


def _check_the_ledger(whole: Whole, billing: str, token: ActionToken) -> None:
    records = whole.records()
    given = [one.to_action().name for one in records if isinstance(one, Intent) and one.principal == billing]
    assert given == ["accounts.read-all", "accounts.read"]
    (died,) = refusals(whole)
    assert (died.jtis, died.reason) == ((claims_of(token.access_token).jti,), Reason.DENIED)
    assert died.cause.startswith("policy:sha256:")
    (refusal,) = [one for one in records if isinstance(one, Refusal) and one.principal == billing]
    assert (refusal.reason, refusal.action) == (Reason.DENIED, "accounts.read-all")
    say("The ledger has billing's two tokens, the one that died and of which change, and the request that was denied:")
    say(f"    {died.at:%H:%M:%S} {died.reason} {died.cause[:26]}…")

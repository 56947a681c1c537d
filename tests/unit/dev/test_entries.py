"""Registration entries of the embedded trust domain are bounded, and go with what they are for."""

import os

import pytest
from support.processes import script
from support.trust_domain import this_process

from broker.dev import entries as under_test
from broker.dev.entries import Entries
from broker.errors import Invalid
from broker.identity.spiffe_id import TrustDomain

ID = "spiffe://acme.test/build"


async def test_no_more_entries_are_kept_than_there_may_be_and_those_of_processes_go_with_them(monkeypatch):
    monkeypatch.setattr(under_test, "MAX_ENTRIES", 2)
    entries = Entries(TrustDomain.parse("acme.test"), lambda: None)
    kept = entries.create(ID, [this_process(os.getpid())])
    with script("tell('ready'); hear()") as child:
        assert await child.line() == "ready"
        entries.create(ID, [this_process(child.pid)])
        with pytest.raises(Invalid, match="delete one first"):
            entries.create(ID, ["unix:uid:1600"])
    made = entries.create(ID, ["unix:uid:1600"])
    with pytest.raises(Invalid, match="delete one first"):
        entries.create(ID, ["unix:uid:1601"])
    assert entries.delete(kept.entry_id)
    assert entries.create(ID, ["unix:uid:1601"]).entry_id != made.entry_id

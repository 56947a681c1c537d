"""Which cosign and timestamp-server the tests get."""

import pytest
from tools import build_sigstore
from tools.go_tools import on_path


@pytest.fixture
def found(tmp_path, monkeypatch):
    """`found(cosign="3.1.3", …)` puts programs of these versions first on PATH, and gives what is then taken."""

    def look(**versions):
        for program, version in versions.items():
            file = tmp_path / program.replace("_", "-")
            file.write_text(f'#!/bin/sh\necho "GitVersion:    v{version}" >&2\n')
            file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return on_path(tuple(build_sigstore.WANTED), build_sigstore._is_wanted)

    return look


def test_programs_of_the_right_versions_on_path_are_taken(found, tmp_path):
    assert found(cosign="3.1.10", timestamp_server="2.1.2") == tmp_path


@pytest.mark.parametrize(
    "versions",
    [
        {"cosign": "2.6.1", "timestamp_server": "2.1.2"},
        {"cosign": "3.1.3", "timestamp_server": "1.2.9"},
        {"cosign": "3.1.3-rc1", "timestamp_server": "2.1.2"},
        {"cosign": "13.1.3", "timestamp_server": "2.1.2"},
        {"cosign": "3.1.3"},
    ],
    ids=["old-cosign", "old-server", "suffix", "prefix", "one-alone"],
)
def test_others_are_left_aside(found, versions):
    assert found(**versions) is None

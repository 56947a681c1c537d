"""Which SPIRE the tests get."""

import pytest
from tools import build_spire
from tools.go_tools import as_numbers


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("1.15.3")` puts a server and an agent of that version first on PATH."""

    def put(server, agent, folders=("both", "both")):
        for program, version, folder in zip(build_spire.PROGRAMS, (server, agent), folders, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            file = tmp_path / folder / program
            file.write_text(f"#!/bin/sh\necho {version} >&2\n")
            file.chmod(0o755)
        monkeypatch.setenv("PATH", ":".join([*(str(tmp_path / folder) for folder in set(folders)), "/usr/bin", "/bin"]))
        return tmp_path / folders[0]

    return put


@pytest.mark.parametrize("version", ["1.15.2", "1.15.3-dev-unk", "1.15.10"])
def test_a_spire_of_the_right_version_on_path_is_taken(install, version):
    folder = install(version, version)
    assert build_spire._on_path() == folder


@pytest.mark.parametrize(
    ("server", "agent", "folders"),
    [
        ("1.15.3", "1.14.9", ("both", "both")),
        ("1.14.9", "1.15.3", ("both", "both")),
        ("11.15.3", "1.15.3", ("both", "both")),
        ("1.150.3", "1.15.3", ("both", "both")),
        ("1.15.3", "1.15.3", ("here", "there")),
    ],
    ids=["old-agent", "old-server", "suffix", "prefix", "two-folders"],
)
def test_another_spire_on_path_is_left_aside(install, server, agent, folders):
    install(server, agent, folders)
    assert build_spire._on_path() is None


def test_versions_of_go_are_compared_as_numbers():
    assert as_numbers("1.26.10") > as_numbers("1.26.6") > as_numbers("1.9.22")
    assert as_numbers("1.27.3-custom X:exp") == (1, 27, 3)

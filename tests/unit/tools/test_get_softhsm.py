"""Which SoftHSM2 the tests get. apt-get and dpkg-deb are stood in for by scripts: the archive is not ours to test."""

import os
from pathlib import Path

import pytest
from tools import get_softhsm

APT = """#!/bin/sh
for word; do case "$word" in *softhsm*) echo "$word" > "$word.deb";; esac; done
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr/bin" "$3/usr/lib/softhsm"
touch "$3/usr/bin/softhsm2-util" "$3/usr/lib/softhsm/{module}"
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name=script)` puts programs on PATH, beside the shell's own; there is nothing else."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("mkdir", "touch"):
        (programs / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(**scripts: str) -> Path:
        for name, script in scripts.items():
            file = programs / name.replace("_", "-")
            file.write_text(script)
            file.chmod(0o755)
        return programs

    return put


def install(root: Path, folder: str) -> Path:
    module = root / folder / get_softhsm.MODULE
    module.parent.mkdir(parents=True)
    module.touch()
    return module


@pytest.mark.parametrize("folder", get_softhsm.FOLDERS)
def test_what_is_installed_is_taken(tmp_path, machine, folder):
    program = machine(softhsm2_util="#!/bin/sh\n") / "softhsm2-util"
    module = install(tmp_path / "root", folder)
    assert get_softhsm.on_this_machine(tmp_path / "root") == get_softhsm.SoftHsmFiles(module=module, program=program)


def test_half_of_it_is_not_taken(tmp_path, machine):
    install(tmp_path / "root", get_softhsm.FOLDERS[0])
    assert get_softhsm.on_this_machine(tmp_path / "root") is None
    machine(softhsm2_util="#!/bin/sh\n")
    assert get_softhsm.on_this_machine(tmp_path / "empty") is None


def test_what_is_missing_is_brought_once_and_then_found(machine):
    programs = machine(apt_get=APT, apt_cache="#!/bin/sh\n", dpkg_deb=DPKG.format(module=get_softhsm.MODULE))
    assert not get_softhsm.is_here()
    brought = get_softhsm.softhsm()
    assert brought.module.is_file()
    assert brought.program == get_softhsm.cache() / "softhsm/usr/bin/softhsm2-util"
    (programs / "apt-get").unlink()
    assert get_softhsm.is_here()
    assert get_softhsm.softhsm() == brought


@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        ({}, "apt-get install softhsm2"),
        ({"apt_get": "#!/bin/sh\nexit 100\n", "dpkg_deb": DPKG, "apt_cache": "#!/bin/sh\n"}, "apt-get -q -o"),
        ({"apt_get": APT, "dpkg_deb": DPKG.format(module="other.so"), "apt_cache": "#!/bin/sh\n"}, "other paths"),
    ],
    ids=["no-debian", "download-fails", "other-package"],
)
def test_what_cannot_be_brought_is_said_and_nothing_is_half_there(machine, scripts, told):
    machine(**scripts)
    with pytest.raises(get_softhsm.CannotGet, match=told):
        get_softhsm.softhsm()
    assert not get_softhsm.is_here()


def test_package_lists_are_fetched_only_by_root(machine, monkeypatch):
    machine(apt_get=APT, apt_cache="#!/bin/sh\nexit 100\n", dpkg_deb=DPKG.format(module=get_softhsm.MODULE))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(get_softhsm.CannotGet, match="apt-get update"):
        get_softhsm.softhsm()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert get_softhsm.softhsm().module.is_file()

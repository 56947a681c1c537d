"""Credentials and webhook secrets in files: taken anew, or not at all, and never told."""

from pathlib import Path

import pytest

from broker.cli.ticket_secrets import Credential, HookSecrets

SECRET = "correct horse battery staple"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def wrote(file: Path, content: str | bytes, mode: int = 0o600) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("kind", "content", "header"),
    [
        ("basic", "broker:hunter2", "Basic YnJva2VyOmh1bnRlcjI="),
        ("basic", "broker:hunter2\n", "Basic YnJva2VyOmh1bnRlcjI="),
        ("basic", "broker:hunter2\r\n", "Basic YnJva2VyOmh1bnRlcjI="),
        ("basic", "b:a:b c ", "Basic YjphOmIgYyA="),
        ("basic", "b:", "Basic Yjo="),
        ("basic", "b:\N{POUND SIGN}", "Basic YjrCow=="),
        ("bearer", "ghp_0123~+/=\n", "Bearer ghp_0123~+/="),
    ],
)
def test_a_credential_is_the_value_of_authorization(file: Path, kind: str, content: str, header: str) -> None:
    assert Credential(wrote(file, content), kind)() == header


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("basic", ""),
        ("basic", "hunter2"),
        ("basic", ":hunter2"),
        ("basic", "broker:hunter2\nsecond:line"),
        ("basic", "broker:hunter2\x00"),
        ("basic", b"broker:hunter2\xff"),
        ("basic", "broker:" + "x" * 5000),
        ("bearer", ""),
        ("bearer", "two hunter2"),
        ("bearer", "hunter2\r\nX-Other: y"),
        ("bearer", "hunter2\N{POUND SIGN}"),
    ],
)
def test_what_is_no_credential_is_refused_and_not_told(file: Path, kind: str, content: str | bytes) -> None:
    with pytest.raises(ValueError) as refused:
        Credential(wrote(file, content), kind)
    assert str(file) in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_secrets_are_one_a_line(file: Path) -> None:
    assert HookSecrets(wrote(file, SECRET))() == (SECRET.encode(),)
    assert HookSecrets(wrote(file, f"{SECRET}\r\n\n{SECRET}2\n"))() == (SECRET.encode(), f"{SECRET}2".encode())


@pytest.mark.parametrize(
    "content", ["", "\n\n", "hunter2", f"{SECRET}\nhunter2", "\n".join([SECRET] * 5), "x" * 513, " " * 15]
)
def test_secrets_that_could_be_guessed_or_are_none_are_refused(file: Path, content: str) -> None:
    with pytest.raises(ValueError) as refused:
        HookSecrets(wrote(file, content))
    assert "hunter2" not in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o606])
def test_what_others_can_read_or_write_is_no_secret(file: Path, mode: int) -> None:
    for made in (lambda: Credential(file, "basic"), lambda: HookSecrets(file)):
        wrote(file, f"user:{SECRET}", mode)
        with pytest.raises(ValueError, match="chmod 600"):
            made()
        file.chmod(0o600)
        made()


def test_a_file_is_taken_anew_or_the_old_one_stays(file: Path) -> None:
    credential, secrets = Credential(wrote(file, f"user:{SECRET}"), "basic"), HookSecrets(file)
    before = credential(), secrets()
    wrote(file, "")
    for one in (credential, secrets):
        with pytest.raises(ValueError):
            one.reload()
    file.unlink()
    for one in (credential, secrets):
        with pytest.raises(ValueError):
            one.reload()
    assert (credential(), secrets()) == before
    wrote(file, f"user:{SECRET}2")
    credential.reload()
    secrets.reload()
    assert secrets() == (f"user:{SECRET}2".encode(),)
    assert credential() != before[0]

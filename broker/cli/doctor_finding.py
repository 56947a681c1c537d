"""What `doctor` says of one thing that it looked at."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. fix: what to do, empty where all is well."""

    what: str
    verdict: Verdict
    detail: str
    fix: str = ""


def ok(what: str, detail: str) -> Finding:
    """All is well."""
    return Finding(what=what, verdict="ok", detail=detail)


def broken(what: str, detail: str, fix: str) -> Finding:
    """Something does not work before this is mended."""
    return Finding(what=what, verdict="broken", detail=detail, fix=fix)


def warning(what: str, detail: str, fix: str) -> Finding:
    """It works, and will not always, or not as safely as it could."""
    return Finding(what=what, verdict="warning", detail=detail, fix=fix)

"""Whom a security event is about: a session, a workload, or both (`sub_id`).

Source: RFC 9493 section 3 (formats), OpenID Shared Signals Framework 1.0 section 3.3 (complex subjects) ("SSF" below).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from attestors.session import is_session_id
from broker.errors import Invalid
from broker.identity.event_refused import Err, EventRefused
from broker.identity.spiffe_id import SCHEME, SpiffeId

_COMPLEX: Final = "complex"
_WORKLOAD: Final = ("user", "application")  # SSF 3.3: members that can stand for a workload; users may be robotic
_FORMATS: Final[Mapping[str, tuple[str, ...]]] = {"opaque": ("id",), "uri": ("uri",), "iss_sub": ("iss", "sub")}
"""Those that can name a session or a workload of ours, with the members that each must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSubject:
    """session: its id; principal: a SPIFFE ID. "" where the event names none; both where nobody of ours is meant."""

    session: str = ""
    principal: str = ""


def parse_subject(sub_id: object, issuer: str) -> EventSubject:
    """Whom of ours it is about. issuer: ours, whose subjects (`iss_sub`) are SPIFFE IDs, as in our tokens.

    A simple subject is a session by its opaque id, or a workload by its URI or as a subject of ours. Of a complex one
    `session`, and `user` and `application` where they are a workload; its other members narrow nothing that we know.
    What is in a format that names nobody of ours is read over.

    Raises: EventRefused where it is no subject identifier, or its members contradict one another.
    """
    members = _object(sub_id)
    if members["format"] != _COMPLEX:
        session = _session(members)
        return EventSubject(session=session, principal="" if session else _principal(members, issuer))
    named = [name for name in members if name != "format"]
    if not named:
        raise _malformed("a complex subject has no member")
    parts = {name: _object(members[name]) for name in named if name in {"session", *_WORKLOAD}}
    session = _session(parts["session"]) if "session" in parts else ""
    if "session" in parts and not session:
        return EventSubject()  # a session of somebody else's, and of no other
    principals = {_principal(parts[name], issuer) for name in _WORKLOAD if name in parts} - {""}
    if len(principals) > 1:
        raise _malformed("user and application are two workloads, and a subject is one")
    return EventSubject(session=session, principal=next(iter(principals), ""))


def _object(found: object) -> Mapping[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("format"), str):
        raise _malformed("it is no object with a format")
    missing = [name for name in _FORMATS.get(found["format"], ()) if not isinstance(found.get(name), str)]
    if missing:
        raise _malformed(f"a subject in format {found['format']} lacks {' and '.join(missing)}")
    return found


def _session(members: Mapping[str, Any]) -> str:
    is_ours = members["format"] == "opaque" and is_session_id(members["id"])
    return str(members["id"]) if is_ours else ""


def _principal(members: Mapping[str, Any], issuer: str) -> str:
    text = ""
    if members["format"] == "uri":
        text = members["uri"]
    elif members["format"] == "iss_sub" and members["iss"] == issuer:
        text = members["sub"]
    if not text.lower().startswith(SCHEME):
        return ""
    try:
        return str(SpiffeId.parse(text))
    except Invalid as error:
        raise _malformed(error.detail) from error


def _malformed(why: str) -> EventRefused:
    return EventRefused(Err.INVALID_REQUEST, f"sub_id: {why}")

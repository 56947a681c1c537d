"""The body of a request, read within a size and a time."""

import asyncio

from aiohttp import web

from broker.errors import Invalid


class Unreadable(Invalid):
    """http: a status that says more than 400."""

    def __init__(self, http: int, detail: str) -> None:
        super().__init__(detail)
        self.http = http

    @property
    def leaves_a_rest(self) -> bool:
        """Whether more of the body is still to come, which nobody will read."""
        return self.http in {408, 413}


async def read_body(request: web.Request, most: int, seconds: float) -> bytes:
    """The body, of at most `most` bytes. Raises: Unreadable, Invalid."""
    too_large = Unreadable(413, f"the body is larger than {most} bytes")
    if (request.content_length or 0) > most:
        raise too_large
    body = b""
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise Unreadable(408, "the body did not come in time") from error
    except web.RequestPayloadError as error:
        raise Invalid("the body is not what its headers say") from error
    return body

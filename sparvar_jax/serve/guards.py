"""What stands before an application: the limit on bodies, and the API key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparvar_jax.serve.errors import Refused

GUARDED = "/v1/"


class BodyLimit:
    """Refuses bodies of more than so many bytes, told or sent, before they are parsed."""

    def __init__(self, app: ASGIApp, most: int, under: str = GUARDED):
        self._app, self._most, self._under = app, most, under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._under):
            await self._app(scope, receive, send)
            return
        told = _header(scope, b"content-length")
        if told.isdigit() and int(told[:20]) > self._most:
            await self._refusal().answer()(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has left in the middle
            body += message.get("body", b"")
            if len(body) > self._most:
                await self._refusal().answer()(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)

    def _refusal(self) -> Refused:
        return Refused(413, f"the body has more than {self._most} bytes", code="body_too_large")


class ApiKey:
    """Asks for `Authorization: Bearer KEY` under a path."""

    def __init__(self, app: ASGIApp, key: str, under: str = GUARDED):
        self._app, self._under = app, under
        self._expected = f"Bearer {key.strip()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(self._under)
        given = _header(scope, b"authorization") if guarded else b""
        if guarded and not hmac.compare_digest(given, self._expected):
            said = (
                "the API key is wrong" if given else "give the API key: Authorization: Bearer KEY"
            )
            await Refused(401, said, code="invalid_api_key").answer()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")

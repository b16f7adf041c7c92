"""Errors in the form of the OpenAI API, whatever raised them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("sparvar.serve")
BUSY_SECONDS = 1
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


class Refused(Exception):
    """An answer that is an error: its status, sentence, and the parameter it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def answer(self) -> JSONResponse:
        """The response a client sees."""
        headers = {"Retry-After": str(BUSY_SECONDS)} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, Any]:
        """The JSON of the response, as events of a stream carry it too."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _KINDS.get(self.status, usual)
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def wrong(param: str, message: str, code: str = "invalid_value") -> Refused:
    """A 400 about one field."""
    return Refused(400, message, param=param, code=code)


def overloaded(waiting: int) -> Refused:
    """The queue has no room."""
    message = f"the server is busy: {waiting} pictures wait already; try again later"
    return Refused(429, message, code="rate_limit_exceeded")


def too_slow(seconds: float) -> Refused:
    """A request took longer than it may."""
    return Refused(504, f"not drawn within {seconds:g} seconds", code="timeout")


def closing() -> Refused:
    """The server takes no more requests."""
    return Refused(503, "the server is shutting down", code="shutting_down")


def failed(error: BaseException) -> Refused:
    """Drawing failed; what is told outside says no more than that."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return Refused(503, "out of device memory: try a smaller size", code="out_of_memory")
    return Refused(500, "the picture could not be drawn", code="server_error")


def install(app: FastAPI) -> None:
    """Answer every error of an application in this form."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    del request
    assert isinstance(error, Refused)
    return error.answer()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    del request
    assert isinstance(error, RequestValidationError)
    return _wrong_field(error.errors()[0]).answer()


def _wrong_field(found: Mapping[str, Any]) -> Refused:
    """The first complaint of a validation as one sentence; never repeats what was sent."""
    kind = str(found["type"])
    if kind == "json_invalid" or not found["loc"][1:]:
        return Refused(400, "the body must be a JSON object of this request", code="invalid_json")
    name = str(found["loc"][1])[:64]
    code = _CODES.get(kind, "invalid_value")
    sentence = {
        "missing": f"Missing required parameter: '{name}'.",
        "extra_forbidden": f"Unknown parameter: '{name}'.",
    }.get(kind, f"Invalid value for '{name}': {found['msg']}.")
    return wrong(name, sentence, code)


async def _http(request: Request, error: Exception) -> JSONResponse:
    del request
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return Refused(error.status_code, str(error.detail), code=code).answer()


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return failed(error).answer()

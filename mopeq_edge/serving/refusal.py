"""What a client gets instead of an answer, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from mopeq_edge.errors import printable

BAD, UNAUTHORIZED, NOT_FOUND, TOO_LARGE, UNSUPPORTED, BROKEN, BUSY = 400, 401, 404, 413, 415, 500, 503


class RefusalError(Exception):
    """A request that is not answered. ``status`` is HTTP's, ``param`` the field at fault, ``code`` for programs."""

    def __init__(self, message: str, *, status: int = BAD, param: str | None = None, code: str | None = None) -> None:
        super().__init__(printable(message))
        self.status, self.param, self.code = status, param, code

    def as_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= BROKEN else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

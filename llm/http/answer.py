"""The answer to a POST: its head is there, and its body is read as it comes."""

from __future__ import annotations

import http.client

import urllib3
from urllib3.exceptions import ProtocolError


class Answer:
    """What urllib3 returns, but a body that is not compressed is read without it: for each token
    that takes as long as everything else that is done with it.

    Args:
        response: urllib3's, its body unread, with the connection that it came on.
        plain: what it has read the head with.
    """

    def __init__(
        self, response: urllib3.BaseHTTPResponse, plain: http.client.HTTPResponse | None
    ) -> None:
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._plain = None if "content-encoding" in response.headers else plain

    def read1(self, most_bytes: int) -> bytes:
        """Whatever of the body is there, decompressed, waiting for at least one byte.

        Returns:
            Empty at the end of the body; its connection was given back then.

        Raises:
            urllib3.exceptions.HTTPError: it broke off, or cannot be decompressed.
        """
        if self._plain is None:
            return self._response.read1(most_bytes, decode_content=True)
        try:
            data = self._plain.read1(most_bytes)
            # RFC 9112, section 8: what ends before its Content-Length is incomplete.
            if not data and (missing := self._plain.length):
                raise http.client.IncompleteRead(b"", missing)
        except (http.client.HTTPException, OSError) as error:
            raise ProtocolError(f"connection broken: {error!r}", error) from error
        if not data:
            self._plain.close()
            self._response.release_conn()
        return data

    def close(self) -> None:
        """Close its connection, unless that was given back."""
        self._response.close()

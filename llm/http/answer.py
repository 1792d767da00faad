"""The answer to a POST: its headers have arrived, and its body is read as it arrives."""

from __future__ import annotations

import http.client

import urllib3
from urllib3.exceptions import ProtocolError


class Answer:
    """One response. Its body is read from `http.client`, not from urllib3, if it is not compressed:
    for each token, urllib3 takes as long as everything else that the gateway does with the token.

    Args:
        response: urllib3's, its body unread, with its connection.
        plain: the response of `http.client` that urllib3 has read the headers with.
    """

    def __init__(
        self, response: urllib3.BaseHTTPResponse, plain: http.client.HTTPResponse | None
    ) -> None:
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._plain = None if "content-encoding" in response.headers else plain

    def read1(self, most_bytes: int) -> bytes:
        """Read what has arrived of the body, decompressed; wait for at least one byte.

        Returns:
            At most `most_bytes`; none at the end of the body, when the connection has gone back
            to its pool.

        Raises:
            urllib3.exceptions.HTTPError: the body broke off, or cannot be decompressed.
        """
        if self._plain is None:
            return self._response.read1(most_bytes, decode_content=True)
        try:
            data = self._plain.read1(most_bytes)
            # RFC 9112, section 8: a body that ends before its Content-Length is incomplete.
            if not data and (missing := self._plain.length):
                raise http.client.IncompleteRead(b"", missing)
        except (http.client.HTTPException, OSError) as error:
            raise ProtocolError(f"connection broken: {error!r}", error) from error
        if not data:
            self._plain.close()
            self._response.release_conn()
        return data

    def close(self) -> None:
        """Close the connection, unless it has gone back to its pool."""
        self._response.close()

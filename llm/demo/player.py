"""Acts out the steps of a scenario on a client's socket.

gevent.pywsgi reads the request and keeps the connection alive, but the response is written here:
pywsgi cannot write half a chunk, HTTP/1.0, or a broken body.

Sources: RFC 9110 and 9112.
"""

import email.utils
import errno
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import assert_never

import gevent
from gevent.pywsgi import WSGIHandler
from gevent.socket import wait_read

from llm.demo.posts import Ended, ReceivedPost
from llm.demo.steps import Close, Head, Pause, Raw, Reset, Send, Stall, Step


class Player:
    """One HTTP response, written step by step to the client's socket, in the caller's greenlet.

    Args:
        handler: has read the request; closes the connection afterwards if it must not be kept.
        post: where `sent_bytes` is counted; None for a request that is not recorded.
    """

    def __init__(self, handler: WSGIHandler, post: ReceivedPost | None) -> None:
        self._handler = handler
        self._post = post
        self._socket = handler.socket
        self._has_head = False
        self._is_chunked = False
        self._must_yield = False
        self._has_read_pipelined = False
        self._due = time.monotonic()

    def play(self, steps: Iterable[Step]) -> Ended:
        """Act out all steps, then end the body; the connection can serve another request.

        Returns:
            `FINISHED`, or `CUT` after a step that closed the connection.

        Raises:
            OSError: the client has disconnected.
        """
        for step in steps:
            match step:
                case Head():
                    self._write(self._head(step))
                case Send(data, stall):
                    self._send(data, stall)
                case Raw(data):
                    self._write(data)
                case Pause(seconds):
                    # From the time at which the last pause was due, so that the pace holds. From
                    # now if a slow client took longer, so that no burst catches up.
                    now = time.monotonic()
                    self._due = max(self._due + seconds, now)
                    self._wait(self._due - now)
                case Stall(seconds):
                    self._wait(seconds)
                case Close() | Reset():
                    if isinstance(step, Reset):
                        # Linger for 0 s: close() sends RST.
                        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self._handler.close_connection = True
                    return Ended.CUT
                case _:
                    assert_never(step)
        if not self._has_head:
            self._write(self._head(Head()))
        if self._is_chunked:
            self._write(b"0\r\n\r\n")
        return Ended.FINISHED

    def _send(self, data: bytes, stall: Stall | None) -> None:
        if not data:  # an empty chunk would end the body
            return
        if self._must_yield:
            self._wait(0)
        self._must_yield = True
        head = b"" if self._has_head else self._head(Head())
        framed = b"%x\r\n%s\r\n" % (len(data), data) if self._is_chunked else data
        if stall is None:
            self._write(head + framed)
            return
        half = len(framed) // 2
        self._write(head + framed[:half])
        self._wait(stall.seconds)
        self._write(framed[half:])

    def _head(self, head: Head) -> bytes:
        """Status line and headers; decides how the body is framed."""
        self._has_head = True
        handler = self._handler
        has_length = "Content-Length" in head.headers
        is_http11 = head.version == handler.request_version == "HTTP/1.1"
        self._is_chunked = is_http11 and not has_length
        if not (self._is_chunked or has_length):
            handler.close_connection = True
        headers = {**head.headers, "Date": email.utils.formatdate(usegmt=True)}
        if self._is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        if handler.close_connection:
            headers["Connection"] = "close"
        elif not is_http11:
            headers["Connection"] = "keep-alive"  # an HTTP/1.0 client asked for it
        lines = [f"{head.version} {head.status.value} {head.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            sent = self._socket.send(left)
            left = left[sent:]
            if self._post is not None:
                self._post.sent_bytes += sent
            self._handler.response_length += sent  # or gevent might answer, too

    def _wait(self, seconds: float | None) -> None:
        """Wait `seconds`; 0 runs the event loop once, None waits for ever.

        Raises:
            OSError: the client has disconnected; raised at once, not when the time is up.
        """
        self._must_yield = False
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                wait_read(self._socket.fileno(), timeout=seconds)
            except TimeoutError:
                return
            if not self._socket.recv(1, socket.MSG_PEEK):
                raise _disconnected()
            seconds = None if until is None else max(until - time.monotonic(), 0)
            if self._has_read_pipelined:
                break
            # The client has pipelined its next request, which hides its disconnection: read that
            # into the buffer.
            self._handler.rfile.peek(1)
            self._has_read_pipelined = True
        if seconds is None:  # more than the buffer holds: its disconnection would never be seen
            raise _disconnected()
        gevent.sleep(seconds)


def _disconnected() -> ConnectionResetError:
    """The error of a wait that finds the client disconnected, as a write would raise it."""
    return ConnectionResetError(errno.ECONNRESET, "connection ended before its answer")

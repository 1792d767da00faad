"""The typed client: register, ask, interrupt, collect.

    with gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        ack = client.interrupt(answer)
        assert answer.collect().outcome == "INTERRUPTED"

It is a session of the gateway's own client library, for a gateway on this machine.
"""

from __future__ import annotations

from typing import Any

from bargein.gateway.client import Connection, Session, open_socket

from .protocol import PATH

HOST = "127.0.0.1"


def open_connection(port: int, *, timeout: float) -> Connection:
    """A WebSocket to a gateway on this machine.

    Args:
        port: of the gateway.
        timeout: seconds for connecting, for the handshake, and for any read or write.
    """
    sock = open_socket(HOST, port, timeout=timeout)
    return Connection(f"ws://{HOST}:{port}{PATH}", sock, timeout=timeout)


class ChatClient(Session):
    """A registered client of a gateway on this machine.

    Args:
        port: of the gateway, on 127.0.0.1.
        timeout: seconds that any wait may take when it is not told otherwise.
        register: fields of the REGISTER frame, over the default ones.

    Raises:
        FrameRefused: the gateway refused the registration.
    """

    def __init__(self, port: int, *, timeout: float = 10.0, **register: Any) -> None:
        super().__init__(open_connection(port, timeout=timeout), timeout=timeout)
        default = {"auth": {"type": "API_KEY", "api_key": "test"}, "platform": "WEB"}
        try:
            self.register(**default | register)
        except BaseException:
            self.drop()
            raise

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.registered.session_id

    @property
    def wire(self) -> Connection:
        """The connection below, for bytes that no proper client sends."""
        return self.connection

"""The door of wire protocol 1.0: makes the attachment of each connection, and drains them."""

from __future__ import annotations

import random
from collections.abc import Callable

import gevent

from actors.session.session import Sessions
from gateway.wire.attachment import Attachment, Authenticator
from gateway.wire.frames import HealthStatus
from gateway.wire.port import Outbox
from metrics.instruments import Metrics


class WireDoor:
    """Makes the attachments of all clients of wire protocol 1.0.

    Args:
        sessions: makes sessions.
        authenticator: checks credentials; None accepts every client.
        health: returns the answer to HEALTH_CHECK.
        metrics: counts refusals.
    """

    def __init__(
        self,
        *,
        sessions: Sessions,
        authenticator: Authenticator | None,
        health: Callable[[], HealthStatus],
        metrics: Metrics,
    ) -> None:
        self._sessions = sessions
        self._authenticator = authenticator
        self._health = health
        self._metrics = metrics
        self._unregistered: set[Attachment] = set()
        self._spread_seconds: float | None = None
        """Over how many seconds the goodbyes to unregistered clients are spread; None until the
        drain begins."""

    @property
    def unregistered(self) -> int:
        """How many clients have not registered yet."""
        return len(self._unregistered)

    def attach(self, outbox: Outbox, peer: str) -> Attachment:
        """Make the attachment of a connection.

        Args:
            outbox: the outbox of the connection.
            peer: the client's address.
        """
        attachment = Attachment(
            outbox,
            peer,
            sessions=self._sessions,
            authenticator=self._authenticator,
            health=self._health,
            metrics=self._metrics,
            is_draining=lambda: self._spread_seconds is not None,
            on_settled=self._unregistered.discard,
        )
        self._unregistered.add(attachment)
        if self._spread_seconds is not None:
            self._dismiss(attachment, self._spread_seconds)
        return attachment

    def drain(self, spread_seconds: float) -> None:
        """Make no more sessions, and say goodbye to the clients that have not registered. (The
        supervisor drains the sessions.)

        Args:
            spread_seconds: each client is told after a random delay of at most this long.
        """
        self._spread_seconds = spread_seconds
        for attachment in list(self._unregistered):
            self._dismiss(attachment, spread_seconds)

    @staticmethod
    def _dismiss(attachment: Attachment, spread_seconds: float) -> None:
        if spread_seconds > 0:
            gevent.spawn_later(random.uniform(0, spread_seconds), attachment.leave)
        else:
            attachment.leave()

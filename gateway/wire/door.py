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
        self._is_draining = False
        self._spread_seconds: float | None = None
        """Over how many seconds unregistered clients leave; None while they may stay."""

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
            is_draining=lambda: self._is_draining,
            on_settled=self._unregistered.discard,
        )
        self._unregistered.add(attachment)
        if self._spread_seconds is not None:
            self._dismiss(attachment, self._spread_seconds)
        return attachment

    def refuse_sessions(self) -> None:
        """Make no more sessions. Clients that are there may stay."""
        self._is_draining = True

    def drain(self, spread_seconds: float) -> None:
        """Make no more sessions, and tell clients that have not registered to go: each after a
        random delay of at most so many seconds. (Sessions are the supervisor's.)"""
        self.refuse_sessions()
        self._spread_seconds = spread_seconds
        for attachment in list(self._unregistered):
            self._dismiss(attachment, spread_seconds)

    @staticmethod
    def _dismiss(attachment: Attachment, spread_seconds: float) -> None:
        if spread_seconds > 0:
            gevent.spawn_later(random.uniform(0, spread_seconds), attachment.leave)
        else:
            attachment.leave()

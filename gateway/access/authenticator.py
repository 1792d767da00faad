"""Checks what clients register with, without holding anybody up.

A password takes some 50 ms of a processor, so it is checked in a native thread. That one knows
nothing of clients: a greenlet waits for what it finds, and tells the applicant.
"""

from __future__ import annotations

from collections import deque

import gevent
import gevent.threadpool

from actors.words import ErrorCode
from gateway.access.credentials import Credentials
from gateway.wire.attachment import Applicant
from gateway.wire.frames import AccountAuth, ApiKeyAuth
from metrics.logs import get_logger

_THREADS = 1
"""Measured on 2 cores, one of them busy: a second thread checked no more (21 a second), and the
loop's worst delay rose from 9 to 35 ms."""

MOST_WAITING = 100
"""Passwords that may wait to be checked: 5 s with hashes of ours, where clients wait 15 s for their
REGISTER_ACK."""

_WRONG = "these credentials are not accepted"
"""To everybody the same: a client is not told whether there is such an account."""

_log = get_logger("WS")


class Authenticator:
    """Says who may register.

    Args:
        credentials: who may, until a reload puts others in their place.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._threads = gevent.threadpool.ThreadPool(_THREADS)
        self._waiting: deque[tuple[AccountAuth, Applicant]] = deque()
        self._is_at_work = False

    def check(self, auth: ApiKeyAuth | AccountAuth, applicant: Applicant) -> None:
        """Find out whether credentials are right, and tell the applicant; does not wait.

        Args:
            auth: what a client registers with.
            applicant: is accepted or rejected once, if it still waits then.
        """
        match auth:
            case ApiKeyAuth(api_key):
                self._answer(applicant, self.credentials.name_of_key(api_key))
            case AccountAuth() if not self.credentials.accounts:
                self._answer(applicant, None)  # there is none to find out about
            case AccountAuth() if len(self._waiting) >= MOST_WAITING:
                detail = "too many passwords wait to be checked: try again in a moment"
                applicant.reject(ErrorCode.SERVER_BUSY, detail)
            case AccountAuth():
                self._waiting.append((auth, applicant))
                if not self._is_at_work:
                    self._is_at_work = True
                    gevent.spawn(self._work)

    def stop(self) -> None:
        """Check nothing more, and wait for the thread."""
        self._waiting.clear()
        self._threads.kill()

    def _work(self) -> None:
        """Check passwords, one after another, as long as some wait."""
        while self._waiting:
            auth, applicant = self._waiting.popleft()
            if not applicant.is_waiting:
                continue  # its client did not wait, and nobody else shall
            try:
                found = self._threads.apply(_is_password, (self.credentials, auth))
            except Exception as error:  # there is no thread to be had
                found = error
            if isinstance(found, Exception):
                _log.error("Credentials could not be checked", error=type(found).__name__)
                detail = "the credentials could not be checked"
                applicant.reject(ErrorCode.INTERNAL_ERROR, detail)
            else:
                self._answer(applicant, auth.account if found else None)
        self._is_at_work = False

    def _answer(self, applicant: Applicant, client: str | None) -> None:
        if client is None:
            applicant.reject(ErrorCode.AUTH_FAILED, _WRONG)
        else:
            applicant.accept(client)


def _is_password(credentials: Credentials, auth: AccountAuth) -> bool | Exception:
    """Runs in the thread. What is raised there gevent would print, with the arguments; so nothing
    is. (No memory, for example.)"""
    try:
        return credentials.is_password(auth.account, auth.password)
    except Exception as error:
        return error

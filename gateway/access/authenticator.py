"""Checks the credentials of REGISTER without blocking the event loop.

A password takes some 50 ms of CPU, so a native thread checks it. The thread knows no clients: a
greenlet waits for its result and tells the applicant.
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
"""Measured on 2 cores, one of them busy: a second thread checked no more passwords (21 a second),
and the worst delay of the event loop rose from 9 to 35 ms."""

MAX_WAITING = 100
"""Passwords in the queue. They take 5 s with our hashes; clients wait 15 s for REGISTER_ACK."""

_NOT_ACCEPTED = "these credentials are not accepted"
"""The same for every reason: a client must not learn whether an account exists."""

_log = get_logger("WS")


class Authenticator:
    """Says who may register.

    Args:
        credentials: who may register. A reload replaces them.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._threads = gevent.threadpool.ThreadPool(_THREADS)
        self._waiting: deque[tuple[AccountAuth, Applicant]] = deque()
        self._is_working = False

    def check(self, auth: ApiKeyAuth | AccountAuth, applicant: Applicant) -> None:
        """Check credentials and tell the applicant the result. Does not block.

        Args:
            auth: from the client's REGISTER.
            applicant: is accepted or rejected, once, if it is still waiting.
        """
        match auth:
            case ApiKeyAuth(api_key):
                self._answer(applicant, self.credentials.name_of_key(api_key))
            case AccountAuth() if not self.credentials.accounts:
                self._answer(applicant, None)  # no account to protect: answer at once
            case AccountAuth() if len(self._waiting) >= MAX_WAITING:
                detail = "too many passwords are waiting to be checked: try again in a moment"
                applicant.reject(ErrorCode.SERVER_BUSY, detail)
            case AccountAuth():
                self._waiting.append((auth, applicant))
                if not self._is_working:
                    self._is_working = True
                    gevent.spawn(self._work)

    def stop(self) -> None:
        """Drop the queue, and wait for the thread to finish its check."""
        self._waiting.clear()
        self._threads.kill()

    def _work(self) -> None:
        """Check the queued passwords one after another, then end."""
        try:
            while self._waiting:
                self._check_next()
        finally:
            self._is_working = False

    def _check_next(self) -> None:
        auth, applicant = self._waiting.popleft()
        if not applicant.is_waiting:
            return  # its client is gone
        try:
            found = self._threads.apply(_is_password, (self.credentials, auth))
        except Exception as error:  # no thread could be started
            found = error
        if isinstance(found, Exception):
            _log.error("Credentials could not be checked", error=type(found).__name__)
            applicant.reject(ErrorCode.INTERNAL_ERROR, "the credentials could not be checked")
        else:
            self._answer(applicant, auth.account if found else None)

    def _answer(self, applicant: Applicant, client: str | None) -> None:
        if client is None:
            applicant.reject(ErrorCode.AUTH_FAILED, _NOT_ACCEPTED)
        else:
            applicant.accept(client)


def _is_password(credentials: Credentials, auth: AccountAuth) -> bool | Exception:
    """Runs in the thread. Returns an exception (such as MemoryError) instead of raising it: gevent
    would print it together with the arguments, which contain the password."""
    try:
        return credentials.is_password(auth.account, auth.password)
    except Exception as error:
        return error

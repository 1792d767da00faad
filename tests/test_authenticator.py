"""Clients register with credentials: over a real WebSocket, between fakes, after a SIGHUP."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import pytest
from structlog.testing import capture_logs

from actors.loop.lanes import lanes
from actors.session.messages import ConnectionLost
from actors.session.session import SessionActor
from actors.words import ErrorCode
from gateway.access import authenticator
from gateway.access.authenticator import MAX_WAITING, Authenticator
from gateway.access.credentials import Credentials, PasswordHash, hash_api_key
from gateway.app import Gateway
from gateway.wire.attachment import Applicant
from gateway.wire.frames import (
    AccountAuth,
    ApiKeyAuth,
    HealthCheck,
    Register,
    Request,
    RequestContent,
)
from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.daemon import Daemon, run_to_the_end
from tests.harness.provider_process import ProviderProcess
from tests.test_session import Given, VoiceReceived

KEY, OTHER_KEY = "bargein_key-of-the-kiosk", "bargein_key-of-the-others"
PASSWORD, OTHER_PASSWORD = "correct horse", "battery staple"
HASH = PasswordHash.of(PASSWORD)  # takes long, so once
KNOWN = Credentials({bytes.fromhex(hash_api_key(KEY)[7:]): "kiosk"}, {"alice": HASH})

BY_KEY = {"type": "API_KEY", "api_key": KEY}
BY_WRONG_KEY = {"type": "API_KEY", "api_key": OTHER_KEY}
BY_ACCOUNT = {"type": "ACCOUNT", "account": "alice", "password": PASSWORD}
BY_WRONG_PASSWORD = BY_ACCOUNT | {"password": OTHER_PASSWORD}
BY_UNKNOWN_ACCOUNT = BY_ACCOUNT | {"account": "mallory"}

WRONG = [
    BY_WRONG_KEY,
    {"type": "API_KEY", "api_key": ""},
    {"type": "API_KEY", "api_key": hash_api_key(KEY)},
    {"type": "API_KEY", "api_key": PASSWORD},  # right, but of the other kind
    BY_WRONG_PASSWORD,
    BY_UNKNOWN_ACCOUNT,
    {"type": "ACCOUNT", "account": "kiosk", "password": KEY},
    {"type": "ACCOUNT", "account": "alice", "password": ""},
    {"type": "ACCOUNT", "account": "alice", "password": str(HASH)},
]


class FakeAuthenticator:
    """Answers when the test does."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Applicant]] = []

    def check(self, auth: Any, applicant: Applicant) -> None:
        self.asked.append((auth, applicant))


class NativeThread:
    """The thread of an authenticator, which the test holds up. What it waits for are the events
    of native threads: these would hold up the loop, if it was the loop that waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        event: Callable[[], threading.Event] = gevent.monkey.get_original("threading", "Event")
        get_ident: Callable[[], int] = gevent.monkey.get_original("_thread", "get_ident")
        self.passwords: list[str] = []
        """Those that it has begun to check."""
        self.idents: set[int] = set()
        self.was_let_go = True
        self._go_on = event()
        self._here = get_ident()
        check = authenticator._is_password

        def held(credentials: Credentials, auth: AccountAuth) -> Any:
            self.passwords.append(auth.password)
            self.idents.add(get_ident())
            self.was_let_go = self._go_on.wait(4 * LIMIT) and self.was_let_go
            return check(credentials, auth)

        monkeypatch.setattr("gateway.access.authenticator._is_password", held)

    def wait_for(self, count: int) -> None:
        """Wait until it has begun to check so many."""
        wait_until(lambda: len(self.passwords) == count, "a password is being checked")

    def let_go(self) -> None:
        """From here on it is not held up."""
        self._go_on.set()

    def assert_was_another(self) -> None:
        assert self._here not in self.idents
        assert self.was_let_go  # and its wait did not just end


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeThread]:
    thread = NativeThread(monkeypatch)
    yield thread
    thread.let_go()


def register(client: Client, auth: dict[str, str]) -> None:
    client.send("REGISTER", {"auth": auth, "platform": "WEB"})


def registered(port: int, auth: dict[str, str]) -> Client:
    client = Client(port, register=False)
    client.register(auth=auth)
    return client


def refused(client: Client, code: str = "AUTH_FAILED", close_code: int = 1008) -> Received:
    """What a client was told whose registration was refused; and nothing came after it."""
    assert client.wait_closed() == close_code
    (frame,) = client.frames
    assert frame.msg_type == "ERROR"
    assert frame.payload["error_code"] == code
    return frame


def sample(gateway: Gateway, reason: str) -> float:
    name = "bargein_refused_total"
    return gateway.metrics.registry.get_sample_value(name, {"reason": reason}) or 0.0


@pytest.fixture
def gateway(make_gateway: Callable[..., Gateway]) -> Gateway:
    """A gateway that knows one key and one account."""
    return make_gateway(credentials=KNOWN)


# Over a WebSocket --------------------------------------------------------------------------------


@pytest.mark.parametrize(("auth", "name"), [(BY_KEY, "kiosk"), (BY_ACCOUNT, "alice")])
def test_who_has_the_right_credentials_is_let_in_and_the_log_says_who_it_was(
    gateway: Gateway, provider: ProviderProcess, auth: dict[str, str], name: str
) -> None:
    with capture_logs() as logs, registered(gateway.server.port, auth) as client:
        request_id = client.request(provider.fresh(scripts.answer(["Hello"])))
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        lanes().wait_deferred()  # lines are written later
    [line] = [line for line in logs if line["event"] == "Session registered"]
    assert (line["client"], line["session_id"]) == (name, client.session_id)
    assert line["auth"] == auth["type"]
    assert KEY not in repr(logs)
    assert PASSWORD not in repr(logs)


@pytest.mark.parametrize("auth", WRONG)
def test_who_has_not_is_told_so_and_nothing_else(gateway: Gateway, auth: dict[str, str]) -> None:
    with capture_logs() as logs, Client(gateway.server.port, register=False) as client:
        register(client, auth)
        frame = refused(client)
        wait_until(lambda: gateway.server.connections == 0, "it is gone")
        lanes().wait_deferred()
    assert frame.session_id is None
    assert frame.payload == {
        "error_code": "AUTH_FAILED",
        "error_msg": "registration refused",
        "error_detail": "these credentials are not accepted",  # whatever is wrong with them
        "retryable": True,
    }
    assert sample(gateway, "auth") == 1
    assert gateway.metrics.registry.get_sample_value("bargein_sessions_active") == 0
    [line] = [line for line in logs if line["event"] == "Refused registration"]
    assert line["log_level"] == "warning"
    assert line["peer"].startswith("127.0.0.1:")
    assert (line["auth"], line["code"]) == (auth["type"], "AUTH_FAILED")
    for secret in [*auth.values(), KEY, PASSWORD, "alice"]:
        assert secret in ("", auth["type"]) or secret not in repr(logs)


def test_what_a_client_sends_meanwhile_is_not_taken_and_ruins_nothing(
    gateway: Gateway, native: NativeThread
) -> None:
    with Client(gateway.server.port, register=False) as client:
        with client.one_packet():
            register(client, BY_ACCOUNT)
            client.request("Hello")
            register(client, BY_KEY)
            client.send_text(b"{")
            client.send_binary(b"voice")
            client.interrupt(None)
            client.send("HEALTH_CHECK", {"check_fields": ["status"]})
        for code in ("SESSION_INVALID", "MALFORMED_PAYLOAD", "MALFORMED_PAYLOAD"):
            assert client.next().payload["error_code"] == code
        for _ in range(2):
            assert client.next().payload["error_code"] == "SESSION_INVALID"
        assert client.next().payload == {"health_status": {"status": "UP"}}
        native.let_go()
        assert client.next().msg_type == "REGISTER_ACK"
    assert native.passwords == [PASSWORD]


def test_a_password_that_is_checked_holds_nobody_up(
    gateway: Gateway, native: NativeThread, provider: ProviderProcess
) -> None:
    port = gateway.server.port
    with (
        registered(port, BY_KEY) as first,
        Client(port, register=False) as slow,
    ):
        register(slow, BY_ACCOUNT)
        native.wait_for(1)
        # All of this while it is checked:
        request_id = first.request(provider.fresh(scripts.idle_mid_stream(["Once"])))
        first.wait_text(request_id)
        first.interrupt(request_id)
        assert first.wait_ack().payload["status"] == "SUCCESS"
        with registered(port, BY_KEY) as second:
            assert second.session_id
        with Client(port, register=False) as third:
            register(third, BY_WRONG_KEY)
            refused(third)
        assert slow.frames == []
        native.let_go()
        assert slow.next().msg_type == "REGISTER_ACK"
    native.assert_was_another()


def test_passwords_are_checked_one_after_another_in_the_order_in_which_they_came(
    gateway: Gateway, native: NativeThread
) -> None:
    clients = [Client(gateway.server.port, register=False) for _ in range(3)]
    passwords = [f"wrong password {number}" for number in range(3)]
    for number, client in enumerate(clients):
        register(client, BY_ACCOUNT | {"password": passwords[number]})
        native.wait_for(1)
        wait_for_waiting(gateway, number)
    assert native.passwords == passwords[:1]
    native.let_go()
    for client in clients:
        refused(client)
        client.drop()
    assert native.passwords == passwords
    assert len(native.idents) == 1


def wait_for_waiting(gateway: Gateway, count: int) -> None:
    """Wait until so many passwords wait to be checked."""
    authenticator = gateway._authenticator
    assert authenticator is not None
    wait_until(lambda: len(authenticator._waiting) == count, f"{count} wait")


def test_who_does_not_wait_for_the_check_is_not_checked(
    gateway: Gateway, native: NativeThread
) -> None:
    port = gateway.server.port
    with Client(port, register=False) as first, Client(port, register=False) as last:
        register(first, BY_ACCOUNT)
        native.wait_for(1)
        with Client(port, register=False) as impatient:
            register(impatient, BY_WRONG_PASSWORD)
            wait_for_waiting(gateway, 1)
        wait_until(lambda: gateway.server.connections == 2, "it is gone")
        register(last, BY_ACCOUNT)
        native.let_go()
        for client in (first, last):
            assert client.next().msg_type == "REGISTER_ACK"
    assert native.passwords == [PASSWORD, PASSWORD]


def test_who_is_gone_when_the_check_is_through_harms_nobody(
    gateway: Gateway, native: NativeThread
) -> None:
    port = gateway.server.port
    with Client(port, register=False) as client:
        register(client, BY_ACCOUNT)
        native.wait_for(1)
    wait_until(lambda: gateway.server.connections == 0, "it is gone")
    with capture_logs() as logs:
        native.let_go()
        with registered(port, BY_ACCOUNT):
            pass
        lanes().wait_deferred()
    assert [line for line in logs if line["log_level"] in ("warning", "error")] == []
    assert sample(gateway, "auth") == 0


def test_a_gateway_that_stops_does_not_wait_for_those_who_wait(
    make_gateway: Callable[..., Gateway], native: NativeThread
) -> None:
    gateway = make_gateway(credentials=KNOWN)
    clients = [Client(gateway.server.port, register=False) for _ in range(2)]
    for client in clients:
        register(client, BY_ACCOUNT)
    native.wait_for(1)
    stopping = gevent.spawn(gateway.stop)
    for client in clients:
        assert client.wait_closed() == 1012
        assert [frame.msg_type for frame in client.frames] == ["SHUTDOWN"]
        client.drop()
    native.let_go()
    stopping.get(timeout=LIMIT)
    assert len(native.passwords) == 1


def test_after_its_password_was_checked_a_clients_first_message_may_be_large(
    gateway: Gateway,
) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.register(auth=BY_ACCOUNT)
        content = {"voice_mode": "BASE64", "audio_format": "pcm", "voice": "A" * 700_000}
        client.send("REQUEST", {"request_id": "a", "data_type": "VOICE", "content": content})
        refused = client.wait_for(lambda frame: frame.msg_type == "ERROR").payload
        assert refused["error_code"] == "INTERNAL_ERROR"  # it was read: nothing listens to it yet


def test_without_credentials_everybody_is_let_in(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway()
    for auth in WRONG:
        with capture_logs() as logs, registered(gateway.server.port, auth) as client:
            assert client.session_id
            lanes().wait_deferred()
        [line] = [line for line in logs if line["event"] == "Session registered"]
        assert "client" not in line


# Between fakes -----------------------------------------------------------------------------------


@pytest.fixture
def client(no_actor_left: None) -> Given:
    """A client that has sent REGISTER, and whose credentials are being checked."""
    given = Given(authenticator=FakeAuthenticator())
    given.tell(given.frame(Register(ApiKeyAuth(KEY))))
    return given


def test_a_client_waits_for_its_answer_and_asks_once(no_actor_left: None) -> None:
    fake = FakeAuthenticator()
    given = Given(authenticator=fake)
    auth = ApiKeyAuth(KEY)
    given.tell(given.frame(Register(auth)), given.frame(Register(AccountAuth("a", "b"))))
    assert fake.asked == [(auth, given.attachment)]
    assert [frame["msg_type"] for frame in given.outbox.frames] == ["ERROR"]
    assert given.sample("sessions_active") == 0
    given.outbox.next()
    given.attachment.accept("kiosk")
    given.session_id = given.outbox.wait_for("REGISTER_ACK")["session_id"]
    given.tell(given.frame(Register(auth)))
    assert given.outbox.wait_for("ERROR")["error_code"] == "MALFORMED_PAYLOAD"
    assert len(fake.asked) == 1


def test_its_profile_is_that_of_the_registration_that_was_checked(no_actor_left: None) -> None:
    given = Given(authenticator=FakeAuthenticator())
    given.tell(given.frame(Register(ApiKeyAuth(KEY), require_tts=True)))
    given.tell(given.frame(Register(ApiKeyAuth(KEY), require_tts=False)))
    given.attachment.accept("kiosk")
    given.session_id = given.outbox.wait_for("REGISTER_ACK")["session_id"]
    given.request("req_1", text="")
    assert given.outbox.wait_terminal("req_1")["voice_stream_seq"] == -1


def test_it_answers_a_health_check_meanwhile_and_nothing_else(client: Given) -> None:
    client.tell(client.frame(HealthCheck()))
    client.outbox.wait_for("HEALTH_CHECK_ACK")
    client.tell(client.frame(Request("req_1", "TEXT", RequestContent("Hi"))))
    error = client.outbox.wait_for("ERROR")
    assert (error["error_code"], error["error_detail"]) == (
        "SESSION_INVALID",
        "wait for REGISTER_ACK",
    )
    client.tell(VoiceReceived(b"voice"))
    assert client.outbox.wait_for("ERROR")["error_detail"] == "wait for REGISTER_ACK"
    assert client.source.streams == []


@pytest.mark.parametrize(
    ("code", "close_code", "reason"),
    [
        (ErrorCode.AUTH_FAILED, 1008, "auth"),
        (ErrorCode.SERVER_BUSY, 1013, "auth_busy"),
        (ErrorCode.INTERNAL_ERROR, 1011, None),
    ],
)
def test_a_refusal_ends_it(
    client: Given, code: ErrorCode, close_code: int, reason: str | None
) -> None:
    client.attachment.reject(code, "why")
    error = client.outbox.wait_for("ERROR")
    assert (error["error_code"], error["error_detail"]) == (code.value, "why")
    assert client.outbox.closed == (close_code, "registration refused")
    assert client.door.unregistered == 0
    client.tell(client.frame(Register(ApiKeyAuth(KEY))))  # nothing is answered behind that
    assert len(client.outbox.frames) == 1
    for known in ("auth", "auth_busy"):
        assert client.sample("refused_total", reason=known) == (known == reason)
    client.assert_nothing_counted_as_live()


def test_who_was_checked_while_the_gateway_began_to_leave_is_not_let_in(client: Given) -> None:
    client.door.drain(LIMIT)
    client.attachment.accept("kiosk")
    assert client.outbox.wait_for("ERROR")["error_code"] == "SERVER_BUSY"
    client.outbox.wait_for("SHUTDOWN")
    assert client.outbox.closed == (1012, "SERVER_SHUTDOWN")
    assert client.sample("refused_total", reason="shutdown") == 1


def test_the_wrong_credentials_are_told_so_even_then(client: Given) -> None:
    client.door.drain(LIMIT)
    client.attachment.reject(ErrorCode.AUTH_FAILED, "no")
    assert client.outbox.wait_for("ERROR")["error_code"] == "AUTH_FAILED"
    assert client.outbox.closed == (1008, "registration refused")


@pytest.mark.parametrize("end", ["lost", "drain"])
def test_the_end_of_a_client_does_not_wait_for_its_check(client: Given, end: str) -> None:
    assert client.attachment.is_waiting
    if end == "lost":
        client.tell(ConnectionLost("gone"))
    else:
        client.door.drain(0)
    assert not client.attachment.is_waiting
    client.attachment.accept("kiosk")  # too late
    client.assert_nothing_counted_as_live()
    assert "REGISTER_ACK" not in [frame["msg_type"] for frame in client.outbox.frames]


def test_a_state_dump_shows_who_it_is_and_no_credentials(client: Given) -> None:
    client.attachment.accept("kiosk")
    client.outbox.wait_for("REGISTER_ACK")
    [actor] = [one for one in SessionActor.alive if one.actor_ref == client.ref]
    dump = actor.describe(0)
    assert dump["client"] == "kiosk"
    assert KEY not in repr(dump)


@pytest.mark.usefixtures("no_actor_left")
def test_a_client_on_which_the_gateway_fails_ends_no_other_s_check(
    native: NativeThread, checker: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AccountAuth("alice", PASSWORD)
    failing, second, third = ask(checker, right), ask(checker, right), Given(authenticator=checker)
    monkeypatch.setattr(failing.attachment, "_open_session", lambda *_: 1 / 0)
    native.let_go()
    second.outbox.wait_for("REGISTER_ACK")
    assert failing.outbox.closed == (1011, "internal error")
    third.tell(third.frame(Register(right)))
    third.outbox.wait_for("REGISTER_ACK")


# Its own bounds ----------------------------------------------------------------------------------


@pytest.fixture
def checker() -> Iterator[Authenticator]:
    checker = Authenticator(KNOWN)
    yield checker
    checker.stop()


def ask(checker: Authenticator, auth: ApiKeyAuth | AccountAuth) -> Given:
    """A session that asks."""
    given = Given(authenticator=checker)
    given.tell(given.frame(Register(auth)))
    return given


@pytest.mark.usefixtures("no_actor_left")
def test_no_more_passwords_wait_than_may(native: NativeThread, checker: Authenticator) -> None:
    right = AccountAuth("alice", PASSWORD)
    first = ask(checker, right)
    native.wait_for(1)
    gone = [ask(checker, right) for _ in range(MAX_WAITING - 1)]
    for given in gone:
        given.tell(ConnectionLost("gone"))
    last = ask(checker, right)
    refused = ask(checker, right)
    error = refused.outbox.wait_for("ERROR")
    assert (error["error_code"], error["retryable"]) == ("SERVER_BUSY", True)
    assert error["error_detail"].startswith("too many passwords are waiting to be checked")
    wait_until(lambda: refused.outbox.closed is not None, "it is closed")
    assert refused.outbox.closed == (1013, "registration refused")
    # A key is looked up all the same.
    ask(checker, ApiKeyAuth(KEY)).outbox.wait_for("REGISTER_ACK")
    native.let_go()
    for given in (first, last):
        given.outbox.wait_for("REGISTER_ACK")
    assert len(native.passwords) == 2
    # And then there is room again.
    ask(checker, right).outbox.wait_for("REGISTER_ACK")


@pytest.mark.usefixtures("no_actor_left")
def test_a_check_that_fails_ends_one_registration_in_words_and_no_other(
    monkeypatch: pytest.MonkeyPatch, checker: Authenticator, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> bool:
        raise MemoryError(f"no room for {PASSWORD}")

    with capture_logs() as logs, monkeypatch.context() as patch:
        patch.setattr(PasswordHash, "matches", fail)
        given = ask(checker, AccountAuth("alice", PASSWORD))
        error = given.outbox.wait_for("ERROR")
    assert error["error_code"] == "INTERNAL_ERROR"
    [line] = [line for line in logs if line["log_level"] == "error"]
    assert (line["event"], line["error"]) == ("Credentials could not be checked", "MemoryError")
    assert PASSWORD not in repr(logs) + error["error_detail"] + "".join(capfd.readouterr())
    ask(checker, AccountAuth("alice", PASSWORD)).outbox.wait_for("REGISTER_ACK")


@pytest.mark.usefixtures("no_actor_left")
def test_a_thread_that_cannot_be_had_fails_one_registration_and_no_other(
    monkeypatch: pytest.MonkeyPatch, checker: Authenticator
) -> None:
    class NoThreads:
        def apply(self, *_: Any) -> Any:
            raise RuntimeError("can't start new thread")

    with capture_logs() as logs, monkeypatch.context() as patch:
        patch.setattr(checker, "_threads", NoThreads())
        given = ask(checker, AccountAuth("alice", PASSWORD))
        assert given.outbox.wait_for("ERROR")["error_code"] == "INTERNAL_ERROR"
    assert "Credentials could not be checked" in [line["event"] for line in logs]
    ask(checker, AccountAuth("alice", PASSWORD)).outbox.wait_for("REGISTER_ACK")


@pytest.mark.usefixtures("no_actor_left")
def test_when_it_is_stopped_it_checks_nothing_more(native: NativeThread) -> None:
    checker = Authenticator(KNOWN)
    first, second = (ask(checker, AccountAuth("alice", PASSWORD)) for _ in range(2))
    native.wait_for(1)
    stopping = gevent.spawn(checker.stop)
    gevent.sleep(0)  # it has begun
    native.let_go()
    stopping.get(timeout=LIMIT)
    first.outbox.wait_for("REGISTER_ACK")
    assert native.passwords == [PASSWORD]
    assert second.outbox.frames == []


@pytest.mark.usefixtures("no_actor_left")
def test_where_there_are_no_accounts_no_password_is_checked(native: NativeThread) -> None:
    checker = Authenticator(Credentials(KNOWN.api_keys))
    given = ask(checker, AccountAuth("alice", PASSWORD))
    assert given.outbox.wait_for("ERROR")["error_code"] == "AUTH_FAILED"
    assert native.passwords == []
    checker.stop()


# At a SIGHUP -------------------------------------------------------------------------------------


class Stand:
    """A daemon whose file of credentials can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.auth_file, self.config = folder / "auth.toml", folder / "bargein.toml"
        self.write(kiosk=KEY)
        self.configure(auth_file=str(self.auth_file))
        self.daemon = Daemon("--config", str(self.config), "--log-format", "json")

    def write(self, **keys: str) -> None:
        lines = [f'{name} = "{hash_api_key(key)}"\n' for name, key in keys.items()]
        self.auth_file.touch(mode=0o600)
        self.auth_file.write_text("[api_keys]\n" + "".join(lines))

    def configure(self, **settings: Any) -> None:
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        self.config.write_text("".join(lines))

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.daemon.log.split("\n")[:-1]]

    def hang_up(self, last: str) -> list[dict[str, Any]]:
        """SIGHUP; what the log says of it, up to an event."""
        before = len(self.log)
        self.daemon.signal(signal.SIGHUP)
        wait_until(lambda: last in [line["event"] for line in self.log[before:]], last)
        return self.log[before:]

    def lets_in(self, key: str) -> bool:
        with Client(self.daemon.port, register=False) as client:
            register(client, {"type": "API_KEY", "api_key": key})
            frame = client.next()
            assert frame.msg_type in ("REGISTER_ACK", "ERROR")
            return frame.msg_type == "REGISTER_ACK"


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")
    stand = Stand(tmp_path)
    yield stand
    stand.daemon.kill()
    assert "Traceback" not in stand.daemon.log
    said = stand.daemon.log + stand.daemon.output
    for secret in (KEY, OTHER_KEY, hash_api_key(KEY)[7:], hash_api_key(OTHER_KEY)[7:]):
        assert secret not in said


@pytest.mark.skipif(os.name != "posix", reason="files have no modes here")
@pytest.mark.parametrize("mode", [0o644, 0o602, 0o660])
def test_a_reload_warns_of_a_file_that_is_open_to_others(stand: Stand, mode: int) -> None:
    def warnings() -> list[str]:
        lines = stand.hang_up("Reloaded")
        return [line["warning"] for line in lines if line["event"] == "Questionable setting"]

    assert warnings() == []
    stand.auth_file.chmod(mode)
    (warning,) = warnings()
    assert f"{str(stand.auth_file)!r} has mode {mode:04o}: " in warning
    assert stand.lets_in(KEY)
    stand.auth_file.chmod(0o600)
    assert warnings() == []


def test_a_reload_takes_a_new_key_and_drops_an_old_one_and_sessions_go_on(stand: Stand) -> None:
    with registered(stand.daemon.port, BY_KEY) as client:
        stand.write(kiosk2=OTHER_KEY, more=OTHER_KEY + "-2")
        lines = stand.hang_up("Reloaded")
        [line] = [line for line in lines if line["event"] == "Credentials reloaded"]
        assert (line["api_keys"], line["accounts"]) == (2, 0)
        assert stand.lets_in(OTHER_KEY)
        assert not stand.lets_in(KEY)
        client.send("SESSION_QUERY", {})
        assert client.next().msg_type == "SESSION_INFO"


@pytest.mark.parametrize("broken", ["gone", "toml", "empty", "half"])
def test_a_faulty_file_changes_nothing_and_is_named(stand: Stand, broken: str) -> None:
    match broken:
        case "gone":
            stand.auth_file.unlink()
        case "toml":
            stand.auth_file.write_text("[api_keys")
        case "empty":
            stand.auth_file.write_text("")
        case "half":
            good = f'new = "{hash_api_key(OTHER_KEY)}"'
            stand.auth_file.write_text(f'[api_keys]\n{good}\nbad = "{OTHER_KEY}"')
    words = {
        "gone": "is not a file",
        "toml": "not valid TOML",
        "empty": "no client could register",
        "half": "api_keys.bad is not a hash",
    }
    [line] = [line for line in stand.hang_up("Not reloaded") if line["component"] == "SYS"]
    assert str(stand.auth_file) in line["fault"]
    assert words[broken] in line["fault"]
    assert stand.lets_in(KEY)
    assert not stand.lets_in(OTHER_KEY)
    stand.write(kiosk=OTHER_KEY)
    stand.hang_up("Reloaded")
    assert stand.lets_in(OTHER_KEY)


def test_a_fault_elsewhere_keeps_the_old_credentials_too(stand: Stand) -> None:
    stand.write(kiosk=OTHER_KEY)
    stand.configure(auth_file=str(stand.auth_file), prot=1)
    stand.hang_up("Not reloaded")
    assert stand.lets_in(KEY)
    assert not stand.lets_in(OTHER_KEY)


def test_another_file_may_take_its_place(stand: Stand) -> None:
    stand.auth_file = stand.folder / "other.toml"
    stand.write(kiosk=OTHER_KEY)
    stand.configure(auth_file=str(stand.auth_file))
    lines = stand.hang_up("Reloaded")
    assert "Settings need a restart" not in [line["event"] for line in lines]
    assert stand.lets_in(OTHER_KEY)
    assert not stand.lets_in(KEY)


def test_a_key_is_dropped_even_where_the_provider_needs_a_restart(stand: Stand) -> None:
    stand.write(kiosk=OTHER_KEY)
    stand.configure(auth_file=str(stand.auth_file), llm_url="http://127.0.0.1:9", llm_model="m")
    lines = stand.hang_up("Settings need a restart")
    assert lines[-1]["settings"] == ["llm_url", "llm_model"]
    assert not stand.lets_in(KEY)


@pytest.mark.parametrize("more", [{}, {"insecure_no_auth": True}])
def test_a_reload_never_lets_everybody_in(stand: Stand, more: dict[str, bool]) -> None:
    stand.configure(session_timeout=60, **more)
    lines = stand.hang_up("Settings need a restart")
    [line] = [line for line in lines if line["event"] == "Settings need a restart"]
    assert line["settings"] == ["auth_file", *more, "session_timeout"]
    assert "Credentials reloaded" not in [line["event"] for line in lines]
    assert stand.lets_in(KEY)
    assert not stand.lets_in(OTHER_KEY)


def test_nor_does_it_begin_to_ask_since_those_who_are_in_were_not_asked(stand: Stand) -> None:
    stand.daemon.kill()
    stand.configure()
    stand.daemon = Daemon("--config", str(stand.config), "--log-format", "json")
    stand.configure(auth_file=str(stand.auth_file))
    lines = stand.hang_up("Reloaded")
    [line] = [line for line in lines if line["event"] == "Settings need a restart"]
    assert line["settings"] == ["auth_file"]
    assert "Credentials reloaded" not in [line["event"] for line in lines]
    assert stand.lets_in(OTHER_KEY)


# As a command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_faults_of_the_file_end_a_command_with_a_line_each(tmp_path: Path, command: str) -> None:
    path = tmp_path / "auth.toml"
    path.write_text(f'[api_keys]\na = "{KEY}"\nb = 1\n')
    done = run_to_the_end(command, "--auth-file", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.partition(" is ")[0] for line in lines] == [
        f"error: {path}: api_keys.a",
        f"error: {path}: api_keys.b",
    ]
    assert KEY not in done.stderr


def test_a_daemon_with_an_auth_file_may_listen_beyond_loopback_and_says_so(
    tmp_path: Path,
) -> None:
    path = tmp_path / "auth.toml"
    path.write_text(f'[api_keys]\nkiosk = "{hash_api_key(KEY)}"')
    with Daemon("--host", "0.0.0.0", "--auth-file", str(path)) as daemon:
        with registered(daemon.port, BY_KEY) as client:
            client.close()
        with Client(daemon.port, register=False) as stranger:
            register(stranger, BY_WRONG_KEY)
            refused(stranger)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        said = "clients need one of the API keys (1) or accounts (0) that are known\n"
        assert said in daemon.output

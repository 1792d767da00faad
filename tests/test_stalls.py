"""A gateway that stood still for longer than a limit, in this process: nobody else is blamed.

The provider is a process of its own and goes on meanwhile. `test_sigstop.py` stops a daemon.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import gevent
import pytest

from actors.loop.lanes import Lanes, lanes
from actors.supervisor import SupervisorSettings
from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.server.outbox import OutboxSettings
from gateway.server.server import ServerSettings
from llm.chat.generation import GenerationSettings, LlmClient
from llm.errors import BadStatusError, LimitPassedError
from llm.provider import Provider
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.provider_process import ProviderProcess
from tests.harness.scripts import Script, chunk, send, text_event
from tests.test_generation import Run
from tests.test_pauses import PAUSE_SECONDS, stand_still
from tests.test_session import stuck

LIMIT = 0.5
"""Seconds; every limit here. The pauses are longer."""

PATIENCE_SECONDS = 5.0
"""Bounds a failure, and nothing else."""

RATE = 50
"""Tokens a second of a provider that goes on all the time."""

MakeGateway = Callable[..., Gateway]


@pytest.fixture
def client(provider: ProviderProcess) -> Iterator[LlmClient]:
    settings = Provider(
        base_url=provider.base_url,
        model="test",
        retries=0,
        ca_file=provider.ca_file,
        connect_timeout=LIMIT,
        first_token_timeout=LIMIT,
        idle_timeout=LIMIT,
    )
    made = LlmClient(settings, loop=lanes())
    yield made
    made.close()


def texts(seconds: float) -> list[str]:
    return [f"{number} " for number in range(int(seconds * RATE))]


# Providers ---------------------------------------------------------------------------------------


def lump(events: int) -> Script:
    """An answer of which much comes at once, during the pause."""
    return [
        *scripts.opening(),
        *scripts.tokens(["0 "]),
        scripts.sleep(LIMIT / 3),
        send(*(chunk(text_event(f"{number} ")) for number in range(events))),
        scripts.sleep(PAUSE_SECONDS),
        *scripts.tokens(texts(0.5), RATE),
        *scripts.ending(),
    ]


STREAMS: Mapping[str, Callable[[], Script]] = {
    "steady": lambda: scripts.answer(texts(1.7), RATE),
    "HTTP/1.0": lambda: [
        send(scripts.sse_head(http10=True)),
        *(
            step
            for text in texts(1.7)
            for step in (send(text_event(text)), scripts.sleep(1 / RATE))
        ),
        send(scripts.finish_event()),
        scripts.close(),
    ],
    "one lump": lambda: lump(5),
    "a large lump": lambda: lump(5000),
}


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_that_went_on_during_a_pause_goes_on_after_it(
    client: LlmClient, provider: ProviderProcess, stream: str, tls: bool
) -> None:
    if tls:
        client.reload(
            dataclasses.replace(client.first.provider, base_url=provider.tls_base_url), None
        )
    run = Run(client, provider.fresh(STREAMS[stream]())).start()
    run.sink.wait_text("0 ")
    stand_still(PAUSE_SECONDS)
    run.wait_completed()


def test_many_streams_are_all_read_before_one_is_ended(
    client: LlmClient, provider: ProviderProcess
) -> None:
    """What waits in the kernel for all of them takes longer than many slices."""
    runs = [Run(client, provider.fresh(STREAMS["steady"]())).start() for _ in range(60)]
    for run in runs:
        run.sink.wait_text("0 ")
    stand_still(PAUSE_SECONDS)
    for run in runs:
        run.wait_completed()


@pytest.mark.parametrize("seconds", [0.55, 0.65, 0.7])
def test_a_stall_that_is_too_short_for_a_pause_ends_no_stream_either(
    client: LlmClient, provider: ProviderProcess, seconds: float
) -> None:
    runs = [Run(client, provider.fresh(STREAMS["steady"]())).start() for _ in range(10)]
    for run in runs:
        run.sink.wait_text("0 ")
    for _ in range(2):
        stand_still(seconds)
        gevent.sleep(0.05)
    for run in runs:
        run.wait_completed()


FIRST: Mapping[str, Script] = {
    "the head": [scripts.sleep(0.2), *scripts.answer(texts(1), RATE)],
    "the first token": [
        *scripts.opening(),
        scripts.sleep(0.2),
        *scripts.tokens(["0 "]),
        *scripts.ending(),
    ],
    "the whole answer": [scripts.sleep(0.2), *scripts.answer(["0 "])],
}


@pytest.mark.parametrize("what", FIRST)
def test_what_comes_first_may_come_during_a_pause(
    client: LlmClient, provider: ProviderProcess, what: str
) -> None:
    run = Run(client, provider.fresh(FIRST[what])).start()
    provider.wait_post(script=run.script)
    stand_still(PAUSE_SECONDS)
    run.wait_completed()


@pytest.mark.parametrize("tls", [False, True])
def test_connecting_has_its_time_although_we_stood_still(
    client: LlmClient, provider: ProviderProcess, tls: bool
) -> None:
    """A TLS handshake needs more steps of ours after the pause."""
    if tls:
        client.reload(
            dataclasses.replace(client.first.provider, base_url=provider.tls_base_url), None
        )
    run = Run(client, provider.fresh(scripts.answer(["a"]))).start()
    gevent.sleep(0)
    lanes().wait_turn()
    lanes().wait_turn()  # it has begun to connect
    stand_still(PAUSE_SECONDS)
    run.wait_completed()


def test_the_total_limit_does_not_count_our_pause(provider: ProviderProcess) -> None:
    settings = GenerationSettings(total_timeout=1.5)
    of = Provider(base_url=provider.base_url, model="test", retries=0)
    client = LlmClient(of, None, settings, loop=lanes())
    run = Run(client, provider.fresh(scripts.answer(texts(2.4), RATE))).start()
    run.sink.wait_text("0 ")
    stand_still(2 * PAUSE_SECONDS)
    run.wait_completed()
    late = Run(client, provider.fresh(scripts.answer(texts(10), RATE))).start()
    late.wait_failed(LimitPassedError, "the total timeout")
    client.close()


def test_the_body_of_an_error_is_read_although_we_stood_still(
    client: LlmClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.attempt._ERROR_BODY_SECONDS", LIMIT)
    head = scripts.head(400, {"Content-Length": "12"})
    key = provider.unique("key")
    script = [send(head, b"wrong "), scripts.mark("said"), scripts.wait(key), send(b"fields")]
    run = Run(client, provider.fresh(script)).start()
    run.sink.wait_for(lambda: run.sink.posts == 1, "the POST")
    provider.wait_post(script=run.script)
    gevent.sleep(LIMIT / 3)  # it reads the body, and waits for the rest
    provider.release(key)
    stand_still(PAUSE_SECONDS)
    run.wait_failed(BadStatusError, "^the provider answered 400: wrong fields$")


SILENT: Mapping[str, tuple[Script, str]] = {
    "no head": (scripts.no_headers(), "first token"),
    "no token": (scripts.headers_only(), "first token"),
    "nothing after a token": (scripts.idle_mid_stream(["a"]), "idle"),
    "half a chunk": (scripts.stalled_inside_chunk(["a"]), "idle"),
    "comments": (
        [
            *scripts.opening(),
            *scripts.tokens(["a"]),
            scripts.repeat([send(chunk(b": wait\n\n")), scripts.sleep(0.02)]),
        ],
        "idle",
    ),
}


@pytest.mark.parametrize("silence", SILENT)
def test_a_provider_that_said_nothing_is_ended_within_its_limit_after_the_pause(
    client: LlmClient, provider: ProviderProcess, silence: str
) -> None:
    script, limit = SILENT[silence]
    run = Run(client, provider.fresh(script)).start()
    provider.wait_post(script=run.script)
    if limit == "idle":
        run.sink.wait_text("a")
    stand_still(PAUSE_SECONDS)
    went_on_at = time.monotonic()
    run.wait_failed(LimitPassedError, f"the {limit} timeout")
    assert time.monotonic() - went_on_at < LIMIT + 1.0


def test_a_pause_of_the_provider_alone_is_no_pause_of_ours(
    client: LlmClient, provider: ProviderProcess
) -> None:
    key = provider.unique("key")
    run = Run(client, provider.fresh(scripts.finish_on_release(["a"], key))).start()
    run.sink.wait_text("a")
    said_at = time.monotonic()
    run.wait_failed(LimitPassedError, "the idle timeout")
    assert LIMIT <= time.monotonic() - said_at < LIMIT + 1.0


# Clients, sessions, the reaper -------------------------------------------------------------------


def test_clients_that_answer_pings_stay(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    """They stand still, too: their pongs cannot be there when the gateway looks."""
    gateway = make_gateway(server=ServerSettings(ping_interval=0.1, ping_timeout=LIMIT))
    with Client(gateway.server.port) as client:
        key = provider.unique("end")
        request_id = client.request(provider.fresh(scripts.finish_on_release(["once"], key)))
        client.wait_text(request_id)
        [connection] = gateway.server._connections
        for _ in range(2):
            wait_until(lambda: connection._pinged_at is not None, "it is pinged")
            stand_still(PAUSE_SECONDS)
            gevent.sleep(0.1)  # several checks, before the pong is there
            pings = client.pings
            while client.pings < pings + 3:
                client.read_some()
        provider.release(key)
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"


def test_a_handshake_has_its_time(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server.connection._HANDSHAKE_SECONDS", LIMIT)
    gateway = make_gateway(server=ServerSettings(ping_interval=0.1, ping_timeout=0.1))
    with socket.create_connection(("127.0.0.1", gateway.server.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        wait_until(lambda: gateway.server.connections == 1, "it is connected")
        stand_still(PAUSE_SECONDS)
        gevent.sleep(0.1)  # several checks
        sock.sendall(f"Host: 127.0.0.1:{gateway.server.port}\r\n\r\n".encode())
        assert sock.recv(12) == b"HTTP/1.1 200"


def test_a_session_whose_client_gives_signs_of_life_goes_on(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(session_timeout=2 * LIMIT, heartbeat_interval=LIMIT / 3)
    with Client(gateway.server.port) as client:
        for _ in range(2):
            stand_still(PAUSE_SECONDS)
            for _ in range(8):  # longer than the limit
                client.wait_for(lambda frame: frame.msg_type == "HEARTBEAT")
                client.send("HEARTBEAT_REPLY", {})
        assert not client.has_ended
        # And a client that gives none is ended as ever.
        client.wait_for(lambda frame: frame.msg_type == "SHUTDOWN")


def test_a_slow_reader_is_not_dropped(make_gateway: MakeGateway, provider: ProviderProcess) -> None:
    gateway = make_gateway(server=ServerSettings(outbox=OutboxSettings(write_timeout=LIMIT)))
    with Client(gateway.server.port, receive_buffer=4096) as client:
        script = provider.fresh(scripts.flood("x" * 200))
        request_id = client.request(script)
        client.wait_text(request_id)
        [connection] = gateway.server._connections
        for _ in range(2):
            wait_until(lambda: connection._outbox._writer is not None, "the kernel is full")
            stand_still(PAUSE_SECONDS)
            gevent.sleep(0.01)
            before = len(client.text_of(request_id))
            while len(client.text_of(request_id)) < before + 64 * 1024:
                client.wait_text(request_id)
        client.interrupt(request_id)
        assert client.wait_ack().payload["status"] == "SUCCESS"
    assert gateway.metrics.registry.get_sample_value("bargein_slow_clients_total") == 0


def test_the_reaper_reads_first_and_does_not_count_our_pause(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(
        supervisor=SupervisorSettings(stale_after=LIMIT, reap_interval=0.05),
        on_new_request=OnNewRequest.PARALLEL,
    )
    with Client(gateway.server.port) as client:
        lively = client.request(provider.fresh(scripts.answer(texts(1.7), RATE)))
        quiet = client.request(provider.fresh(scripts.idle_mid_stream(["a"])))
        client.wait_text(quiet)
        client.wait_text(lively)
        stand_still(PAUSE_SECONDS)
        went_on_at = time.monotonic()
        reaped = client.wait_terminal(quiet)
        assert reaped.payload["outcome"] == "REAPED"
        assert "no progress for" in reaped.payload["error_detail"]
        assert LIMIT / 3 < time.monotonic() - went_on_at < LIMIT + 1.0
        assert client.wait_terminal(lively).payload["outcome"] == "COMPLETED"


def test_an_ack_has_its_time() -> None:
    given = stuck(ack_timeout=LIMIT)
    given.request("req_1")
    stream = given.source.next()
    given.interrupt("req_1")
    assert stream.close_asked.wait(PATIENCE_SECONDS)
    gevent.sleep(LIMIT / 3)  # its time runs
    stand_still(PAUSE_SECONDS)
    gevent.sleep(0.05)  # the timer fires
    stream.end_closed()
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "STOPPED"
    given.settle_requests()


def test_an_ack_does_not_wait_until_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = stuck(ack_timeout=0.02)
    given.request("req_1")
    stream = given.source.next()
    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "_queue_after_reads", lambda *_: None)  # data is never reached
        given.interrupt("req_1")
        assert given.outbox.wait_ack()["results"][0]["outcome"] == "TIMED_OUT"
    stream.end_closed()
    given.settle_requests()


@pytest.mark.usefixtures("no_actor_left")
def test_an_ack_for_a_stream_that_stays_open_comes_after_the_rest_of_its_time() -> None:
    given = stuck(ack_timeout=LIMIT)
    given.request("req_1")
    stream = given.source.next()
    given.interrupt("req_1")
    assert stream.close_asked.wait(PATIENCE_SECONDS)
    stand_still(PAUSE_SECONDS)
    went_on_at = time.monotonic()
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "TIMED_OUT"
    assert time.monotonic() - went_on_at < LIMIT + 1.0
    stream.end_closed()
    given.settle_requests()

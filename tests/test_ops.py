"""The operator's port and the meter of the loop's lag, and that neither delays other work."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from actors.loop import loop_lag
from actors.loop.loop_lag import INTERVAL_SECONDS, LoopLag
from actors.loop.slices import in_slices
from gateway.ops import connections
from gateway.ops.server import OpsServer
from metrics.instruments import Metrics, exemplar
from tests.harness.client import wait_until

_parse: Any = text_string_to_metric_families  # has no types

LIMIT = 10.0
OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}


class Ops:
    """An ops server on a free port, with a health that the test sets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.unready: str | None = None
        self.health: Callable[[], dict[str, object]] = lambda: {"status": "ok", "sessions": 2}
        self.server = OpsServer(
            "127.0.0.1", 0, self.registry, lambda: self.health(), lambda: self.unready
        )
        self.server.start()
        self.port = self.server.port

    def ask(
        self, path: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()


@pytest.fixture
def served() -> Iterator[Ops]:
    served = Ops()
    yield served
    served.server.stop()


# Metrics -----------------------------------------------------------------------------------------


def test_written_in_slices_it_is_the_page_that_the_library_writes(served: Ops) -> None:
    served.metrics.requests.labels("completed").inc(3)
    served.metrics.acknowledged_seconds.observe(0.004, exemplar("req_1"))
    response, body = served.ask("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert body == generate_latest(served.registry)
    assert b'bargein_requests_total{outcome="completed"} 3.0\n' in body
    assert b"req_1" not in body  # that format knows no exemplars


def test_asked_for_openmetrics_it_has_exemplars_and_one_end(served: Ops) -> None:
    served.metrics.acknowledged_seconds.observe(0.004, exemplar("req_1"))
    response, body = served.ask("/metrics", headers=OPENMETRICS)
    encode, content_type = choose_encoder(OPENMETRICS["Accept"])
    assert content_type.startswith("application/openmetrics-text")
    assert response.headers["Content-Type"] == content_type
    assert body == encode(served.registry)
    assert body.count(b"# EOF") == 1
    families = {family.name: family for family in _parse(body.decode())}
    exemplars = [
        (sample.labels["stage"], sample.labels["le"], sample.exemplar.labels)
        for sample in families["bargein_interrupt_seconds"].samples
        if sample.exemplar is not None
    ]
    assert exemplars == [("acknowledged", "0.005", {"request_id": "req_1"})]


@pytest.mark.parametrize("headers", [{}, OPENMETRICS])
def test_gzipped_it_is_the_same(served: Ops, headers: dict[str, str]) -> None:
    _, plain = served.ask("/metrics", headers=headers)
    response, body = served.ask("/metrics", headers={**headers, "Accept-Encoding": "gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == plain


def test_it_knows_its_url(served: Ops) -> None:
    assert served.server.url == f"http://127.0.0.1:{served.port}/metrics"
    on_ipv6 = OpsServer("::1", 0, served.registry, dict, lambda: None)
    on_ipv6.start()
    assert on_ipv6.url == f"http://[::1]:{on_ipv6.port}/metrics"
    on_ipv6.stop()


def test_a_connection_serves_several_scrapes(served: Ops) -> None:
    connection = HTTPConnection("127.0.0.1", served.port, timeout=LIMIT)
    connection.connect()
    local = connection.sock.getsockname()
    for _ in range(3):
        connection.request("GET", "/metrics")
        assert connection.getresponse().read()
        assert connection.sock.getsockname() == local
    connection.close()


class _Slow(Collector):
    """A family that takes longer than a slice, and does something first."""

    def __init__(self, name: str, first: Callable[[], object] = lambda: None) -> None:
        self._name = name
        self._first = first

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self._first()
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        yield GaugeMetricFamily(self._name, "-", value=1)


def test_other_sockets_are_served_during_a_scrape(served: Ops) -> None:
    ours, theirs = gevent.socket.socketpair()
    was_read, read_in_time = gevent.event.Event(), []

    def read() -> None:
        ours.recv(1)
        was_read.set()

    reader = gevent.spawn(read)
    gevent.sleep(0)  # from here on it waits for its socket
    served.registry.register(_Slow("first", lambda: theirs.send(b"!")))
    served.registry.register(_Slow("second"))
    served.registry.register(_Slow("third", lambda: read_in_time.append(was_read.is_set())))
    _, body = served.ask("/metrics")
    assert b"\nthird 1.0\n" in body
    assert read_in_time == [True]
    reader.join(LIMIT)
    ours.close()
    theirs.close()


def test_work_in_slices_is_all_done_in_order() -> None:
    assert list(in_slices(range(10))) == list(range(10))


# Health ------------------------------------------------------------------------------------------


def test_health_is_what_the_gateway_says(served: Ops) -> None:
    response, body = served.ask("/health")
    assert response.status == 200
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"status": "ok", "sessions": 2}


def test_ready_is_told_apart_from_alive(served: Ops) -> None:
    assert served.ask("/readyz")[0].status == 200
    served.unready = "draining"
    response, body = served.ask("/readyz")
    assert (response.status, body) == (503, b"not ready: draining\n")
    assert served.ask("/livez")[0].status == 200


def test_head_is_get_without_a_body(served: Ops) -> None:
    _, body = served.ask("/metrics")
    connection = HTTPConnection("127.0.0.1", served.port, timeout=LIMIT)
    connection.request("HEAD", "/metrics")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    assert int(response.headers["Content-Length"]) == len(body)
    connection.request("GET", "/livez")  # of a body this would be the next answer
    assert connection.getresponse().read() == b"ok\n"
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metrics/", 404), ("POST", "/metrics", 405)],
)
def test_anything_else_is_refused(served: Ops, method: str, path: str, status: int) -> None:
    assert served.ask(path, method=method)[0].status == status


def test_a_failure_is_a_500_and_the_next_request_is_answered(
    served: Ops, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("no idea")

    served.health = fail
    assert served.ask("/health")[0].status == 500
    assert "no idea" in "".join(capsys.readouterr())
    assert served.ask("/livez")[0].status == 200


# Connections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: "])
def test_a_connection_without_a_request_is_dropped(
    served: Ops,
    said: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_SECONDS", 0.02)
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as sock:
        sock.sendall(said)
        while sock.recv(4096):
            pass
    assert "Traceback" not in "".join(capsys.readouterr())
    assert served.ask("/livez")[0].status == 200


def test_a_scraper_may_be_idle_for_longer(served: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_SECONDS", 0.2)
    connection = HTTPConnection("127.0.0.1", served.port, timeout=LIMIT)
    connection.request("GET", "/metrics")
    connection.getresponse().read()
    local = connection.sock.getsockname()
    # A connection that comes later and asks nothing is dropped: the scraper was idle for longer.
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as unasked:
        assert unasked.recv(1) == b""
    connection.request("GET", "/metrics")
    assert connection.sock.getsockname() == local
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/nothing"])
def test_only_scrapers_keep_their_connections(served: Ops, path: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=1) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(4096), b""))  # to its end
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("path", [None, "/livez", "/metrics"])
def test_idle_connections_do_not_block_the_port(
    served: Ops, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_SECONDS", 0.3)
    with contextlib.ExitStack() as idle:
        for _ in range(connections.MAX_CONNECTIONS):
            sock = socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT)
            idle.enter_context(sock)
            if path is not None:
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert sock.recv(4096)
        began = time.monotonic()
        assert served.ask("/livez")[0].status == 200
        assert time.monotonic() - began < 2


def test_a_port_that_is_taken_is_an_error(served: Ops) -> None:
    second = OpsServer("127.0.0.1", served.port, served.registry, dict, lambda: None)
    with pytest.raises(OSError, match="in use"):
        second.start()
    second.stop()  # must not raise after a failed start
    assert served.ask("/livez")[0].status == 200


def test_after_a_stop_connections_are_refused(served: Ops) -> None:
    served.server.stop()
    with pytest.raises(ConnectionRefusedError):
        served.ask("/livez")


class Stranger:
    """A connection that is used byte by byte."""

    def __init__(self, served: Ops) -> None:
        self.sock = socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT)

    def send(self, data: bytes) -> None:
        """Send; no matter if the gateway has closed the connection."""
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def rest(self) -> bytes:
        """What comes until the gateway closes the connection."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := self.sock.recv(65536):
                received += data
        return received

    def is_open(self) -> bool:
        """Whether the connection is open, and nothing was received."""
        self.sock.setblocking(False)
        try:
            return self.sock.recv(1) != b""
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        finally:
            self.sock.settimeout(LIMIT)


@pytest.fixture
def stranger(served: Ops) -> Iterator[Callable[[], Stranger]]:
    """Makes connections, and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def make() -> Stranger:
            stranger = Stranger(served)
            stack.callback(stranger.sock.close)
            return stranger

        yield make


def open_connections(served: Ops) -> int:
    return len(served.server._server.connections)


GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "drops",
    [
        [b"GET /livez HTTP/1.1\r\n"] + [b"x"] * 1000,
        [b"\r\n"] + [b"G"] * 1000,
        [GET] + [b"a: b\r\n"] * 1000,
    ],
)
def test_a_head_that_comes_in_drops_is_dropped_in_time(
    served: Ops,
    stranger: Callable[[], Stranger],
    drops: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_SECONDS", 0.1)
    slow = stranger()
    began = time.monotonic()
    for drop in drops:
        slow.send(drop)
        gevent.sleep(0.01)
        if not slow.is_open():
            break
    assert time.monotonic() - began < 5
    wait_until(lambda: open_connections(served) == 0, "it is dropped")
    assert served.ask("/livez")[0].status == 200


def test_further_heads_have_a_limit_too(
    served: Ops, stranger: Callable[[], Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    slow = stranger()
    slow.send(GET + b"\r\n" + GET)
    assert slow.rest().startswith(b"HTTP/1.1 200 OK\r\n")
    assert open_connections(served) == 0


def test_an_idle_scraper_is_dropped_in_the_end(
    served: Ops, stranger: Callable[[], Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.1)
    idle = stranger()
    idle.send(GET + b"\r\n")
    answer = idle.rest()
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 1
    assert b"Connection: close" not in answer


def test_who_does_not_read_the_answers_is_dropped(
    served: Ops, stranger: Callable[[], Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.1)
    family = GaugeMetricFamily("big", "x" * 1_000_000, value=1)

    class Big(Collector):
        def collect(self) -> Iterator[GaugeMetricFamily]:
            yield family

    served.registry.register(Big())
    deaf = stranger()
    deaf.send((GET + b"\r\n") * 50)  # more than the kernel holds for it
    wait_until(lambda: open_connections(served) == 1, "it is served")
    wait_until(lambda: open_connections(served) == 0, "it is dropped")
    assert served.ask("/livez")[0].status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 60_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"a: bbbbbbbbbbbbbbbbbbbb\r\n" * 3000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + (b"a: " + b"b" * 10_000 + b"\r\n") * 90,
        b"GET /" + b"a" * 60_000,
    ],
)
def test_a_head_has_a_greatest_length(
    served: Ops,
    stranger: Callable[[], Stranger],
    head: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_SECONDS", 60.0)  # so it is not the time
    long = stranger()
    long.send(head)
    answer = long.rest()
    assert not answer or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 414 "))
    assert served.ask("/livez")[0].status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 1000000000000\r\n\r\n",
        b"Content-Length: 5\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n",
        b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_no_body_is_waited_for_or_read(
    served: Ops, stranger: Callable[[], Stranger], method: bytes, body: bytes
) -> None:
    sender = stranger()
    sender.send(GET.replace(b"GET", method) + body)
    status = b"405" if method == b"POST" else b"200"
    assert sender.sock.recv(12) == b"HTTP/1.1 " + status
    assert sender.rest()  # and it is closed
    assert open_connections(served) == 0


@pytest.mark.parametrize("said", [b"", b"GET /me", GET, GET + b"\r\n", GET + b"\r\n" + GET])
def test_a_crowd_of_strangers_keeps_no_scraper_out_and_holds_no_more_files(
    served: Ops, stranger: Callable[[], Stranger], said: bytes
) -> None:
    most = connections.MAX_CONNECTIONS + connections._CLOSING_CONNECTIONS
    for _ in range(2 * most):
        stranger().send(said)
    assert open_connections(served) <= connections.MAX_CONNECTIONS
    for path in ("/livez", "/metrics", "/readyz"):
        began = time.monotonic()
        assert served.ask(path)[0].status == 200
        assert time.monotonic() - began < 2
    assert served.server._server.open_now <= most
    wait_until(
        lambda: served.server._server.open_now <= connections.MAX_CONNECTIONS,
        "those that made way are closed",
    )


def test_who_has_asked_nothing_makes_way_before_a_scraper_and_the_oldest_first(
    served: Ops, stranger: Callable[[], Stranger]
) -> None:
    scraper = stranger()
    scraper.send(GET + b"\r\n")
    assert scraper.sock.recv(65536)
    silent = [stranger() for _ in range(connections.MAX_CONNECTIONS - 1)]
    wait_until(lambda: open_connections(served) == connections.MAX_CONNECTIONS, "all are in")
    late = stranger()
    assert silent[0].rest() == b""
    assert all(one.is_open() for one in [*silent[1:], late])
    scraper.send(GET + b"\r\n")
    assert b"200 OK" in scraper.sock.recv(65536)


def test_garbage_is_answered_or_hung_up_on_and_leaves_no_traceback(
    served: Ops, stranger: Callable[[], Stranger], capfd: pytest.CaptureFixture[str]
) -> None:
    for garbage in (
        b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /metrics HTTP/1\r\n\r\n",
        b"GET /metrics HTTP/x.y\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"POST /metrics\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n folded\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET /%ff%00%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        bytes(range(256)) + b"\r\n\r\n",
        GET + b"Connection: close\r\n\r\n" + bytes(range(256)),
    ):
        sender = stranger()
        sender.send(garbage)
        sender.sock.shutdown(socket.SHUT_WR)
        sender.rest()
    assert served.ask("/livez")[0].status == 200
    assert "Traceback" not in "".join(capfd.readouterr())


# Who may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "localhost#.evil.example"},
        {"Host": "evil@127.0.0.1"},
        {"Host": "127.0.0.1:80:80"},
        {"Host": ""},
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/health", "/nothing"])
def test_web_pages_of_other_origins_are_refused(
    served: Ops, headers: dict[str, str], path: str
) -> None:
    response, body = served.ask(path, headers=headers)
    assert response.status == 403
    assert response.headers["Connection"] == "close"
    assert b"bargein_" not in body
    for host in ("localhost", "127.0.0.1:9464", "[::1]"):
        assert served.ask(path, headers={"Host": host})[0].status in (200, 404)


def test_an_old_health_check_that_names_no_host_is_served(
    served: Ops, stranger: Callable[[], Stranger]
) -> None:
    old = stranger()
    old.send(b"GET /livez HTTP/1.0\r\n\r\n")
    assert old.rest().endswith(b"\r\n\r\nok\n")


def test_where_it_listens_beyond_loopback_a_scraper_may_use_any_name() -> None:
    registry = CollectorRegistry()
    server = OpsServer("0.0.0.0", 0, registry, dict, lambda: None)
    server.start()
    connection = HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
    for headers, status in (
        ({"Host": "bargein:9464"}, 200),
        ({"Host": "bargein:9464", "Origin": "https://evil.example"}, 403),
    ):
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()
    server.stop()


# The loop's lag ----------------------------------------------------------------------------------


class Lag:
    """A lag meter whose clock is moved by hand."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.now = 1000.0
        self.meter = LoopLag(
            Histogram("lag", "-", buckets=(0.001, 0.1, 1.0), registry=self.registry),
            clock=lambda: self.now,
        )
        self.due_in = INTERVAL_SECONDS

    def tick(self, late: float) -> None:
        self.now += self.due_in + late
        self.due_in = self.meter.tick()

    def count(self, le: str = "+Inf") -> float | None:
        return self.registry.get_sample_value("lag_bucket", {"le": le})

    @property
    def total(self) -> float:
        return self.registry.get_sample_value("lag_sum") or 0.0


def test_ticks_in_time_are_no_lag_and_a_late_one_does_not_make_the_next_late() -> None:
    lag = Lag()
    for late in (0.0, 0.05, 0.0):
        lag.tick(late)
    assert (lag.count("0.001"), lag.count()) == (2, 3)
    assert lag.total == pytest.approx(0.05)


def test_a_stall_counts_for_each_tick_that_it_swallowed() -> None:
    lag = Lag()
    lag.tick(late=3 * INTERVAL_SECONDS + 0.05)
    assert lag.count() == 4
    assert lag.total == pytest.approx(0.35 + 0.25 + 0.15 + 0.05)
    assert 0 < lag.due_in <= INTERVAL_SECONDS


def test_after_a_very_long_stall_time_begins_anew() -> None:
    lag = Lag()
    lag.tick(late=3600.0)
    assert lag.count() == loop_lag._MAX_TICKS
    assert lag.due_in == pytest.approx(INTERVAL_SECONDS)
    lag.tick(late=0.0)
    assert lag.count("0.001") == 1


def test_a_stalled_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "INTERVAL_SECONDS", 0.01)
    metrics = Metrics(CollectorRegistry())
    meter = LoopLag(metrics.loop_lag_seconds)
    meter.start()
    gevent.sleep(0)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass  # no other greenlet can run
    wait_until(lambda: _at_least(metrics, 0.1), "the stall is in the histogram")
    meter.stop()


def _at_least(metrics: Metrics, seconds: float) -> bool:
    value = metrics.registry.get_sample_value
    total = value("bargein_loop_lag_seconds_count") or 0.0
    below = value("bargein_loop_lag_seconds_bucket", {"le": str(seconds)}) or 0.0
    return total > below

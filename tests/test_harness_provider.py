"""The test provider itself, looked at through raw sockets: what it sends, and what it notices."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
import struct
import subprocess
import sys
import time
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Literal

import pytest

from tests.harness import scripts
from tests.harness.process import ROOT
from tests.harness.provider_process import ProviderProcess
from tests.harness.scripts import Script

Port = Literal["http", "tls", "mute", "full"]

AT_ONCE_SECONDS = 0.1  # measured: 0.1 to 3 ms; the rest is for a busy machine
TEXTS = ["Hello", ", wörld", " 你好"]


@pytest.fixture(scope="module")
def provider() -> Iterator[ProviderProcess]:
    with ProviderProcess() as running:
        yield running


# The client's side ------------------------------------------------------------------------------


def connect(provider: ProviderProcess, port: Port = "http") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", provider.ports[port]), timeout=5)
    if port != "tls":
        return client
    return ssl.create_default_context(cafile=provider.ca_file).wrap_socket(
        client, server_hostname="127.0.0.1"
    )


def request(script: str) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": script}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def receive(client: socket.socket, size: int) -> bytes:
    """Exactly so many bytes, fewer only when the provider ends the connection."""
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def answer_of(client: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    """One whole response, as the standard library reads it."""
    with closing(http.client.HTTPResponse(client, method="POST")) as response:
        response.begin()
        return response, response.read()


def sent(step: scripts.Step) -> bytes:
    return b64decode(step.get("send", ""))


def wire(script: Script) -> bytes:
    """What the sends of a script amount to (those inside a repeat not counted)."""
    return b"".join(map(sent, script))


def events(body: bytes) -> list[Any]:
    """The SSE events of a body: decoded JSON, or the bare text where it is none."""
    assert body.endswith(b"\n\n")
    datas = [event.removeprefix("data: ") for event in body.decode()[:-2].split("\n\n")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def text_of(body: bytes) -> str:
    deltas = [
        choice["delta"]
        for event in events(body)
        if event != "[DONE]"
        for choice in event.get("choices", [])
    ]
    return "".join(delta.get("content", "") for delta in deltas)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# Answers that end properly ----------------------------------------------------------------------


def test_an_answer_looks_as_openai_sends_it(provider: ProviderProcess) -> None:
    name = provider.fresh(scripts.answer(TEXTS))
    with connect(provider) as client:
        client.sendall(request(name))
        response, body = answer_of(client)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Transfer-Encoding"] == "chunked"
    first, *middle, finish, usage, done = events(body)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in (first, *middle, finish, usage)} == {
        "chat.completion.chunk"
    }
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in middle] == TEXTS
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"] == scripts.USAGE


@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        (scripts.answer(TEXTS), 200, "".join(TEXTS)),
        (scripts.answer(TEXTS, rate=1000), 200, "".join(TEXTS)),
        (scripts.plain_content_length(TEXTS), 200, "".join(TEXTS)),
        (scripts.raw([b"data: ", b'{"choices": []}', b"\n", b"\n"]), 200, ""),
        (scripts.error_in_stream("overloaded", TEXTS), 200, "".join(TEXTS)),
        (scripts.http_error(429, {"error": {"message": "slow down"}}), 429, None),
        (scripts.http_error(503, "busy", {"Retry-After": "1"}), 503, None),
        (scripts.not_sse(), 200, None),
        (scripts.one_long_line(200_000), 200, None),
    ],
)
@pytest.mark.parametrize("port", ["http", "tls"])
def test_a_proper_end_leaves_the_connection_to_the_next_request(
    provider: ProviderProcess, port: Port, script: Script, status: int, text: str | None
) -> None:
    name = provider.fresh(script)
    with connect(provider, port) as client:
        for number in (1, 2):
            client.sendall(request(name))
            response, body = answer_of(client)
            assert response.status == status
            if text is not None:
                assert text_of(body) == text
            provider.wait_script_done(number, name)
        first, second = provider.posts(name)
        assert first.conn == second.conn
        assert second.number > first.number
        assert provider.open_connections(name) == [first.conn]
    closed = provider.wait_closed(first.conn)
    assert (closed.by, closed.mid_script, closed.script) == ("client_eof", False, name)


def test_a_request_that_was_pipelined_is_answered_after_the_first(
    provider: ProviderProcess,
) -> None:
    one, two = provider.fresh(scripts.answer(["one"])), provider.fresh(scripts.answer(["two"]))
    with connect(provider) as client:
        client.sendall(request(one) + request(two))
        data = receive(client, len(wire(scripts.answer(["one"]) + scripts.answer(["two"]))))
    assert data == wire(scripts.answer(["one"]) + scripts.answer(["two"]))


def test_a_request_is_played_only_when_it_is_all_there(provider: ProviderProcess) -> None:
    name = provider.fresh(scripts.answer(["x"]))
    whole = request(name)
    with connect(provider) as client:
        client.sendall(whole[:-1])
        provider.counts()
        assert provider.posts(name) == []
        client.sendall(whole[-1:])
        assert answer_of(client)[0].status == 200
    assert provider.wait_post(script=name)


def test_anything_but_a_post_is_refused(provider: ProviderProcess) -> None:
    with connect(provider) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(client)[0].status == 405


def test_an_http_error_carries_its_headers_and_body(provider: ProviderProcess) -> None:
    name = provider.fresh(scripts.http_error(429, {"error": "why"}, {"Retry-After": "7"}))
    with connect(provider) as client:
        client.sendall(request(name))
        response, body = answer_of(client)
    assert response.headers["Retry-After"] == "7"
    assert json.loads(body) == {"error": "why"}


def test_one_long_line_has_exactly_the_bytes_that_were_asked_for(
    provider: ProviderProcess,
) -> None:
    for size in (7, 65536 + 6, 1_000_000):
        with connect(provider) as client:
            client.sendall(request(provider.fresh(scripts.one_long_line(size))))
            _, body = answer_of(client)
        assert size in {len(line) for line in body.split(b"\n")}


def test_the_end_waits_for_its_key(provider: ProviderProcess) -> None:
    key = provider.unique("key")
    script = scripts.finish_on_release(TEXTS, key)
    name = provider.fresh(script)
    held_back = wire(scripts.ending())
    with connect(provider) as client:
        client.sendall(request(name))
        before = receive(client, len(wire(script)) - len(held_back))
        assert before + held_back == wire(script)
        provider.release(key)
        assert receive(client, len(held_back)) == held_back
        provider.wait_script_done(script=name)
        client.sendall(request(name))  # a key stays released
        assert receive(client, len(wire(script))) == wire(script)


def test_a_name_that_nobody_defined_gets_a_story_without_end(provider: ProviderProcess) -> None:
    name = provider.unique("nobody-defined-this")
    with connect(provider) as client:
        began = time.monotonic()
        client.sendall(request(name))
        data = b""
        while b"tok5" not in data:
            data += client.recv(65536)
        assert b"tok0" in data
        assert time.monotonic() - began >= 5 / 30
    assert provider.wait_closed(provider.wait_post(script=name).conn).mid_script


# Answers that fall silent -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        scripts.idle_mid_stream(TEXTS),
        scripts.stalled_inside_chunk(TEXTS),
        scripts.gzip_idle(TEXTS),
        scripts.http10_idle(TEXTS),
        scripts.no_headers(),
        scripts.headers_only(),
        scripts.done_but_open(TEXTS),
    ],
)
@pytest.mark.parametrize("port", ["http", "tls"])
def test_silence_lasts_until_the_client_goes(
    provider: ProviderProcess, port: Port, script: Script
) -> None:
    name = provider.fresh(script)
    with connect(provider, port) as client:
        client.sendall(request(name))
        assert receive(client, len(wire(script))) == wire(script)
        post = provider.wait_post(script=name)
        assert provider.open_connections(name) == [post.conn]
        left = time.monotonic()
    closed = provider.wait_closed(post.conn)
    assert closed.time - left < AT_ONCE_SECONDS
    assert closed.mid_script
    assert closed.by in {"client_eof", "client_reset"}  # unread TLS tickets make it a reset
    assert closed.sent_bytes == len(wire(script))


def test_gzip_can_be_read_event_by_event() -> None:
    pieces = scripts.gzip_pieces(map(scripts.text_event, TEXTS))
    gunzip = zlib.decompressobj(wbits=31)
    assert [gunzip.decompress(piece) for piece in pieces] == [*map(scripts.text_event, TEXTS)]


def test_a_stalled_chunk_is_announced_larger_than_it_comes() -> None:
    half = sent(scripts.stalled_inside_chunk(TEXTS)[-2])
    size, _, data = half.partition(b"\r\n")
    assert 0 < len(data) < int(size, 16)


def test_heads_say_how_their_body_ends() -> None:
    assert b"Transfer-Encoding: chunked" in scripts.sse_head()
    assert b"HTTP/1.0 200 OK" in scripts.sse_head(http10=True)
    for head in (scripts.sse_head(http10=True), scripts.sse_head(content_length=5)):
        assert b"chunked" not in head
    assert b"Content-Length: 5" in scripts.sse_head(content_length=5)
    assert b"Content-Encoding: gzip" in scripts.sse_head(gzip=True)


# Answers that break off -------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["http", "tls"])
def test_a_truncated_answer_ends_in_order_but_too_early(
    provider: ProviderProcess, port: Port
) -> None:
    name = provider.fresh(scripts.truncated(TEXTS))
    with connect(provider, port) as client:
        client.sendall(request(name))
        with pytest.raises(http.client.IncompleteRead) as broken:
            answer_of(client)
    assert text_of(broken.value.partial) == "".join(TEXTS)
    assert provider.wait_closed(provider.wait_post(script=name).conn).by == "provider"


@pytest.mark.parametrize("port", ["http", "tls"])
def test_a_reset_arrives_as_a_reset_after_the_texts(provider: ProviderProcess, port: Port) -> None:
    script = scripts.reset_mid_stream(TEXTS)
    name = provider.fresh(script)
    with connect(provider, port) as client:
        client.sendall(request(name))
        assert receive(client, len(wire(script))) == wire(script)
        with socket.socket(fileno=client.detach()) as bare:  # Python's ssl makes an EOF of it
            bare.settimeout(5)
            with pytest.raises(ConnectionResetError):
                bare.recv(1)
    assert provider.wait_closed(provider.wait_post(script=name).conn).by == "provider"


# A disconnect is noticed at once, whatever the script is doing -----------------------------------

MARK = scripts.mark("there")
SILENT: dict[str, Script] = {
    "wait": [MARK, scripts.wait("never")],
    "sleep": [MARK, scripts.sleep(600)],
    "hang": [MARK, scripts.hang()],
    "repeated sleep": [scripts.repeat([MARK, scripts.sleep(0.01)])],
    "repeated wait": [scripts.repeat([scripts.repeat([MARK, scripts.wait("never")], 2)])],
    "busy repeat": [MARK, scripts.repeat([scripts.sleep(0)])],
}


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("step", SILENT)
@pytest.mark.parametrize("port", ["http", "tls"])
def test_a_disconnect_is_noticed_at_once_in_a_step_that_waits(
    provider: ProviderProcess, port: Port, step: str, leave: Callable[[socket.socket], None]
) -> None:
    name = provider.fresh(SILENT[step])
    with connect(provider, port) as client:
        client.sendall(request(name))
        conn = provider.wait_mark("there", script=name).conn
        left = time.monotonic()
        leave(client)
    closed = provider.wait_closed(conn)
    assert closed.time - left < AT_ONCE_SECONDS
    assert closed.mid_script
    if port == "http":
        assert closed.by == ("client_reset" if leave is reset else "client_eof")


@pytest.mark.parametrize("port", ["http", "tls"])
def test_a_disconnect_is_noticed_at_once_in_a_send_that_nobody_reads(
    provider: ProviderProcess, port: Port
) -> None:
    name = provider.fresh(scripts.flood())
    with connect(provider, port) as client:
        client.sendall(request(name))
        conn = provider.wait_blocked(script=name).conn
        taken = provider.counts().sent_bytes
        assert provider.counts().sent_bytes == taken
        left = time.monotonic()
    closed = provider.wait_closed(conn)
    assert closed.time - left < AT_ONCE_SECONDS
    assert (closed.by, closed.mid_script) == ("client_reset", True)


@pytest.mark.parametrize("port", ["http", "tls"])
def test_a_disconnect_is_noticed_at_once_in_a_flood_that_is_read(
    provider: ProviderProcess, port: Port
) -> None:
    name = provider.fresh(scripts.flood())
    with connect(provider, port) as client:
        client.sendall(request(name))
        megabytes = receive(client, 4 << 20)
        assert megabytes.count(b"flood ") > 10_000
        left = time.monotonic()
    closed = provider.wait_closed(provider.wait_post(script=name).conn)
    assert closed.time - left < AT_ONCE_SECONDS
    assert closed.sent_bytes >= 4 << 20


def test_a_flood_to_one_client_leaves_room_for_another(provider: ProviderProcess) -> None:
    flood = provider.fresh(scripts.flood())
    with connect(provider) as flooded, connect(provider) as client:
        flooded.sendall(request(flood))
        client.sendall(request(provider.fresh(scripts.answer(TEXTS))))
        assert text_of(answer_of(client)[1]) == "".join(TEXTS)


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("said", [b"", b"POST /v1", request("x")[:-1]])
def test_a_disconnect_is_noticed_at_once_before_a_request_is_whole(
    provider: ProviderProcess, said: bytes, leave: Callable[[socket.socket], None]
) -> None:
    began = time.monotonic()
    with connect(provider) as client:
        conn = provider.wait_connected(port="http", since=began).conn
        client.sendall(said)
        left = time.monotonic()
        leave(client)
    closed = provider.wait_closed(conn)
    assert closed.time - left < AT_ONCE_SECONDS
    assert (closed.script, closed.mid_script) == (None, False)


# The other ports --------------------------------------------------------------------------------


def test_tls_is_vouched_for_by_the_ca_file_alone(provider: ProviderProcess) -> None:
    name = provider.fresh(scripts.answer(TEXTS))
    began = time.monotonic()
    with connect(provider, "tls") as client:
        assert provider.wait_connected(port="tls", since=began)
        client.sendall(request(name))
        assert text_of(answer_of(client)[1]) == "".join(TEXTS)
    stranger = socket.create_connection(("127.0.0.1", provider.ports["tls"]), timeout=5)
    with stranger, pytest.raises(ssl.SSLCertVerificationError):
        ssl.create_default_context().wrap_socket(stranger, server_hostname="127.0.0.1")


def test_a_handshake_with_the_mute_port_stays_pending_and_its_end_is_seen(
    provider: ProviderProcess,
) -> None:
    began = time.monotonic()
    client = ssl.create_default_context(cafile=provider.ca_file).wrap_socket(
        connect(provider, "mute"), server_hostname="127.0.0.1", do_handshake_on_connect=False
    )
    with client:
        client.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        conn = provider.wait_connected(port="mute", since=began).conn
        assert conn in provider.open_connections()
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        left = time.monotonic()
    closed = provider.wait_closed(conn)
    assert closed.time - left < AT_ONCE_SECONDS
    assert (closed.by, closed.sent_bytes) == ("client_eof", 0)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the full port needs Linux")


@linux_only
def test_connecting_to_the_full_port_hangs(provider: ProviderProcess) -> None:
    assert provider.full_base_url.startswith("http://127.0.0.1:")
    # Past the first retransmission of the SYN, after 1 s, which a freed backlog would answer.
    with pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", provider.ports["full"]), timeout=1.2)


@linux_only
def test_who_hangs_in_connect_is_seen_and_so_is_that_they_gave_up(
    provider: ProviderProcess,
) -> None:
    for _ in range(2):
        began = time.monotonic()
        with socket.socket() as client, socket.socket() as other:
            for one in (client, other):
                one.setblocking(False)
                assert one.connect_ex(("127.0.0.1", provider.ports["full"])) == errno.EINPROGRESS
            conns = [provider.wait_connecting(n, since=began).conn for n in (1, 2)]
            left = time.monotonic()
        for conn in conns:
            closed = provider.wait_closed(conn)
            assert closed.by == "client_gave_up"
            assert closed.time - left < AT_ONCE_SECONDS


# The journal and the process --------------------------------------------------------------------


def test_a_post_is_journalled_with_what_was_asked_and_when(provider: ProviderProcess) -> None:
    name = provider.fresh(scripts.answer([]))
    began = time.monotonic()
    with connect(provider) as client:
        client.sendall(request(name))
        answer_of(client)
    ended = time.monotonic()
    post = provider.wait_post(script=name)
    assert began < post.time < ended
    assert post.path == "/v1/chat/completions"
    assert post.headers["host"] == "x"
    assert post.body == {"messages": [{"role": "user", "content": name}]}
    assert provider.posts(name) == [post]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'{"messages": [{"content": [1]}]}'])
def test_a_body_that_names_no_script_is_journalled_and_gets_the_story(
    provider: ProviderProcess, body: bytes
) -> None:
    before = len(provider.posts(""))
    with connect(provider) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        head = b"HTTP/1.1 200 OK"
        assert receive(client, len(head)) == head
    assert provider.wait_post(before + 1, script="").path == "/"


def test_marks_come_in_the_order_of_the_script(provider: ProviderProcess) -> None:
    inner = scripts.repeat([scripts.mark("in")], 2)
    name = provider.fresh([scripts.mark("first"), inner, *scripts.answer([]), scripts.mark("last")])
    with connect(provider) as client:
        client.sendall(request(name))
        last = provider.wait_mark("last", script=name)
    first = provider.wait_mark("first", script=name)
    assert first.time <= provider.wait_mark("in", 2, script=name).time <= last.time
    assert provider.wait_script_done(script=name).time >= last.time
    with pytest.raises(AssertionError):
        provider.wait_mark("in", 3, script=name, timeout=0)


def test_counts_cover_what_is_open_and_what_is_over(provider: ProviderProcess) -> None:
    script = scripts.idle_mid_stream(TEXTS)
    name = provider.fresh(script)
    before = provider.counts()
    with connect(provider) as client:
        client.sendall(request(name))
        receive(client, len(wire(script)))
        during = provider.counts()
    provider.wait_closed(provider.posts(name)[0].conn)
    after = provider.counts()
    assert during.posts == after.posts == before.posts + 1
    assert during.sent_bytes == after.sent_bytes == before.sent_bytes + len(wire(script))
    assert after.open == during.open - 1
    assert [closed.mid_script for closed in provider.closes(name)] == [True]
    assert provider.open_connections(name) == []


@pytest.mark.parametrize(
    "step",
    [{}, {"send": "not base64!"}, {"sleep": "1"}, {"repeat": [], "times": 1}, {"jump": True}],
)
def test_a_step_that_is_none_is_refused_when_it_is_defined(
    provider: ProviderProcess, step: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"not a step|base64"):
        provider.script("bad", [scripts.mark("good"), step])


def test_a_wait_that_fails_shows_the_journal(provider: ProviderProcess) -> None:
    name = provider.fresh(scripts.answer([]))
    with connect(provider) as client:
        client.sendall(request(name))
        post = provider.wait_post(script=name)
    with pytest.raises(AssertionError, match="2 POSTs") as failure:
        provider.wait_post(2, script=name, timeout=0)
    assert str(post) in str(failure.value)


def test_leaving_ends_the_process_and_what_waits_for_it() -> None:
    with ProviderProcess() as provider:
        address = ("127.0.0.1", provider.ports["http"])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    with pytest.raises(AssertionError, match="the provider is gone"):
        provider.wait_post()


@pytest.mark.parametrize("ending", ["stdin", "control"])
def test_the_process_ends_with_its_parent(ending: str, tmp_path: Any) -> None:
    command = [sys.executable, "-m", "tests.harness.provider", "--ca-file", tmp_path / "ca.pem"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", ports["control"])) as control:
            (process.stdin if ending == "stdin" else control).close()
            assert process.wait(timeout=5) == 0

"""Clients that do not read, over a real WebSocket with small buffers."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import TypeAlias

import gevent
import pytest

from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.server.outbox import MAX_CONTROL_FRAMES, OutboxSettings
from gateway.server.server import ServerSettings
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.provider_process import ProviderProcess

MakeGateway: TypeAlias = Callable[..., Gateway]

SMALL = 4096
"""Receive buffer of a client that is soon full, in bytes (the kernel doubles it)."""

QUEUE_BYTES = 1024 * 1024
"""What the gateway queues for one client, as it is set by default."""

KERNEL_CHARS = 256 * 1024
"""More than the kernel may hold for such a client, and much less than a full queue."""


def value(gateway: Gateway, name: str) -> float:
    found = gateway.metrics.registry.get_sample_value(name)
    assert found is not None
    return found


def fill(client: Client, provider: ProviderProcess, script: scripts.Script) -> tuple[str, int]:
    """Start a request and read nothing of it, until its provider is held up by that.

    Returns:
        The id of the request, and its provider connection.
    """
    name = provider.fresh(script)
    request_id = client.request(name)
    conn = provider.wait_post(script=name).conn
    provider.wait_blocked(script=name)
    return request_id, conn


def assert_whole_answer(client: Client, provider: ProviderProcess) -> None:
    texts = [f"word{number} " for number in range(200)]
    request_id = client.request(provider.fresh(scripts.answer(texts)))
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert client.text_of(request_id) == "".join(texts)
    assert client.wire_error is None


def test_an_interrupt_towards_a_client_that_does_not_read_closes_the_stream_and_drops_the_queue(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        request_id, conn = fill(client, provider, scripts.flood("x" * 200))
        assert value(gateway, "bargein_frames_purged_total") == 0
        sent_at = time.monotonic()
        client.interrupt(request_id)
        closed = provider.wait_closed(conn)  # although the client has read nothing yet
        assert closed.time - sent_at < 0.5
        purged = value(gateway, "bargein_frames_purged_total")
        assert purged > 0

        ack = client.wait_ack()
        assert_whole_answer(client, provider)
        assert ack.payload["status"] == "SUCCESS"
        (result,) = ack.payload["results"]
        assert result["stream_closed_ms"] < 500
        *data, terminal = client.frames_of(request_id)
        assert terminal.payload["interrupted"] is True
        assert all(client.frames.index(frame) < client.frames.index(ack) for frame in data)
        # Little more than the kernel held, of what was queued; and counted exactly.
        assert result["delivered_text_chars"] == len(client.text_of(request_id)) < KERNEL_CHARS
        assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))
        assert value(gateway, "bargein_frames_purged_total") == purged


def test_an_answer_that_waits_whole_in_the_queue_can_still_be_interrupted(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    """The provider has finished, the client has not read: it is live, and it is purged."""
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        texts = ["y" * 1000] * 800
        name = provider.fresh(scripts.answer(texts))
        request_id = client.request(name)
        provider.wait_script_done(script=name)

        def streams() -> int:
            census = gateway.supervision.census()
            assert census is not None
            return census.streams

        wait_until(lambda: streams() == 0, "the answer is in the queue")
        client.interrupt(request_id)
        ack = client.wait_ack()
        assert_whole_answer(client, provider)
        assert ack.payload["results"][0]["outcome"] == "STOPPED"
        assert ack.payload["status"] == "SUCCESS"
        *data, terminal = client.frames_of(request_id)
        assert terminal.payload["outcome"] == "INTERRUPTED"
        assert all(client.frames.index(frame) < client.frames.index(ack) for frame in data)
        delivered = ack.payload["results"][0]["delivered_text_chars"]
        assert delivered == len(client.text_of(request_id)) < KERNEL_CHARS


def test_an_interrupt_purges_its_own_request_and_no_other_of_the_same_client(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        texts = [f"keep{number} " * 20 for number in range(1000)]
        keep_name = provider.fresh(scripts.answer(texts))
        keep = client.request(keep_name)
        flood, conn = fill(client, provider, scripts.flood("x" * 200))
        client.interrupt(flood)
        provider.wait_closed(conn)
        client.wait_terminal(flood)
        while not any(frame.is_terminal for frame in client.frames_of(keep)):
            client.next()
        assert client.text_of(keep) == "".join(texts)
        *data, terminal = client.frames_of(keep)
        assert terminal.payload["outcome"] == "COMPLETED"
        assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))


def test_an_ack_goes_ahead_of_all_queued_data(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    with (
        Client(gateway.server.port, receive_buffer=SMALL) as client,
        Client(gateway.server.port) as other,
    ):
        flood, _ = fill(client, provider, scripts.flood("x" * 200))  # the queue is full of this
        script = provider.fresh(scripts.idle_mid_stream(["y"]))
        request_id = client.request(script)
        conn = provider.wait_post(script=script).conn
        client.interrupt(request_id)
        provider.wait_closed(conn)
        assert_whole_answer(other, provider)  # time enough to queue the ack
        ack, terminal = client.wait_ack(), client.wait_terminal(request_id)
        assert ack.payload["status"] == "SUCCESS"
        before = client.frames[: client.frames.index(terminal)]
        assert sum(len(frame.text) for frame in before) < KERNEL_CHARS
        assert not any(frame.is_terminal for frame in client.frames_of(flood))


def test_a_new_request_of_a_client_that_does_not_read_takes_the_place_of_what_was_queued(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        older, conn = fill(client, provider, scripts.flood("x" * 200))
        name = provider.fresh(scripts.answer(["new"]))
        newer = client.request(name)
        provider.wait_closed(conn)
        provider.wait_post(script=name)  # asked for, although the client reads nothing
        assert client.wait_terminal(newer).payload["outcome"] == "COMPLETED"
        assert len(client.text_of(older)) < KERNEL_CHARS
        (terminal,) = [frame for frame in client.frames_of(older) if frame.is_terminal]
        assert client.frames.index(terminal) < client.frames.index(client.frames_of(newer)[0])


def test_a_slow_client_slows_its_own_stream_and_nobody_elses(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with (
        Client(gateway.server.port, receive_buffer=SMALL) as slow,
        Client(gateway.server.port) as other,
    ):
        request_id, conn = fill(slow, provider, scripts.flood("x" * 200))
        sent_bytes = provider.counts().sent_bytes
        for _ in range(5):
            assert_whole_answer(other, provider)
        # Five whole answers went by, and the flood has stood still but for what buffers took.
        assert provider.counts().sent_bytes - sent_bytes < 16 * QUEUE_BYTES
        assert provider.closes() == [] or conn not in {c.conn for c in provider.closes()}
        # Whatever it reads makes room for more; nothing is lost, nothing twice.
        while len(slow.text_of(request_id)) < 3 * QUEUE_BYTES:
            for _ in range(100):
                slow.wait_text(request_id)
        data = slow.frames_of(request_id)
        assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))
        assert set(slow.text_of(request_id)) == {"x"}


def test_a_slow_client_is_held_to_its_bound(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    outbox = OutboxSettings(max_bytes=64 * 1024)
    gateway = make_gateway(server=ServerSettings(outbox=outbox))
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        script = [*scripts.flood("x" * 200, 1)]
        request_id, conn = fill(client, provider, script)
        client.drop()
        # All that the provider ever sent: what kernels held, and one bound; not megabytes.
        assert provider.wait_closed(conn).sent_bytes < 32 * QUEUE_BYTES
        assert request_id


def test_a_client_that_takes_nothing_is_dropped_and_counted_and_its_stream_closed(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    outbox = OutboxSettings(write_timeout=0.3)
    gateway = make_gateway(server=ServerSettings(outbox=outbox))
    with (
        Client(gateway.server.port, receive_buffer=SMALL) as client,
        Client(gateway.server.port) as other,
    ):
        request_id, conn = fill(client, provider, scripts.flood("x" * 200))
        assert provider.wait_closed(conn, timeout=3).by in ("client_eof", "client_reset")
        assert value(gateway, "bargein_slow_clients_total") == 1
        assert client.wait_closed() is None  # no close frame got through, of course
        assert not [frame for frame in client.frames if frame.is_terminal]
        assert client.frames_of(request_id)
        wait_until(lambda: gateway.server.connections == 1, "only the other is left")
        wait_until(lambda: value(gateway, "bargein_sessions_active") == 1, "its session is over")
        assert_whole_answer(other, provider)
        assert value(gateway, "bargein_slow_clients_total") == 1


def test_a_client_that_reads_slowly_but_steadily_is_not_dropped(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    outbox = OutboxSettings(write_timeout=0.4)
    gateway = make_gateway(server=ServerSettings(outbox=outbox))
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        request_id, _ = fill(client, provider, scripts.flood("x" * 200))
        for _ in range(10):  # in all, far longer than the limit
            before = len(client.text_of(request_id))
            while len(client.text_of(request_id)) < before + 32 * 1024:
                client.wait_text(request_id)
            gevent.sleep(0.08)
        assert value(gateway, "bargein_slow_clients_total") == 0
        client.interrupt(request_id)
        assert client.wait_ack().payload["status"] == "SUCCESS"


def test_a_client_that_sends_much_and_reads_nothing_is_not_read_from_beyond_the_bound(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with (
        Client(gateway.server.port, receive_buffer=SMALL) as client,
        Client(gateway.server.port) as other,
    ):
        check: dict[str, object] = {"version": "1.0", "msg_type": "HEALTH_CHECK", "payload": {}}
        rest = {"session_id": None, "timestamp": 0, "padding": "p" * 400}
        data = json.dumps({**check, **rest}).encode()
        sent = 0
        refusals_in_a_row = 0
        while refusals_in_a_row < 3:
            assert sent < 100_000, "the gateway reads on and on"
            if client.try_to_send_text(data):
                sent += 1
                refusals_in_a_row = 0
            else:  # the kernel is full: is it still, after the gateway had its turns?
                refusals_in_a_row += 1
                other.send("HEALTH_CHECK", {})
                other.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
        assert sent > MAX_CONTROL_FRAMES
        assert_whole_answer(other, provider)

        # It reads at last: an answer to each of those that it sent whole, none lost, none twice.
        while not client.finish_sending():
            client.next()
        last = client.request(provider.fresh(scripts.answer(["well"])))
        client.wait_terminal(last)
        answers = [frame for frame in client.frames if frame.msg_type == "HEALTH_CHECK_ACK"]
        assert len(answers) == client.texts_begun
        assert client.wire_error is None


def test_answers_that_nobody_reads_stay_within_a_bound_even_when_they_are_asked_for_at_once(
    gateway: Gateway,
) -> None:
    """One read of the shortest frames there are asks for thousands of errors."""
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        (connection,) = gateway.server._connections
        outbox = connection._outbox
        put, waiting = outbox.send_control, []

        def counting(payload: bytes, on_written: Callable[[float], None] | None = None) -> None:
            put(payload, on_written)
            waiting.append(len(outbox._control))

        outbox.send_control = counting  # type: ignore[method-assign]
        with client.one_packet():
            for _ in range(20_000):
                client.send_text(b"")
        wait_until(lambda: max(waiting, default=0) > MAX_CONTROL_FRAMES, "it is not read any more")
        with Client(gateway.server.port) as other:
            for _ in range(100):
                other.send("HEALTH_CHECK", {})
                other.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
        # The bound, and what had been read already.
        assert max(waiting) <= MAX_CONTROL_FRAMES + 64
        for _ in range(20_000):
            assert client.next().payload["error_code"] == "MALFORMED_PAYLOAD"


def test_a_client_that_is_not_read_from_is_not_taken_for_dead(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway(server=ServerSettings(ping_interval=0.1, ping_timeout=0.5))
    with (
        Client(gateway.server.port, receive_buffer=SMALL) as client,
        Client(gateway.server.port) as other,
    ):
        with client.one_packet():
            for _ in range(20_000):
                client.send_text(b"")
        while other.pings < 12:  # twice as long as anybody may leave a ping unanswered
            assert other.read_some()
        for _ in range(20_000):
            assert client.next().payload["error_code"] == "MALFORMED_PAYLOAD"


@pytest.mark.parametrize("piece", ["汉" * 5_000, "x" * 30_000, "😀" * 100], ids=len)
def test_a_killed_reader_leaves_no_half_frame_on_the_wire(
    gateway: Gateway, provider: ProviderProcess, piece: str
) -> None:
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        for number in itertools.count():
            request_id, conn = fill(client, provider, scripts.flood(piece, 4))
            client.interrupt(request_id)
            provider.wait_closed(conn)
            ack = client.wait_ack()
            assert client.wait_terminal(request_id).payload["interrupted"] is True
            (result,) = ack.payload["results"]
            assert result["delivered_text_chars"] == len(client.text_of(request_id))
            assert set(client.text_of(request_id)) <= set(piece)
            if number == 3:
                break
        assert_whole_answer(client, provider)
        client.close()
        assert client.wire_error is None


def test_a_shutdown_in_the_middle_of_a_frame_ends_with_whole_frames(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        request_id, conn = fill(client, provider, scripts.flood("汉" * 5_000, 4))
        client.send("SHUTDOWN", {"reason": "enough"})
        provider.wait_closed(conn)
        assert client.wait_closed() == 1000
        assert client.wire_error is None
        assert client.frames[-1].msg_type == "SHUTDOWN"
        (terminal,) = [frame for frame in client.frames_of(request_id) if frame.is_terminal]
        assert terminal.payload["interrupt_reason"] == "CLIENT_SHUTDOWN"


def test_a_client_that_vanishes_while_its_reader_waits_for_it_has_its_stream_closed(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port, receive_buffer=SMALL) as client:
        _, conn = fill(client, provider, scripts.flood("x" * 200))
        client.reset()
        provider.wait_closed(conn)
        wait_until(lambda: gateway.server.connections == 0, "the connection is gone")
        wait_until(lambda: value(gateway, "bargein_sessions_active") == 0, "so is its session")

"""The promises of the wire protocol, each over a real WebSocket."""

from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess


def test_an_answer_arrives_whole_and_in_order(client: Client, provider: ProviderProcess) -> None:
    script = provider.fresh(scripts.answer(["Hello", ", ", "world", "! 你好"]))
    request_id = client.request(script)
    terminal = client.wait_terminal(request_id)
    assert client.text_of(request_id) == "Hello, world! 你好"
    assert terminal.payload["outcome"] == "COMPLETED"
    *data, last = client.frames_of(request_id)
    assert last is terminal
    assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))


def test_an_interrupt_stops_the_stream_before_it_is_acknowledged(
    client: Client, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    request_id = client.request(script)
    client.wait_text(request_id)
    client.interrupt(request_id)
    ack = client.wait_ack()
    assert ack.payload["status"] == "SUCCESS"
    closed = provider.wait_closed(provider.wait_post(script=script).conn)
    assert closed.time <= ack.at
    assert client.wait_terminal(request_id).payload["interrupted"] is True

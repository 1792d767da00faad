"""The books balance: what the gateway counted is what its clients and its provider saw.

Random traffic from a seeded random: clients that ask, interrupt in any phase, too early and too
late, change their session, call functions, say what is refused, and leave in every way. Nobody says
in advance how anything ends: the clients count the frames that they got, the provider its POSTs.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import pytest
from prometheus_client import CollectorRegistry

from actors.loop.lanes import lanes
from gateway.app import Gateway
from metrics.instruments import Metrics
from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.provider_process import ProviderProcess

CLIENTS, ACTIONS = 4, 30
REASONS = ("USER_STOP", "USER_NEW_INPUT", "USER_VOICE_INPUT", "CLIENT_ERROR", "OTHER", "no such")
FUNCTION = {"name": "ring", "description": "rings", "parameters": {"type": "object"}}
TEXTS = ["Hello", ", ", "wörld 👋"]
_numbers = itertools.count(1)


class Talker:
    """A client that does random things, one after the other, and what it knows of them."""

    def __init__(self, gateway: Gateway, provider: ProviderProcess, seed: str) -> None:
        self.random = random.Random(seed)
        self.provider = provider
        self.scripts: set[str] = set()
        """What the provider may have been asked for."""
        self.lost: list[str] = []
        """Requests that were live when it hung up."""
        self.reasons: list[str] = []
        """Of its INTERRUPTs, in order: so come the acks."""
        self.pauses = 0
        """How often it has interrupted while the gateway waited to ask again."""
        self.client = Client(gateway.server.port, register=False)
        self.policy = self.random.choice(["interrupt", "parallel", "reject"])
        self.client.register(on_new_request=self.policy, function_calling=[FUNCTION])

    def run(self) -> None:
        actions = [
            *(self.ask, self.stop_the_story, self.stop_in_any_phase, self.stop_before_it_comes),
            *(self.stop_too_late, self.stop_nobody_knows_what, self.update, self.bad_update),
            *(self.call, self.stop_after_call, self.fail, self.recover, self.stop_in_the_pause),
            *(self.ask_twice, self.use_an_id_again, self.say_nonsense, self.speak),
            *(self.stop_speaking, self.stop_speaking_before, self.bad_request_stopped_before),
        ]
        for _ in range(ACTIONS):
            self.random.choice(actions)()
        self.random.choice([self.close, self.hang_up, self.say_goodbye])()

    # What it says.

    def script(self, steps: list[scripts.Step]) -> str:
        name = self.provider.fresh(steps, "books")
        self.scripts.add(name)
        return name

    def request(self, text: str, request_id: str | None = None, **fields: Any) -> str:
        request_id = request_id or self.new_id()
        content = {"text": text}
        payload = {"request_id": request_id, "data_type": "TEXT", "content": content, **fields}
        self.client.send("REQUEST", payload)
        return request_id

    def voice(self, request_id: str, *, is_last: bool) -> None:
        voice = base64.b64encode(b"\0\1").decode()
        payload = {
            "request_id": request_id,
            "data_type": "VOICE",
            "stream_flag": True,
            "stream_seq": -1 if is_last else 0,
            "content": {"voice_mode": "BASE64", "voice": voice},
        }
        self.client.send("REQUEST", payload)

    def interrupt(self, request_id: str | None) -> None:
        self.reasons.append(self.random.choice(REASONS))
        self.client.interrupt(request_id, self.reasons[-1])

    def new_id(self) -> str:
        return f"books_{next(_numbers)}"

    def story(self) -> str:
        return self.script(scripts.idle_mid_stream(TEXTS))

    def wait_story(self, request_id: str) -> None:
        self.until(lambda: self.client.text_of(request_id) == "".join(TEXTS))

    def wait_ended(self, request_id: str) -> None:
        self.until(lambda: self.has_ended(request_id))

    def wait_ack(self) -> None:
        self.until(lambda: len(self.acks) == len(self.reasons))

    def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert self.client.read_some(), "the connection has ended"

    # What it does. Each of these leaves nothing live.

    def ask(self) -> None:
        self.wait_ended(self.request(self.script(scripts.answer(TEXTS))))

    def stop_the_story(self) -> None:
        request_id = self.request(self.story())
        self.wait_story(request_id)
        self.interrupt(self.random.choice([request_id, None]))
        self.wait_ack()
        self.wait_ended(request_id)

    def stop_in_any_phase(self) -> None:
        script = self.script(self.random.choice([scripts.answer(TEXTS), scripts.no_headers()]))
        if self.random.random() < 0.5:
            request_id = self.request(script)
            gevent.sleep(self.random.uniform(0, 0.005))  # whatever it hits
            self.interrupt(request_id)
        else:
            with self.client.one_packet():
                request_id = self.request(script)
                self.interrupt(request_id)
        self.wait_ack()
        self.wait_ended(request_id)

    def stop_before_it_comes(self) -> None:
        request_id = self.new_id()
        self.interrupt(request_id)
        self.wait_ack()
        self.request(self.script(scripts.answer(TEXTS)), request_id)
        self.wait_ended(request_id)

    def stop_too_late(self) -> None:
        request_id = self.request(self.script(scripts.answer(TEXTS)))
        self.wait_ended(request_id)
        self.interrupt(request_id)
        self.wait_ack()

    def stop_nobody_knows_what(self) -> None:
        self.interrupt(self.random.choice([None, self.new_id()]))
        self.wait_ack()

    def update(self) -> None:
        self.wait_ended(self.request("", system_prompt={"content": "Be kind"}))

    def bad_update(self) -> None:
        fields: dict[str, Any] = {
            "function_calling_op": "UPDATE",
            "function_calling": [{**FUNCTION, "name": "x"}],
        }
        self.wait_ended(self.request(self.script(scripts.answer(TEXTS)), **fields))

    def call(self) -> None:
        request_id, call_id = self.wait_call()
        self.wait_ended(request_id)
        next_id = self.new_id()
        payload = {
            "call_id": call_id,
            "result": self.script(scripts.answer(TEXTS)),
            "request_id": next_id,
        }
        if self.random.random() < 0.3:
            self.interrupt(next_id)  # before it comes
            self.wait_ack()
        self.client.send("FUNCTION_RESULT", payload)
        self.wait_ended(next_id)

    def stop_after_call(self) -> None:
        request_id, _ = self.wait_call()
        self.interrupt(None)
        self.wait_ack()
        self.wait_ended(request_id)

    def wait_call(self) -> tuple[str, str]:
        call_id = f"call_{next(_numbers)}"
        events = scripts.call_events("ring", "{}", call_id=call_id)
        request_id = self.request(self.script(scripts.call_answer(events, TEXTS)))
        frames = self.client.frames
        self.until(lambda: any(_is_call(frame, request_id) for frame in frames))
        return request_id, call_id

    def fail(self) -> None:
        script: Callable[[], list[scripts.Step]] = self.random.choice(
            [
                lambda: scripts.http_error(400, {"error": {"message": "no"}}),
                lambda: scripts.http_error(503, "later", {"Retry-After": "0"}),
                lambda: scripts.truncated(TEXTS),
                lambda: scripts.reset_mid_stream(TEXTS),
                lambda: scripts.error_in_stream("overloaded", TEXTS),
                scripts.not_sse,
            ]
        )
        self.wait_ended(self.request(self.script(script())))

    def recover(self) -> None:
        name = self.script(scripts.http_error(429, "later", {"retry-after-ms": "20"}))
        request_id = self.request(name)
        self.provider.wait_post(script=name)
        self.provider.script(name, scripts.answer(TEXTS))
        self.wait_ended(request_id)

    def stop_in_the_pause(self) -> None:
        name = self.script(scripts.http_error(429, "much later", {"Retry-After": "9"}))
        request_id = self.request(name)
        self.provider.wait_script_done(script=name)
        self.pauses += 1
        self.interrupt(request_id)
        self.wait_ack()
        self.wait_ended(request_id)

    def ask_twice(self) -> None:
        """What becomes of the two is a matter of policy."""
        first = self.request(self.story())
        self.wait_story(first)
        second = self.request(self.script(scripts.answer(TEXTS)))
        self.wait_ended(second)
        if not self.has_ended(first):
            self.interrupt(first)
            self.wait_ack()
            self.wait_ended(first)

    def use_an_id_again(self) -> None:
        request_id = self.request(self.script(scripts.answer(TEXTS)))
        self.wait_ended(request_id)
        errors = self.count("ERROR")
        self.request(self.script(scripts.answer(TEXTS)), request_id)
        self.until(lambda: self.count("ERROR") > errors)

    def say_nonsense(self) -> None:
        request_id = self.new_id()
        content = {"text": 5}
        payload = {"request_id": request_id, "data_type": "TEXT", "content": content}
        self.client.send("REQUEST", payload)
        self.wait_ended(request_id)

    def bad_request_stopped_before(self) -> None:
        request_id = self.new_id()
        self.interrupt(request_id)
        self.wait_ack()
        payload = {"request_id": request_id, "data_type": "TEXT", "content": {"text": 5}}
        self.client.send("REQUEST", payload)
        self.wait_ended(request_id)

    def speak(self) -> None:
        request_id = self.new_id()
        self.voice(request_id, is_last=False)
        self.voice(request_id, is_last=True)
        self.wait_ended(request_id)

    def stop_speaking(self) -> None:
        request_id = self.new_id()
        self.voice(request_id, is_last=False)
        self.interrupt(self.random.choice([request_id, None]))
        self.wait_ack()
        self.wait_ended(request_id)
        self.voice(request_id, is_last=True)  # to which nobody says anything

    def stop_speaking_before(self) -> None:
        request_id = self.new_id()
        self.interrupt(request_id)
        self.wait_ack()
        self.voice(request_id, is_last=False)
        self.wait_ended(request_id)
        self.voice(request_id, is_last=True)

    # How it leaves.

    def close(self) -> None:
        self.client.close()

    def hang_up(self) -> None:
        """In the middle of a story, or of speech."""
        request_id = self.new_id()
        if self.random.random() < 0.7:
            self.request(self.story(), request_id)
            self.wait_story(request_id)
        else:
            self.voice(request_id, is_last=False)
            self.client.send("HEALTH_CHECK", {})  # answered when the voice was taken
            self.until(lambda: self.count("HEALTH_CHECK_ACK") == 1)
        self.lost.append(request_id)
        self.random.choice([self.client.drop, self.client.reset])()

    def say_goodbye(self) -> None:
        request_id = self.request(self.story())
        self.wait_story(request_id)
        self.client.send("SHUTDOWN", {})
        self.client.wait_closed()
        self.client.drop()

    # What it saw.

    def has_ended(self, request_id: str) -> bool:
        return any(frame.is_terminal for frame in self.client.frames_of(request_id))

    def count(self, msg_type: str) -> int:
        return sum(frame.msg_type == msg_type for frame in self.client.frames)

    @property
    def terminals(self) -> list[Received]:
        return [frame for frame in self.client.frames if frame.is_terminal]

    @property
    def acks(self) -> list[Received]:
        return [frame for frame in self.client.frames if frame.msg_type == "INTERRUPT_ACK"]


def _is_call(frame: Received, request_id: str) -> bool:
    return "function_call" in frame.payload and frame.payload["request_id"] == request_id


class Books:
    """What the gateway has counted."""

    def __init__(self, gateway: Gateway) -> None:
        self._registry = gateway.metrics.registry

    def sum(self, name: str, **labels: str) -> float:
        return sum(self.by(name, **labels).values())

    def by(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """Values that are not 0, by those of the other labels."""
        return {
            tuple(value for label, value in sample.labels.items() if label not in labels): number
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == f"bargein_{name}" and labels.items() <= sample.labels.items()
            if (number := sample.value)
        }

    def gauges(self) -> dict[str, float]:
        return {
            f"{sample.name} {sample.labels}": sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if family.type == "gauge" and sample.value
        }


def series(registry: CollectorRegistry) -> set[tuple[str, str]]:
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True))
        for family in registry.collect()
        for sample in family.samples
        if family.type != "info"
    }


def counted(pairs: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    return {key: float(number) for key, number in Counter(pairs).items()}


@pytest.mark.parametrize("seed", range(3))
def test_the_books_balance(gateway: Gateway, provider: ProviderProcess, seed: int) -> None:
    talkers = [Talker(gateway, provider, f"{seed}-{number}") for number in range(CLIENTS)]
    greenlets = [gevent.spawn(talker.run) for talker in talkers]
    gevent.joinall(greenlets, timeout=4 * LIMIT, raise_error=True)
    assert all(greenlet.successful() for greenlet in greenlets)
    books = Books(gateway)
    wait_until(lambda: not books.gauges(), "every gauge is 0 again")
    lanes().wait_deferred()

    terminals = [frame for talker in talkers for frame in talker.terminals]
    lost = [request_id for talker in talkers for request_id in talker.lost]
    outcomes = [(frame.payload["outcome"].lower(),) for frame in terminals]
    assert books.by("requests_total") == counted(outcomes + [("interrupted",)] * len(lost))

    results = [
        (reason if reason in REASONS[:-1] else "OTHER", result)
        for talker in talkers
        for reason, ack in zip(talker.reasons, talker.acks, strict=True)
        for result in ack.payload["results"]
    ]
    assert books.by("interrupts_total") == counted(
        [(reason, result["outcome"].lower()) for reason, result in results]
    )
    acks = sum(len(talker.acks) for talker in talkers)
    assert books.sum("interrupt_seconds_count", stage="acknowledged") == acks
    closed = [one["stream_closed_ms"] for _, one in results if one["stream_closed_ms"] is not None]
    assert books.sum("interrupt_seconds_count", stage="stream_closed") == len(closed)
    total_ms = books.sum("interrupt_seconds_sum", stage="stream_closed") * 1000
    assert total_ms == pytest.approx(sum(closed))

    asked = {script for talker in talkers for script in talker.scripts}
    for _ in range(10):  # turns of its loop: what was sent before has been accepted and read then
        provider.counts()
    posts = Counter(post.script for post in provider.posts() if post.script in asked)
    assert books.sum("llm_posts_total") == posts.total()
    again = posts.total() - len(posts)
    assert again <= books.sum("llm_retries_total") <= again + sum(one.pauses for one in talkers)
    failed = books.sum("generation_seconds_count", outcome="failed")
    assert books.sum("llm_errors_total") == failed > 0

    texts = [frame.text for talker in talkers for frame in talker.client.frames]
    assert books.sum("text_chars_total") == sum(map(len, texts))
    usages = [usage for frame in terminals if (usage := frame.payload.get("usage"))]
    for kind in ("prompt", "completion"):
        told = [usage[f"{kind}_tokens"] for usage in usages if not usage.get("estimated")]
        assert books.sum("llm_tokens_total", kind=kind) == sum(told) > 0

    busy = [frame for frame in terminals if frame.payload.get("error_code") == "SERVER_BUSY"]
    assert books.by("refused_total") == counted([("request",)] * len(busy))
    assert books.by("sessions_total") == {("ended",): CLIENTS}
    assert books.sum("streams_open_after_ack_total") == 0
    assert series(gateway.metrics.registry) == series(Metrics(CollectorRegistry()).registry)

"""A real Prometheus server scrapes daemons with live clients; the tests query what it stored."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import gevent.pool
import pytest

from tests.harness.client import Client
from tests.harness.daemon import Daemon
from tests.harness.process import ROOT
from tests.tools import find_tool

METRICS = ROOT / "metrics"
LIMIT = 20.0
POLL_SECONDS = 0.1
CLIENTS, INTERRUPTS = 6, 10

SLACK_SECONDS = 0.025
"""A process may lose the core before it reads the clock: the client can have the ack before the
gateway knows that it was sent."""

_T = TypeVar("_T")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Prometheus:
    """A running server with our configuration, except for targets and intervals."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        self._port = free_port()
        config = (METRICS / "prometheus.yml").read_text()
        rules = (METRICS / "alerts.yml").read_text()
        for old, new in (
            ('"bargein:9464"', ", ".join(f'"{target}"' for target in targets)),
            ("scrape_interval: 5s", "scrape_interval: 1s"),
            ("evaluation_interval: 15s", "evaluation_interval: 1s"),
            ("localhost:9090", f"localhost:{self._port}"),
        ):
            assert old in config
            config = config.replace(old, new)
        rules, without_patience = re.subn(r"for: \d+m\n", "for: 0s\n", rules)
        assert without_patience
        (folder / "prometheus.yml").write_text(config)
        (folder / "alerts.yml").write_text(rules)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    find_tool("prometheus", "prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                    "--enable-feature=exemplar-storage",
                ],
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=LIMIT)
        with contextlib.closing(connection):
            connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Every series of a query's result: labels and value."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector"
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def value(self, expression: str) -> float:
        """The value of a query's only series; NaN, which equals nothing, when there is none."""
        found = self.query(expression)
        assert len(found) < 2, found
        return found[0][1] if found else float("nan")

    def wait(self, look: Callable[[], _T | None], what: str) -> _T:
        """Poll until `look` returns something: data arrive with the next scrape."""
        deadline = time.monotonic() + LIMIT
        while True:
            with contextlib.suppress(ConnectionRefusedError, json.JSONDecodeError):  # it starts
                if found := look():
                    return found
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"no {what}: {self._log.read_text()[-2000:]}"
            time.sleep(POLL_SECONDS)

    def wait_value(self, expression: str, wanted: float) -> None:
        self.wait(lambda: self.value(expression) == wanted, f"{expression} == {wanted}")


@dataclass
class Interrupt:
    """What a client saw of one."""

    request_id: str
    seconds: float
    """From sending it until the ack was read."""
    closed_seconds: float
    """As the ack says."""


@dataclass
class Watched:
    """A daemon that tells stories, one whose provider is slow, and the server that watches both."""

    prometheus: Prometheus
    story: str
    slow: str
    interrupts: list[Interrupt]


def talk_and_interrupt(port: int) -> list[Interrupt]:
    seen = []
    with Client(port) as client:
        for _ in range(INTERRUPTS):
            request_id = client.request("Tell me a story")
            client.wait_text(request_id)
            sent_at = time.monotonic()
            client.interrupt(request_id)
            ack = client.wait_ack()
            (result,) = ack.payload["results"]
            assert result["outcome"] == "STOPPED"
            client.wait_terminal(request_id)
            closed_seconds = result["stream_closed_ms"] / 1000
            seen.append(Interrupt(request_id, ack.at - sent_at, closed_seconds))
        client.close()
    return seen


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    find_tool("prometheus", "prometheus")
    story, slow = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with contextlib.ExitStack() as stack:
        daemons = [
            stack.enter_context(
                Daemon("--ops-port", address.partition(":")[2], "--llm-model", model)
            )
            for address, model in ((story, "story"), (slow, "slow:3"))
        ]
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), [story, slow])
        stack.callback(prometheus.stop)
        prometheus.wait_value('sum(up{job="bargein"})', 2)
        impatient = stack.enter_context(Client(daemons[1].port))
        impatient.request("Tell me a story")
        pool = gevent.pool.Pool(CLIENTS)
        talks = pool.map(talk_and_interrupt, [daemons[0].port] * CLIENTS)
        yield Watched(prometheus, story, slow, [one for talk in talks for one in talk])


def test_it_counts_the_interrupts_that_the_clients_sent(watched: Watched) -> None:
    at = f'instance="{watched.story}"'
    prometheus, total = watched.prometheus, len(watched.interrupts)
    assert total == CLIENTS * INTERRUPTS
    prometheus.wait_value(
        f'sum(bargein_interrupts_total{{{at},reason="USER_STOP",outcome="stopped"}})', total
    )
    for expression, wanted in (
        (f"sum(bargein_interrupts_total{{{at}}})", total),
        (f'bargein_requests_total{{{at},outcome="interrupted"}}', total),
        (f"sum(bargein_requests_total{{{at}}})", total),
        (f"bargein_llm_posts_total{{{at}}}", total),
        (f'bargein_interrupt_seconds_count{{{at},stage="acknowledged"}}', total),
        (f'bargein_interrupt_seconds_count{{{at},stage="stream_closed"}}', total),
        (f"bargein_streams_open_after_ack_total{{{at}}}", 0),
        (f"sum(bargein_requests_active{{{at}}})", 0),
    ):
        prometheus.wait_value(expression, wanted)


def test_its_buckets_and_its_p99_are_those_of_the_clients(watched: Watched) -> None:
    prometheus, total = watched.prometheus, len(watched.interrupts)

    def buckets(stage: str) -> dict[float, float]:
        selector = f'{{instance="{watched.story}",stage="{stage}"}}'
        name = f"bargein_interrupt_seconds_bucket{selector}"
        prometheus.wait_value(f"bargein_interrupt_seconds_count{selector}", total)
        return {float(labels["le"]): count for labels, count in prometheus.query(name)}

    def p99(stage: str) -> float:
        series = f'bargein_interrupt_seconds_bucket{{instance="{watched.story}",stage="{stage}"}}'
        return prometheus.value(f"histogram_quantile(0.99, {series})")

    def bucket_of(seconds: float) -> float:
        return min(le for le in limits if seconds <= le)

    closed = sorted(one.closed_seconds for one in watched.interrupts)
    taken = sorted(one.seconds for one in watched.interrupts)
    in_buckets = buckets("stream_closed")
    limits = sorted(in_buckets)
    assert in_buckets == {le: sum(one <= le for one in closed) for le in limits}
    rank = -(-99 * total // 100) - 1
    assert bucket_of(p99("stream_closed")) == bucket_of(closed[rank])
    # The ack comes after the close, and the client has it soon after.
    acknowledged = buckets("acknowledged")
    for le in limits:
        assert sum(one + SLACK_SECONDS <= le for one in taken) <= acknowledged[le] <= in_buckets[le]
    assert bucket_of(p99("acknowledged")) <= bucket_of(taken[rank] + SLACK_SECONDS)
    selector = f'{{instance="{watched.story}",stage="acknowledged"}}'
    mean = prometheus.value(f"bargein_interrupt_seconds_sum{selector}") / total
    assert sum(closed) / total <= mean
    assert abs(sum(taken) / total - mean) < SLACK_SECONDS


def test_an_interrupt_can_be_looked_up_by_its_exemplar(watched: Watched) -> None:
    series = f'bargein_interrupt_seconds_bucket{{instance="{watched.story}"}}'

    def look() -> set[tuple[str, str]] | None:
        found = watched.prometheus.get(
            "query_exemplars", query=series, start="0", end=str(time.time() + 60)
        )
        return {
            (one["seriesLabels"]["stage"], exemplar["labels"]["request_id"])
            for one in found
            for exemplar in one["exemplars"]
        }

    exemplars = watched.prometheus.wait(look, "exemplar")
    assert {stage for stage, _ in exemplars} == {"stream_closed", "acknowledged"}
    assert {name for _, name in exemplars} <= {one.request_id for one in watched.interrupts}


def test_every_alert_is_loaded_and_a_slow_provider_fires_its_own(watched: Watched) -> None:
    def firing() -> set[str] | None:
        alerts = watched.prometheus.get("alerts")["alerts"]
        return {
            alert["labels"]["instance"]
            for alert in alerts
            if alert["labels"]["alertname"] == "BargeinFirstChunkSlow"
            and alert["state"] == "firing"
        }

    assert watched.prometheus.wait(firing, "firing alert") == {watched.slow}
    (group,) = watched.prometheus.get("rules")["groups"]
    wanted = re.findall(r"alert: (\w+)", (METRICS / "alerts.yml").read_text())
    assert [rule["name"] for rule in group["rules"]] == wanted
    assert {rule["health"] for rule in group["rules"]} == {"ok"}


def test_every_panel_of_the_dashboard_has_something_to_show(watched: Watched) -> None:
    dashboard = json.loads((METRICS / "grafana/dashboards/bargein.json").read_text())
    queries = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    assert queries
    for title, query in queries:
        for variable, value in (
            ("$instance", re.escape(watched.story).replace("\\", "\\\\")),
            ("$__rate_interval", "5m"),
            ("$__range", "5m"),
        ):
            query = query.replace(variable, value)
        assert "$" not in query, title
        assert watched.prometheus.query(query), f"{title}: {query}"

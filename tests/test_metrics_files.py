"""Alerts, dashboard, units and README, checked against the code and with their own tools."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from actors.request import RequestState, _kind
from actors.words import InterruptOutcome, InterruptReason, Outcome
from gateway.settings.options import Config
from gateway.wire.frames import _CLIENT_REASONS
from llm.errors import StreamError
from metrics import instruments
from metrics.instruments import Metrics, exemplar
from tests.harness.process import ROOT
from tests.tools import find_tool

METRICS = ROOT / "metrics"
DASHBOARD = METRICS / "grafana/dashboards/bargein.json"
OF_PROMETHEUS = {"instance", "job", "le", "__name__"}


def families() -> dict[str, tuple[str, set[str]]]:
    """Every instrument by its full name: its type and its labels."""
    found = {}
    for family in Metrics(CollectorRegistry()).registry.collect():
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        full = {"counter": "_total", "info": "_info"}.get(family.type, "")
        kind = "gauge" if family.type == "info" else family.type
        found[family.name + full] = (kind, labels)
    return found


def series() -> dict[str, dict[str, set[str]]]:
    """Every name that a query may use: its labels and their values."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in Metrics(CollectorRegistry()).registry.collect():
        for sample in family.samples:
            of_name = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                of_name.setdefault(label, set()).add(value)
    return found


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((METRICS / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def alert_cases() -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = yaml.safe_load((METRICS / "alerts_test.yml").read_text())["tests"]
    return tests


def cases_series() -> list[str]:
    return [one["series"] for test in alert_cases() for one in test["input_series"]]


def mistakes(query: str) -> Iterator[str]:
    """The names in a query that do not exist."""
    known = series()
    for name, selector in re.findall(r"\b(bargein_\w+)(?:\{([^}]*)\})?", query):
        if name not in known:
            yield name
            continue
        for label, operator, value in re.findall(r'(\w+)\s*(=~|=)\s*"([^"]*)"', selector):
            if label not in known[name].keys() | OF_PROMETHEUS:
                yield f"{name}: {label}"
            elif operator == "=" and label not in OF_PROMETHEUS and value not in known[name][label]:
                yield f"{name}: {label}={value}"
    names = re.findall(r"\b(bargein_\w+)", query)
    labels = set(OF_PROMETHEUS).union(*(known.get(name, {}) for name in names))
    for by in re.findall(r"\bby\s*\(([^)]*)\)", query):
        yield from (f"by {label}" for label in re.split(r",\s*", by) if label not in labels)


def run(*command: str | Path, stdin: bytes | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


# The code and its own words ----------------------------------------------------------------------


def test_labels_match_the_names_in_the_other_rooms() -> None:
    assert {outcome.value.lower() for outcome in Outcome} == set(instruments.OUTCOMES)
    targets = {outcome.value.lower() for outcome in InterruptOutcome}
    assert targets == set(instruments.INTERRUPT_OUTCOMES)
    assert {*_CLIENT_REASONS, InterruptReason.OTHER} == set(instruments.INTERRUPT_REASONS)
    live = {state.value for state in RequestState} - set(instruments.OUTCOMES)
    assert live == set(instruments.STATES)
    errors: list[Any] = [StreamError, *StreamError.__subclasses__()]
    assert {_kind(kind.__new__(kind)) for kind in errors} == set(instruments.RETRY_KINDS)
    fatal = set(instruments.RETRY_KINDS) - {"KeptConnectionEnded"}  # it is always sent again
    assert set(instruments.ERROR_KINDS) == fatal


def test_every_series_exists_from_the_start() -> None:
    without = {name for name, labels in families().items() if not _has_sample(name)}
    assert not without


def _has_sample(name: str) -> bool:
    return any(one == name or one.startswith(f"{name}_") for one in series())


def test_an_exemplar_never_makes_an_observation_raise() -> None:
    metrics = Metrics(CollectorRegistry())
    for request_id in (None, "", "a", *("x" * length for length in (64, 65, 119, 128, 1000))):
        metrics.acknowledged_seconds.observe(0.001, exemplar(request_id))
    assert exemplar("x" * 64) == {"request_id": "x" * 64}
    assert (
        metrics.registry.get_sample_value(
            "bargein_interrupt_seconds_count", {"stage": "acknowledged"}
        )
        == 8
    )


def test_the_page_lists_every_instrument_as_it_is() -> None:
    page = (METRICS / "README.md").read_text()
    listed = {}
    for name, kind, labels in re.findall(r"\| `(bargein_\w+)` \| (\w+)(?:, ([^|]+))? \|", page):
        listed[name] = (kind, set(re.findall(r"`(\w+)`", labels)))
    assert listed == families()


def test_the_buckets_of_interrupts_go_from_a_tenth_of_a_millisecond_to_ten_seconds() -> None:
    assert "buckets from 0.1 ms to 10 s" in (METRICS / "README.md").read_text()
    bounds = sorted(map(float, series()["bargein_interrupt_seconds_bucket"]["le"]))
    assert (bounds[0], bounds[-2], bounds[-1]) == (0.0001, 10.0, float("inf"))


def test_the_page_lists_every_alert_and_every_file() -> None:
    page = (METRICS / "README.md").read_text()
    assert re.findall(r"\| `(Bargein\w+)` \|", page) == [alert["alert"] for alert in alerts()]
    ours = {one.name for one in METRICS.iterdir() if not one.name.startswith("_")} - {"README.md"}
    assert {name for name in ours if name not in page} == set()


def test_the_page_lists_every_label_value() -> None:
    page = (METRICS / "README.md").read_text()
    for value in (
        *instruments.ERROR_KINDS,
        *instruments.OUTCOMES,
        *instruments.STATES,
        *instruments.INTERRUPT_OUTCOMES,
        *instruments.REFUSALS,
    ):
        assert f"`{value}`" in page


# Alerts ------------------------------------------------------------------------------------------


def test_a_query_with_a_mistake_is_found() -> None:
    assert not list(mistakes("sum by (stage) (rate(bargein_interrupt_seconds_count[5m]))"))
    for query in (
        "bargein_interrupt_second_bucket",
        'bargein_interrupts_total{outcom="stopped"}',
        'bargein_interrupts_total{outcome="STOPPED"}',
        "sum by (stage) (bargein_requests_total)",
    ):
        assert list(mistakes(query)), query


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_queries_existing_series_and_has_its_annotations(alert: dict[str, Any]) -> None:
    assert not list(mistakes(alert["expr"]))
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_has_a_case_that_fires_and_one_that_does_not(alert: dict[str, Any]) -> None:
    cases = [
        case
        for test in alert_cases()
        for case in test["alert_rule_test"]
        if case["alertname"] == alert["alert"]
    ]
    assert any(case["exp_alerts"] for case in cases)
    # In a case that fires for one instance, the others do not.
    firing = [one["exp_labels"]["instance"] for case in cases for one in case["exp_alerts"]]
    others = {
        name
        for test in alert_cases()
        if any(case["alertname"] == alert["alert"] for case in test["alert_rule_test"])
        for one in test["input_series"]
        for name in re.findall(r'instance="([^"]+)"', one["series"])
    } - set(firing)
    assert others or not all(case["exp_alerts"] for case in cases)


def test_the_cases_use_existing_series() -> None:
    known = series()
    for one in cases_series():
        assert not list(mistakes(one))
        if le := re.search(r'le="([^"]+)"', one):
            assert le[1] in known[one.partition("{")[0]]["le"], one


def test_alerts_and_configuration_pass_promtool() -> None:
    promtool = find_tool("promtool", "prometheus")
    run(promtool, "check", "config", METRICS / "prometheus.yml")
    run(promtool, "check", "rules", METRICS / "alerts.yml")
    run(promtool, "test", "rules", METRICS / "alerts_test.yml")


def test_the_names_pass_promtool() -> None:
    page = generate_latest(Metrics(CollectorRegistry()).registry)
    run(find_tool("promtool", "prometheus"), "check", "metrics", stdin=page)


# The dashboard -----------------------------------------------------------------------------------


def test_the_dashboard_queries_existing_series() -> None:
    found = [mistake for query in dashboard_queries() for mistake in mistakes(query)]
    assert not found


def test_the_dashboard_shows_every_instrument() -> None:
    asked = " ".join(dashboard_queries())
    shown = set(re.findall(r"\b(bargein_\w+)", asked))
    for name, (kind, _) in families().items():
        assert shown & {name, f"{name}_bucket"}, f"{kind} {name}"


def test_the_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": re.sub(r"\$__\w+", "5m", query)}
        for number, query in enumerate(dashboard_queries())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(find_tool("promtool", "prometheus"), "check", "rules", file)


def test_panels_have_distinct_ids_and_places() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_use_the_selected_data_source_and_instances() -> None:
    variables = {one["name"] for one in dashboard()["templating"]["list"]}
    assert variables == {"datasource", "instance"}
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert '{instance=~"$instance"' in target["expr"]


# Units -------------------------------------------------------------------------------------------


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)  # SystemCallFilter is there twice
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(METRICS / "bargein.service")
    return parser


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = find_tool("systemd-analyze", "systemd")
    here = tmp_path / "bargein.service"
    program = unit()["Service"]["ExecStart"].split()[0]
    here.write_text((METRICS / "bargein.service").read_text().replace(program, "/bin/true"))
    assert here.name not in run(analyze, "verify", here)  # what it does not know is a warning to it
    run(analyze, "security", "--offline=true", "--threshold=15", here)  # of 100


def test_the_unit_waits_longer_than_a_drain_takes() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    longest = Config().drain_timeout  # all of it is over then
    assert float(service["TimeoutStopSec"].removesuffix("s")) > longest
    grace = compose()["services"]["bargein"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > longest


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((METRICS / "compose.yaml").read_text())
    return content


def test_everything_that_compose_mounts_and_builds_exists() -> None:
    services = compose()["services"]
    build = services["bargein"]["build"]
    assert (METRICS / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    for source, _ in _mounts(services):
        assert (METRICS / source).exists(), source


def test_files_are_where_the_containers_expect_them() -> None:
    services = compose()["services"]
    targets = {target for _, target in _mounts(services)}
    config = yaml.safe_load((METRICS / "prometheus.yml").read_text())
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    assert {f"/etc/prometheus/{name}" for name in config["rule_files"]} <= targets
    folder = METRICS / "grafana/provisioning/dashboards/bargein.yml"
    (provider,) = yaml.safe_load(folder.read_text())["providers"]
    assert provider["options"]["path"] in targets
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_prometheus_scrapes_the_service_at_the_port_that_it_has() -> None:
    config = yaml.safe_load((METRICS / "prometheus.yml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        if job["job_name"] == "bargein"
        for one in job["static_configs"]
        for target in one["targets"]
    ]
    assert targets == [f"bargein:{Config().ops_port}"]
    datasource = METRICS / "grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(datasource.read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_compose_opens_no_port_to_the_network() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "image" not in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_the_image_has_every_package_and_the_ports_that_are_listened_on() -> None:
    text = (METRICS / "Dockerfile").read_text()
    sources = {
        source
        for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    places = dict(re.split(r"\s*=\s*", line) for line in _lines(options["options"]["package_dir"]))
    packages = set(places.values()) - {"."}  # of the top itself, each file by its name
    assert packages | {"run.py", "setup.cfg", "pyproject.toml", "README.md"} <= sources
    assert f"EXPOSE {Config().port} {Config().ops_port}\n" in text
    assert f":{Config().ops_port}/livez" in text


def test_every_variable_of_the_containers_is_a_setting() -> None:
    text = "".join((METRICS / name).read_text() for name in ("Dockerfile", "compose.yaml"))
    settings = {f"BARGEIN_{name.upper()}" for name in Config.__struct_fields__}
    assert set(re.findall(r"\bBARGEIN_\w+", text)) <= settings


def _mounts(services: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for service in services.values():
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                yield source, target


def _lines(text: str) -> Iterable[str]:
    return (line for line in text.splitlines() if line.strip())

"""The benchmarks of one user beside noise, or beside idle sessions, run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.noise_load import BLOB_BYTES, FLOODERS

ROOT = Path(__file__).parents[1]
BENCH_SECONDS = 50

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM that can be handled")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BENCH_SECONDS,
        check=False,
    )


def measured(tmp_path: Path, *arguments: str) -> tuple[str, Any]:
    """The output and the report of a run."""
    file = tmp_path / "report.json"
    done = bench(*arguments, "--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no noise came through" not in done.stdout
    return done.stdout, json.loads(file.read_bytes())


def test_noise_is_made_and_the_user_is_measured_beside_it(tmp_path: Path) -> None:
    kinds = ("health-check-registered", "short-connections")
    output, runs = measured(tmp_path, "--noise", ",".join(kinds))
    assert tuple(runs) == kinds
    for name, run in runs.items():
        assert run["noise"]["sent_bytes"] > 1000, name
        assert run["noise"]["received_bytes"] > 1000, name
        assert len(run["calm"]["ack_ms"]) >= 2
        assert len(run["noisy"]["ack_ms"]) >= 2
        assert f"\n{name} " in output
    flood = runs["health-check-registered"]["noise"]
    assert flood["registered"] >= FLOODERS
    assert flood["sent_bytes"] > 2 * FLOODERS * BLOB_BYTES  # it goes on
    assert runs["short-connections"]["noise"]["connections"] > 100
    assert " of 2 kinds: " in output.splitlines()[-1]


def test_a_kind_of_noise_that_is_not_there_is_an_error() -> None:
    done = bench("--noise", "pings,pongz")
    assert done.returncode == 1
    assert "'pongz'" in done.stderr
    assert "short-connections" in done.stderr


def test_idle_sessions_register_and_the_user_is_measured_beside_them(tmp_path: Path) -> None:
    output, run = measured(tmp_path, "--idle", "50")
    assert (run["load"]["registered"], run["load"]["lost"]) == (50, 0)
    assert len(run["beside"]["ack_ms"]) == len(run["calm"]["ack_ms"]) == 80
    assert "\n50 sessions registered in " in output

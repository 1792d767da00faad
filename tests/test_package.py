"""The distribution: what the wheel and the sdist hold, and that each works once it is installed.

The wheel is installed with its dependencies into a new environment, as a user does. The editable
environment borrows the dependencies of the one that runs the tests, which saves half a minute.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.harness.daemon import LISTENING
from tests.harness.process import ROOT, environment

pytestmark = pytest.mark.timeout(300)  # the first test waits for the build and the installation

ROOMS = ("actors", "gateway", "llm", "metrics")
THEIRS = "raise SystemExit('this is a module of the project')\n"
HOME = "https://github.com/bargein/bargein"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def check(done: subprocess.CompletedProcess[str]) -> None:
    """Fail where a command failed; skip outside CI where it could not reach a package index."""
    said = done.stdout + done.stderr
    is_offline = "NewConnectionError" in said or "NameResolutionError" in said
    if done.returncode and is_offline and not os.environ.get("CI"):
        pytest.skip("no package index can be reached: nothing was installed")
    assert done.returncode == 0, said


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def tracked_files(*folders: str) -> set[str]:
    """Paths below the top, as git lists them; in an unpacked sdist, what lies there."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--", *folders]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        listed = done.stdout.rstrip("\0").split("\0")
        return {name for name in listed if (ROOT / name).exists()}
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file())
    return {
        str(file.relative_to(ROOT))
        for file in files
        if not {"__pycache__", "node_modules"} & set(file.parts)
    }


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    home: Path

    @property
    def python(self) -> str:
        return str(self.home / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        scheme = {"base": str(self.home), "platbase": str(self.home)}
        return Path(sysconfig.get_path("purelib", vars=scheme))

    def command(self, name: str) -> str:
        """A console script."""
        return str(self.home / "bin" / name)

    def install(self, *requirements: str) -> None:
        self._pip("install", "--quiet", "--no-compile", *requirements)

    def check(self) -> None:
        """Fail where an installed distribution lacks a dependency."""
        self._pip("check")

    def _pip(self, *arguments: str) -> None:
        # The pip that runs the tests; to install another into each environment takes seconds.
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        check(subprocess.run(command, capture_output=True, text=True))


def make_environment(home: Path) -> Environment:
    venv.create(home)
    return Environment(home)


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables for an installed command: nothing that leads Python to this checkout."""
    variables = environment(more)
    for name in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"} - dict(more or {}).keys():
        variables.pop(name, None)
    return variables


def run(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(env), capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@contextmanager
def started(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    """A daemon that runs meanwhile; gives its port. Afterwards SIGTERM must end it with 0."""
    log = cwd / "daemon.log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [*command, "--port", "0"],
            cwd=cwd,
            env=clean_environment(env),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if found := LISTENING.fullmatch(line):
                    break
            else:
                pytest.fail(f"the daemon did not start: {said} {log.read_text()}")
            yield int(found["port"])
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            assert process.wait() == 0, log.read_text()
        finally:
            process.kill()


def get(port: int, path: str) -> bytes:
    with urlopen(f"http://127.0.0.1:{port}{path}") as response:
        body: bytes = response.read()
    return body


def check_daemon(command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
    """It starts, tells its health, serves the page from the package data, and ends with 0."""
    with started(command, cwd, env) as port:
        health: dict[str, Any] = json.loads(get(port, "/health"))
        assert (health["status"], health["version"]) == ("ok", setup_cfg()["metadata"]["version"])
        assert get(port, "/") == (ROOT / "gateway" / "web" / "index.html").read_bytes()


# What is built ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of this checkout, and the wheel of that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    check(subprocess.run(command, capture_output=True, text=True))
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def unpacked(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built.sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def test_the_wheel_has_two_top_level_names(built: Built) -> None:
    version = setup_cfg()["metadata"]["version"]
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name.partition("/")[0] for name in archive.namelist()}
    assert names == {"bargein", "bargein_harness", f"bargein-{version}.dist-info"}


def test_the_wheel_has_every_file_of_the_rooms_and_of_the_harness(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    rooms = {f"bargein/{name}" for name in tracked_files(*ROOMS)}
    harness = {
        name.replace("tests/harness/", "bargein_harness/", 1)
        for name in tracked_files("tests/harness")
    }
    assert names == rooms | harness | {"bargein/run.py", "bargein/README.md"}
    operators = {"alerts.yml", "prometheus.yml", "bargein.service", "Dockerfile", "compose.yaml"}
    assert {f"bargein/metrics/{name}" for name in operators} <= names
    assert {"bargein/gateway/PROTOCOL.md", "bargein_harness/py.typed"} <= names


def test_setup_cfg_lists_every_folder_that_is_a_package() -> None:
    options = setup_cfg()["options"]
    folders = {
        str(Path(name).parent).replace(os.sep, ".")
        for name in tracked_files(*ROOMS)
        if name.endswith("/__init__.py")
    }
    listed = set(lines_of(options["packages"]))
    assert listed == {"bargein", "bargein_harness"} | {f"bargein.{name}" for name in folders}
    places = dict(re.split(r"\s*=\s*", line) for line in lines_of(options["package_dir"]))
    assert places == {"bargein": ".", "bargein_harness": "tests/harness"} | {
        f"bargein.{room}": room for room in ROOMS
    }


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_the_sdist_has_every_file_that_git_tracks(unpacked: Path) -> None:
    names = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    added = {"PKG-INFO"} | {name for name in names if name.startswith("bargein.egg-info/")}
    assert names - added == tracked_files()


def test_the_changelog_begins_with_the_version_that_is_built() -> None:
    text = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)", text, re.M)
    assert first is not None
    assert first[1] == setup_cfg()["metadata"]["version"]


def test_the_quick_selection_names_files_that_exist() -> None:
    names = lines_of((ROOT / "tests" / "quick.txt").read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).is_file()] == []
    assert len(names) > 10


def test_the_front_page_s_links_work_on_an_index_page_too() -> None:
    """They are absolute, and what they lead to is in this checkout."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith(("#", "https://")) for target in targets)
    ours = [target for target in targets if target.startswith(HOME)]
    assert f"{HOME}/raw/main/gateway/web/screenshot.png" in ours
    for target in ours:
        found = re.fullmatch(rf"{HOME}/(blob|raw|tree)/main/([^#]+)(?:#(.+))?", target)
        assert found, target
        _, path, anchor = found.groups()
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in slugs, target


# The wheel, installed beside PyPI's llm -----------------------------------------------------------


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with the wheel, its dependencies, and PyPI's `llm` (its files only)."""
    made = make_environment(tmp_path_factory.mktemp("installed") / "venv")
    made.install(str(built.wheel))
    made.check()
    made.install("--no-deps", "llm")
    return made


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's project, which has each of our short names for its own modules."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(THEIRS)
    (tmp_path / "run.py").write_text(THEIRS)
    return tmp_path


def ways(where: Environment) -> list[list[str]]:
    """The command lines that start what is installed."""
    return [[where.command("bargein")], [where.python, "-m", "bargein.run"]]


@pytest.mark.parametrize("way", [0, 1], ids=["bargein", "-m"])
def test_the_daemon_runs_in_a_project_that_has_the_same_names(
    installed: Environment, project: Path, way: int
) -> None:
    check_daemon(ways(installed)[way], project, {"PYTHONPATH": "."})


def test_the_short_names_are_those_of_others_outside_the_daemon(
    installed: Environment, tmp_path: Path
) -> None:
    source = (
        "import importlib.util as util\n"
        "names = ('actors', 'gateway', 'metrics', 'run')\n"
        "print([name for name in names if util.find_spec(name)])\n"
        "print(util.find_spec('llm').origin)\n"
    )
    done = run([installed.python, "-c", source], tmp_path)
    assert done.stdout.splitlines() == [
        "[]",
        str(installed.site_packages / "llm" / "__init__.py"),
    ], done.stderr


def test_a_room_of_another_project_that_was_imported_before_is_replaced(
    installed: Environment, project: Path
) -> None:
    """As a .pth file or a sitecustomize may do it."""
    (project / "llm" / "__init__.py").write_text("")
    (project / "llm" / "errors.py").write_text("open('was-imported', 'w').close()\n")
    (project / "sitecustomize.py").write_text("import llm.errors\n")
    check_daemon([installed.command("bargein")], project, {"PYTHONPATH": "."})
    assert (project / "was-imported").exists()


def test_beside_a_clone_the_command_and_an_isolated_module_run_what_is_installed(
    installed: Environment, tmp_path: Path
) -> None:
    """As the front page says. Python puts the folder in which `-m` is run before what is installed,
    and makes one package of both folders named `bargein`, since neither has an `__init__.py`."""
    (tmp_path / "bargein").mkdir()
    (tmp_path / "bargein" / "run.py").write_text("print('this is the clone')\n")
    for command in (
        [installed.command("bargein"), "--help"],
        [installed.python, "-P", "-m", "bargein.run", "--help"],
    ):
        done = run(command, tmp_path)
        assert done.stdout.startswith("usage: bargein "), done.stderr
    done = run([installed.python, "-m", "bargein.run", "--help"], tmp_path)
    assert done.stdout == "this is the clone\n", done.stderr


def test_run_py_under_two_names_shares_what_it_runs(installed: Environment, tmp_path: Path) -> None:
    source = (
        "import bargein.run, run, sys\n"
        "assert run is not bargein.run\n"
        "assert run.serve is bargein.run.serve\n"
        "assert sys.path.count(run.__file__.removesuffix('/run.py')) == 1\n"
        "assert not [name for name in sys.modules if name.startswith('bargein.gateway')]\n"
    )
    done = run([installed.python, "-c", source], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_harness_starts_the_installed_gateway_from_such_a_project(
    installed: Environment, project: Path
) -> None:
    source = (
        "from bargein_harness import run_gateway\n"
        "with run_gateway() as gateway, gateway.connect() as client:\n"
        "    print(client.ask('stop').collect().outcome)\n"
    )
    done = run([installed.python, "-c", source], project, {"PYTHONPATH": "."})
    assert done.stdout == "COMPLETED\n", done.stderr


# The program's name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["serve", "--help"], ["default-config"], ["doctor", "--url", "ws://127.0.0.1:9"]],
    ids=" ".join,
)
def test_the_installed_command_never_speaks_of_run_py(
    installed: Environment, tmp_path: Path, arguments: list[str]
) -> None:
    done = run([installed.command("bargein"), *arguments], tmp_path)
    said = done.stdout + done.stderr
    assert "bargein" in said
    assert "run.py" not in said


def test_so_does_the_module(installed: Environment, tmp_path: Path) -> None:
    done = run([installed.python, "-m", "bargein.run", "--help"], tmp_path)
    assert done.stdout.startswith("usage: bargein ")
    assert "run.py" not in done.stdout


def test_in_a_checkout_it_is_called_as_it_was_started() -> None:
    as_file = run([sys.executable, "run.py", "--help"], ROOT)
    assert as_file.stdout.startswith("usage: run.py ")
    as_module = run([sys.executable, "-m", "run", "--help"], ROOT)
    assert as_module.stdout.startswith("usage: bargein ")


# Editable, and the sdist's own tests --------------------------------------------------------------


@pytest.fixture(scope="module")
def editable(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with an editable install of the unpacked sdist."""
    made = make_environment(tmp_path_factory.mktemp("editable") / "venv")
    made.install("--no-deps", "--editable", str(unpacked))
    # Only now, so that pip does not see the bargein that may be installed there.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (made.site_packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return made


@pytest.mark.parametrize("way", [0, 1], ids=["bargein", "-m"])
def test_an_editable_install_runs_in_a_project_that_has_the_same_names(
    editable: Environment, project: Path, way: int
) -> None:
    check_daemon(ways(editable)[way], project, {"PYTHONPATH": "."})


def test_run_py_of_an_unpacked_sdist_runs(
    editable: Environment, unpacked: Path, tmp_path: Path
) -> None:
    check_daemon([editable.python, str(unpacked / "run.py")], tmp_path)


def test_an_unpacked_sdist_runs_its_own_tests(editable: Environment, unpacked: Path) -> None:
    tests = ["tests/test_calls.py", "tests/test_promises.py"]
    command = [editable.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = run(command, unpacked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.M)


# Nightly: with all dependencies of both -----------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("order", [["llm", "bargein"], ["bargein", "llm"]], ids=" then ".join)
def test_it_and_pypi_s_llm_work_in_whichever_order_they_are_installed(
    built: Built, tmp_path: Path, order: list[str]
) -> None:
    made = make_environment(tmp_path / "venv")
    for name in order:
        made.install({"bargein": str(built.wheel)}.get(name, name))
    made.check()
    assert run([made.command("llm"), "--version"], tmp_path).stdout.startswith("llm, version")
    check_daemon([made.command("bargein")], tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_sdist_installs_with_the_test_extra_and_runs_its_own_tests(
    unpacked: Path, tmp_path: Path
) -> None:
    made = make_environment(tmp_path / "venv")
    made.install(f"{unpacked}[test]")
    command = [made.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "@tests/quick.txt"]
    done = run(command, unpacked)
    assert done.returncode == 0, done.stdout + done.stderr

"""The client library as an npm package: its contents, and its use from Node and TypeScript."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.server.pages import CLIENT, WEB
from tests.tools import find_tool

ROOT = Path(__file__).parents[1]

PACKAGE = json.loads((CLIENT / "package.json").read_bytes())

GENERATOR = "typescript@5.9.3"
"""The version that writes the committed declarations. Others write them differently."""

COMPILERS = {"5.9": GENERATOR, "7.0": "typescript@7.0.2"}
"""The versions of TypeScript that check a user's program, by their short name."""

NPM_SECONDS = 170
TSC_SECONDS = 60

pytestmark = pytest.mark.timeout(NPM_SECONDS + 2 * TSC_SECONDS)

Npm = Callable[..., str]
Compile = Callable[..., str]


def run(*command: str | Path, cwd: Path, seconds: float = TSC_SECONDS) -> str:
    """Run a program that must succeed; returns its standard output."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Npm:
    """Runs npm, with a cache of its own; returns the standard output."""
    program = find_tool("npm", "npm")
    cache = tmp_path_factory.mktemp("npm-cache")
    options = ("--silent", "--no-audit", "--no-fund", "--no-update-notifier", f"--cache={cache}")

    def call(*arguments: str | Path, cwd: Path) -> str:
        return run(program, *arguments, *options, cwd=cwd, seconds=NPM_SECONDS)

    return call


@pytest.fixture(scope="module")
def compile_with(npm: Npm, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Runs tsc, in a version from `COMPILERS`, in a folder. Without npm, tests are skipped."""
    node = find_tool("node", "nodejs")
    folder = tmp_path_factory.mktemp("typescript")
    aliases = [f"tsc-{name}@npm:{package}" for name, package in COMPILERS.items()]
    try:
        npm("install", *aliases, cwd=folder)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"npm cannot install TypeScript; no types were checked: {error}")

    def call(version: str, project: Path) -> str:
        compiler = folder / "node_modules" / f"tsc-{version}" / "bin" / "tsc"
        return run(node, compiler, "-p", project, cwd=project)

    return call


def make_project(folder: Path, npm: Npm, package: Path = CLIENT) -> None:
    """Make a user's project in an empty folder, and install the library, without a network."""
    (folder / "package.json").write_text('{"name": "app", "type": "module", "private": true}')
    npm("install", "--offline", package, cwd=folder)
    assert (folder / "node_modules" / "bargein" / "index.js").is_file()


# The package


def test_its_version_is_that_of_the_daemon() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert PACKAGE["version"] == setup["metadata"]["version"]
    assert PACKAGE["license"] == setup["metadata"]["license"]


def test_it_has_the_projects_license() -> None:
    assert (CLIENT / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_its_readme_names_the_path_of_this_version() -> None:
    for folder in (WEB, CLIENT):
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert f"/client/{PACKAGE['version']}/index.js" in readme


def test_npm_packs_the_modules_with_their_declarations(npm: Npm) -> None:
    [pack] = json.loads(npm("pack", "--dry-run", "--json", cwd=CLIENT))
    modules = {path.name for path in CLIENT.glob("*.js")}
    declarations = {name.replace(".js", ".d.ts") for name in modules}
    others = {"package.json", "README.md", "LICENSE"}
    assert {file["path"] for file in pack["files"]} == modules | declarations | others
    assert pack["id"] == f"bargein@{PACKAGE['version']}"


def test_every_export_is_a_file_with_its_declaration() -> None:
    exports = {path: target for path, target in PACKAGE["exports"].items() if path != "."}
    assert exports.pop("./package.json") == "./package.json"
    for path, target in {"./index.js": PACKAGE["exports"]["."], **exports}.items():
        assert target == {"types": path.replace(".js", ".d.ts"), "default": path}
        assert all((CLIENT / name).is_file() for name in target.values())
    assert (PACKAGE["main"], PACKAGE["types"]) == ("./index.js", "./index.d.ts")


# In Node

PUBLIC = """
ACK_TIMEOUT_MS AudioService MessageService REGISTER_TIMEOUT_MS RegistrationError RequestError
SAMPLE_RATE SILENCE_TIMEOUT_MS WebSocketClient consoleLog countCodePoints
"""

IMPORTING = """
for (const name of ["WebSocket", "AudioContext", "document", "window"]) delete globalThis[name];
const all = await import("bargein");
const parts = [];
for (const name of ["websocket-client", "message-service", "audio-service"]) {
  parts.push(await import(`bargein/${name}.js`));
}
const internal = await import("bargein/events.js").catch((error) => error.code);
console.log(
  JSON.stringify({
    names: Object.keys(all).sort(),
    classes: parts.map((part) => Object.keys(part).filter((name) => /Client$|Service$/.test(name))),
    areOne: parts.every((part) =>
      Object.keys(part).every((name) => !(name in all) || part[name] === all[name]),
    ),
    internal,
    state: new all.WebSocketClient({ url: "ws://x", registration: () => ({}) }).state.name,
  }),
);
"""


@pytest.mark.parametrize("source", ("folder", "tarball"))
def test_a_server_without_a_websocket_can_import_it_by_name(
    npm: Npm, tmp_path: Path, source: str
) -> None:
    node = find_tool("node", "nodejs")
    package = CLIENT
    if source == "tarball":
        [pack] = json.loads(npm("pack", "--json", f"--pack-destination={tmp_path}", cwd=CLIENT))
        package = tmp_path / pack["filename"]
    project = tmp_path / "project"
    project.mkdir()
    make_project(project, npm, package)
    (project / "app.js").write_text(IMPORTING)
    told = json.loads(run(node, "app.js", cwd=project))
    assert told == {
        "names": sorted(PUBLIC.split()),
        "areOne": True,
        "classes": [["WebSocketClient"], ["MessageService"], ["AudioService"]],
        "internal": "ERR_PACKAGE_PATH_NOT_EXPORTED",
        "state": "offline",
    }


# In TypeScript


def test_the_declarations_are_what_tsc_writes(compile_with: Compile, tmp_path: Path) -> None:
    for path in (*CLIENT.glob("*.js"), CLIENT / "tsconfig.json", CLIENT / "package.json"):
        shutil.copy(path, tmp_path)
    compile_with("5.9", tmp_path)  # without the old declarations, which it would read instead
    written = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.d.ts")}
    committed = {path.name: path.read_text("utf-8") for path in CLIENT.glob("*.d.ts")}
    assert len(written) == len(list(CLIENT.glob("*.js")))
    assert committed == written, "run `npm run types` in gateway/web/client"


def test_the_script_that_writes_them_uses_that_tsc() -> None:
    assert f"-p {GENERATOR} tsc -p ." in PACKAGE["scripts"]["types"]


def test_the_page_fits_the_declarations(compile_with: Compile) -> None:
    compile_with("5.9", WEB)


PROGRAM = """
import { AudioService, MessageService, RequestError, WebSocketClient, consoleLog } from "bargein";
import type { Answer, ConnectionState, InterruptAck, Message, Registration } from "bargein";
import { WebSocketClient as Same } from "bargein/websocket-client.js";

type Equal<A, B> =
  (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
function same<A, B>(..._: Equal<A, B> extends true ? [] : [never]): void {}

const registration: Registration = { auth: { type: "API_KEY", api_key: "x" }, platform: "APP" };
const client: Same = new WebSocketClient({ url: "ws://x", registration: () => registration });
const audio = new AudioService();
const service = new MessageService(client, { audio, log: consoleLog(() => true) });

service.on("text", ({ message, text }) => {
  same<typeof text, string>();
  same<typeof message, Message>();
});
service.on("completed", ({ message }) => same<typeof message.finishReason, string | null>());
client.on("state", (state) => {
  same<typeof state, ConnectionState>();
  same<typeof state.name, "offline" | "connecting" | "ready" | "waiting" | "refused">();
});
audio.on("playing", (isPlaying) => same<typeof isPlaying, boolean>());
same<Message["state"], "streaming" | "complete" | "interrupted" | "failed">();
same<ReturnType<typeof service.interruptCurrentRequest>, Promise<InterruptAck> | null>();
same<Awaited<ReturnType<typeof client.sendTextRequest>["promise"]>, Answer>();
same<InterruptAck["status"], "SUCCESS" | "PARTIAL" | "FAILED" | "NO_ACK">();
const failure = (error: unknown): string => (error instanceof RequestError ? error.code : "");

// What an option does not need may be undefined, also with exactOptionalPropertyTypes.
declare const signal: AbortSignal | undefined;
service.sendTextMessage("x", { signal, update: undefined });
client.sendTextRequest("x", { signal, onText: undefined });
void client.sendInterrupt(null, "USER_STOP", { deliveredTextChars: undefined });
new MessageService(client, { audio: undefined, countRendered: undefined });

// @ts-expect-error no such event
service.on("texts", () => undefined);
// @ts-expect-error text is a string
service.on("text", ({ text }: { text: number }) => text);
// @ts-expect-error no such state
client.on("state", (state) => state.name === "online");
// @ts-expect-error no such reason
service.interruptCurrentRequest("BORED");
// @ts-expect-error registration is missing
new WebSocketClient({ url: "ws://x" });
// @ts-expect-error private
client._socket;
// @ts-expect-error not exported
import("bargein/events.js");
export { failure };
"""


SERVER_PROGRAM = """
import { MessageService } from "bargein/message-service.js";
import { WebSocketClient } from "bargein/websocket-client.js";

const registration = () => ({ auth: { type: "API_KEY" as const, api_key: "x" } });
const client = new WebSocketClient({ url: "ws://x", registration });
new MessageService(client).on("text", ({ text }) => text.trim());
// @ts-expect-error declared in the dom library only
export type Unknown = AudioContext;
"""

NODE_TYPES = """
interface AbortSignal {}
interface Console { log(...data: any[]): void; debug(...data: any[]): void; }
"""
"""What the library needs of `@types/node`."""


@pytest.mark.parametrize("version", COMPILERS)
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"allowJs": True},
        {"allowJs": True, "checkJs": True, "exactOptionalPropertyTypes": True},
        {"module": "nodenext", "moduleResolution": "nodenext"},
    ),
    ids=lambda options: "-".join(options) or "strict",
)
def test_a_strict_program_gets_types(
    npm: Npm, compile_with: Compile, tmp_path: Path, version: str, options: dict[str, Any]
) -> None:
    make_project(tmp_path, npm)
    config = {
        "strict": True,
        "noEmit": True,
        "target": "es2022",
        "module": "es2022",
        "moduleResolution": "bundler",
        "lib": ["es2022", "dom"],
        "types": [],
        **options,
    }
    project = {"compilerOptions": config, "files": ["app.ts"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(project))
    (tmp_path / "app.ts").write_text(PROGRAM)
    compile_with(version, tmp_path)


@pytest.mark.parametrize("version", COMPILERS)
def test_two_modules_need_no_dom_library(
    npm: Npm, compile_with: Compile, tmp_path: Path, version: str
) -> None:
    make_project(tmp_path, npm)
    config = {
        "strict": True,
        "noEmit": True,
        "target": "es2022",
        "module": "nodenext",
        "lib": ["es2022"],
        "types": [],
    }
    project = {"compilerOptions": config, "files": ["app.ts", "node.d.ts"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(project))
    (tmp_path / "app.ts").write_text(SERVER_PROGRAM)
    (tmp_path / "node.d.ts").write_text(NODE_TYPES)
    compile_with(version, tmp_path)

"""The protocol's page says what the structs say: no more, no less, and nothing else."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import msgspec
import msgspec.structs
import pytest
from msgspec import UNSET
from msgspec import inspect as shapes

import actors.session.lifetime
from actors.session.profile import MAX_FUNCTIONS, FunctionName
from actors.session.request_ids import (
    EARLY_INTERRUPT_SECONDS,
    MAX_EARLY_INTERRUPTS,
    MAX_REMEMBERED_IDS,
)
from actors.session.session import SessionSettings
from actors.words import ErrorCode, InterruptReason
from gateway.server.connection import (
    FRAMES_PER_SECOND,
    MAX_FRAGMENTS,
    MESSAGE_SECONDS,
    REGISTER_SECONDS,
)
from gateway.server.outbox import MAX_FRAME_CHARS
from gateway.wire.decode import _Envelope
from gateway.wire.encode import error
from gateway.wire.frames import (
    CLIENT_PAYLOADS,
    MAX_FRAME_BYTES,
    MAX_NESTING,
    MAX_TEXT_BYTES,
    MAX_VOICE_TEXT_BYTES,
    SERVER_PAYLOADS,
    VERSION,
    RequestId,
)
from gateway.wire.frames import Heartbeat as WireHeartbeat

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "gateway" / "PROTOCOL.md"

Row: TypeAlias = tuple[str, ...]
Page: TypeAlias = dict[tuple[str, str], list[Row]]
"""The rows of every table (without its head), under its headings of both levels."""


def read(text: str) -> Page:
    page: Page = {}
    section = heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section, heading = line[3:], ""
        elif line.startswith("### "):
            heading = line[4:]
            assert (section, heading) not in page, f"{heading} is there twice"
            page[section, heading] = []
        elif line.startswith("|"):
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            page.setdefault((section, heading), []).append(cells)
    return {where: rows[2:] for where, rows in page.items()}


def under(page: Page, section: str) -> dict[str, list[Row]]:
    return {heading: rows for (of, heading), rows in page.items() if of == section and heading}


# What a struct is on the page --------------------------------------------------------------------


def _pattern(alias: Any) -> str:
    (meta,) = alias.__metadata__
    pattern: str = meta.pattern
    return pattern


WORDS_OF_PATTERNS = {
    _pattern(RequestId): "id",
    _pattern(RequestId).replace("{1,", "{0,"): 'id or `""`',
    _pattern(FunctionName): "function name",
}
PLAIN_WORDS: dict[type[shapes.Type], str] = {
    shapes.AnyType: "any",
    shapes.BoolType: "bool",
    shapes.BytesType: "base64",
    shapes.DictType: "object",
    shapes.FloatType: "number",
    shapes.NoneType: "null",
    shapes.RawType: "object",
}


def word(kind: shapes.Type) -> str:
    """A type as the page says it."""
    match kind:
        case shapes.UnionType(types):
            said = sorted(map(word, types), key=lambda one: one == "null")
            either = " or ".join(said)
            return either.replace(", 0 or more or", ", 0 or more, or")
        case shapes.StrType(pattern=str(pattern)):
            return WORDS_OF_PATTERNS[pattern]
        case shapes.StrType(min_length=int(shortest), max_length=int(longest)):
            return f"string, {shortest} to {longest}"
        case shapes.StrType(min_length=None, max_length=None):
            return "string"
        case shapes.IntType(ge=0):
            return "integer, 0 or more"
        case shapes.IntType(ge=None):
            return "integer"
        case shapes.ListType(item_type=item):
            return f"list of {word(item)}"
        case shapes.LiteralType(values):
            return " or ".join(f'`"{value}"`' for value in values)
        case shapes.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case shapes.EnumType(cls=cls) if cls is ErrorCode:
            return "[ErrorCode](#errors)"
        case shapes.EnumType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case _:
            return PLAIN_WORDS[type(kind)]


def _required(field: msgspec.structs.FieldInfo, from_server: bool) -> str:
    if from_server:
        return "no" if field.default is UNSET else "yes"
    if field.required:
        return "yes"
    if field.default in (None, UNSET):
        return "no"
    return f"no: `{msgspec.json.encode(field.default).decode()}`"


def _info(struct: type[Any]) -> shapes.StructType:
    info = shapes.type_info(struct)
    assert isinstance(info, shapes.StructType)
    return info


def rows_of(struct: type[Any], from_server: bool) -> list[Row]:
    """A struct as a table of the page, but for the meanings."""
    info = _info(struct)
    tag: list[Row] = [(f"`{info.tag_field}`", f'`"{info.tag}"`', "yes")] if info.tag_field else []
    return tag + [
        (f"`{field.encode_name}`", word(kind.type), _required(field, from_server))
        for field, kind in zip(msgspec.structs.fields(struct), info.fields, strict=True)
    ]


def _inside(kind: shapes.Type) -> Iterator[type[Any]]:
    """The structs and enums of a type, at any depth."""
    match kind:
        case shapes.UnionType(types):
            for one in types:
                yield from _inside(one)
        case shapes.ListType(item_type=item):
            yield from _inside(item)
        case shapes.EnumType(cls=cls):
            yield cls
        case shapes.StructType(cls=cls, fields=fields):
            yield cls
            for field in fields:
                yield from _inside(field.type)


def inside(structs: Iterable[type[Any]]) -> set[type[Any]]:
    """What the fields of these structs are made of."""
    return {one for struct in structs for one in _inside(_info(struct))} - set(structs)


FOR_CLIENTS = inside(CLIENT_PAYLOADS)
FOR_SERVERS = inside(SERVER_PAYLOADS)
ENUMS = {one for one in FOR_CLIENTS | FOR_SERVERS if issubclass(one, enum.Enum)} - {ErrorCode}
# No type has it as a field's: `interrupt_reason` is a string on the wire.
ENUMS.add(InterruptReason)
SHAPES = {one for one in FOR_CLIENTS | FOR_SERVERS if not issubclass(one, enum.Enum)}


def seconds(number: float) -> str:
    return f"{number:,g} s" if number < 1000 else f"{int(number):,} s"


def _longest(alias: Any) -> str:
    (found,) = re.findall(r"\{1,(\d+)\}", _pattern(alias))
    return f"{found} characters"


LIMITS: list[Row] = [
    ("text frame", f"{MAX_TEXT_BYTES:,} bytes"),
    ("text frame with BASE64 voice", f"{MAX_VOICE_TEXT_BYTES:,} bytes"),
    ("any frame (beyond it: close code 1009)", f"{MAX_FRAME_BYTES:,} bytes"),
    ("any frame before REGISTER_ACK (beyond it: close code 1009)", f"{MAX_TEXT_BYTES:,} bytes"),
    ("WebSocket frames of one message (beyond it: close code 1009)", f"{MAX_FRAGMENTS:,}"),
    (
        "WebSocket frames of a session, control and empty ones too (beyond it: read later)",
        f"{FRAMES_PER_SECOND:,} a second",
    ),
    (
        "how long one message may take (beyond it: close code 1008)",
        seconds(MESSAGE_SECONDS),
    ),
    (
        "how long a client may neither register nor ask for the health"
        " (beyond it: close code 1008)",
        seconds(REGISTER_SECONDS),
    ),
    ("voice of one request", f"{SessionSettings.max_voice_bytes:,} bytes"),
    ("an id: printable ASCII", _longest(RequestId)),
    ("a function's name: letters, digits, `_` and `-`", _longest(FunctionName)),
    ("functions of a session", f"{MAX_FUNCTIONS:,}"),
    (
        "their definitions together, as JSON without spaces",
        f"{SessionSettings.max_functions_bytes:,} bytes",
    ),
    ("nesting levels in the JSON of a schema or a result", f"{MAX_NESTING:,}"),
    ("ended ids that are remembered", f"{MAX_REMEMBERED_IDS:,}"),
    ("INTERRUPTs that wait for their request", f"{MAX_EARLY_INTERRUPTS:,}"),
    ("how long they wait", seconds(EARLY_INTERRUPT_SECONDS)),
    ("how long an INTERRUPT_ACK may wait for streams", seconds(SessionSettings.ack_timeout)),
    ("live requests of a session, `parallel`", f"{SessionSettings.max_parallel:,}"),
    ("text of one RESPONSE", f"{MAX_FRAME_CHARS:,} code points"),
    ("session without REQUEST or HEARTBEAT_REPLY", seconds(SessionSettings.session_timeout)),
    ("between two HEARTBEATs, at most", seconds(SessionSettings.heartbeat_interval)),
    ("SESSION_WARN before the end", seconds(actors.session.lifetime._WARN_SECONDS)),
    ("messages of the history", f"{SessionSettings.history_messages:,}"),
    ("text of the history", f"{SessionSettings.history_chars:,} code points"),
]


def faults(text: str, from_server: Iterable[type[Any]] = SERVER_PAYLOADS) -> list[str]:
    """Where a page and the code differ; empty when they do not."""
    page = read(text)
    found: list[str] = []

    def compare(where: str, said: object, meant: object) -> None:
        if said != meant:
            found.append(f"{where}: the page says {said}, the code {meant}")

    def compare_structs(section: str, structs: dict[str, tuple[type[Any], bool]]) -> None:
        tables = under(page, section)
        compare(section, sorted(tables), sorted(structs))
        for name in tables.keys() & structs.keys():
            compare(
                f"{section}, {name}", [row[:3] for row in tables[name]], rows_of(*structs[name])
            )

    envelope = [row[:3] for row in page.get(("Envelope", ""), [])]
    compare("Envelope", envelope, rows_of(_Envelope, from_server=False))
    compare_structs("Client → server", {one.msg_type: (one, False) for one in CLIENT_PAYLOADS})
    compare_structs("Server → client", {one.msg_type: (one, True) for one in from_server})
    compare_structs("Shapes", {one.__name__: (one, one not in FOR_CLIENTS) for one in SHAPES})
    enums = {name: [row[0] for row in rows] for name, rows in under(page, "Enumerations").items()}
    compare("Enumerations", enums, {one.__name__: [f"`{v}`" for v in one] for one in ENUMS})
    errors = [row[:2] for row in page.get(("Errors", ""), [])]
    advice = {code: str(error(code, "").retryable).lower() for code in ErrorCode}
    compare("Errors", errors, [(f"`{code}`", advice[code]) for code in ErrorCode])
    compare("Limits", page.get(("Limits", "")), LIMITS)
    compare("Title", text.partition("\n")[0], f"# The wire protocol, version {VERSION}")
    anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in _headings(text)}
    for link in re.findall(r"\]\(#([^)]*)\)", text):
        if link not in anchors:
            found.append(f"no heading for the link #{link}")
    return found


def _headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def test_the_page_says_what_the_structs_say() -> None:
    assert faults(PAGE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `request_id` | id | yes |", "| `requestid` | id | yes |"),
        ("| `enable_srs` | bool | no: `true` |", "| `enable_srs` | bool | no: `false` |"),
        ("| `reason` | string or null | no |", "| `reason` | string | no |"),
        ("| `retryable` | bool | yes |", "| `retryable` | bool | no |"),
        ("| `call_id` | string, 1 to 256 |", "| `call_id` | string, 1 to 64 |"),
        (
            "| `content` | [RequestContent]",
            "| `more` | any | no | |\n| `content` | [RequestContent]",
        ),
        ('| `type` | `"ACCOUNT"` | yes |', '| `type` | `"API_KEY"` | yes |'),
        ("| `UNKNOWN` |", "| `UNHEARD_OF` |"),
        ("| `MINI_PROGRAM` | |\n", ""),
        ("| `SERVER_BUSY` | true |", "| `SERVER_BUSY` | false |"),
        ("| `STREAM_SEQ_ERROR` | true | voice frames out of order |\n", ""),
        ("| 1,000 |", "| 100 |"),
        ("| how long they wait | 30 s |\n", ""),
        ("### HEARTBEAT_REPLY\n", "### PONG\n"),
        ("### Usage\n", "### Tokens\n"),
        ("### AckStatus\n", "### Status\n"),
        ("version 1.0\n", "version 1.1\n"),
        ("[below](#voice)", "[below](#speech)"),
    ],
)
def test_a_page_that_drifted_is_noticed(old: str, new: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert old in text
    assert faults(text.replace(old, new, 1))


def test_every_line_of_every_table_is_missed_when_it_is_lost() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    checked = 0
    section = ""
    for number, line in enumerate(lines):
        if line.startswith("## "):
            section = line[3:].strip()
        if line.startswith("| `") and section != "Voice":
            assert faults("".join(lines[:number] + lines[number + 1 :])), line
            checked += 1
    assert checked > 100


def test_a_field_that_is_new_is_missed_on_the_page() -> None:
    class Heartbeat(msgspec.Struct):
        msg_type: ClassVar = "HEARTBEAT"
        remaining_seconds: int
        mood: str

    changed = [Heartbeat if one is WireHeartbeat else one for one in SERVER_PAYLOADS]
    assert len(faults(PAGE.read_text(encoding="utf-8"), changed)) == 1

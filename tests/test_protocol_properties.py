"""The protocol by properties: any frame reads back as it was written, and no bytes do harm."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck as Health
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from msgspec import UNSET, Raw, Struct

from actors.session.profile import (
    MAX_FUNCTIONS,
    FunctionDefinition,
    FunctionOp,
    FunctionParameter,
    Platform,
    SceneContext,
    SessionUpdate,
    SystemPrompt,
)
from actors.words import (
    AckStatus,
    ErrorCode,
    InterruptOutcome,
    InterruptReason,
    OnNewRequest,
    Outcome,
)
from gateway.app import Gateway
from gateway.wire.decode import FrameError, decode
from gateway.wire.encode import AnswerEncoder, encode, error
from gateway.wire.frames import (
    CLIENT_PAYLOADS,
    MAX_FRAME_BYTES,
    MAX_TEXT_BYTES,
    SERVER_PAYLOADS,
    VERSION,
    AccountAuth,
    ApiKeyAuth,
    ClientFrame,
    ClientPayload,
    Error,
    FunctionCall,
    FunctionResult,
    HealthCheck,
    HealthCheckAck,
    HealthStatus,
    Heartbeat,
    HeartbeatReply,
    Interrupt,
    InterruptAck,
    InterruptResult,
    Register,
    RegisterAck,
    Request,
    RequestContent,
    Response,
    ResponseContent,
    SessionData,
    SessionInfo,
    SessionQuery,
    SessionWarn,
    Shutdown,
    Usage,
)
from llm.chat.completions import ToolCall
from tests.harness import scripts
from tests.harness.client import Client, Received
from tests.harness.provider_process import ProviderProcess

S = TypeVar("S", bound=Struct)
T = TypeVar("T")

PURE = settings(deadline=None, database=None, suppress_health_check=[Health.too_slow])
"""For what needs no gateway."""


def build(struct: type[S], **fields: Any) -> S:
    """A struct of which every field is given: a new field needs a strategy too."""
    assert fields.keys() == set(struct.__struct_fields__), struct
    return struct(**fields)


def built(struct: type[S], **fields: SearchStrategy[Any]) -> SearchStrategy[S]:
    """The same, of strategies."""
    return st.fixed_dictionaries(fields).map(lambda drawn: build(struct, **drawn))


def maybe(strategy: SearchStrategy[T]) -> SearchStrategy[T | None]:
    return st.none() | strategy


def unset_or(strategy: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.just(UNSET) | strategy


# What frames are made of -------------------------------------------------------------------------

texts = st.text(max_size=20)  # of any code points but halves of surrogate pairs
ids = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=64)
names = st.text(
    st.sampled_from("abcXYZ019_-"),
    min_size=1,
    max_size=64,
)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)
schemas = st.fixed_dictionaries(
    {},
    optional={
        "type": st.just("object"),
        "properties": st.dictionaries(texts, st.booleans() | json_objects, max_size=3),
        "required": st.lists(texts, max_size=3),
        "description": json_values,
    },
)
parameters = built(
    FunctionParameter,
    name=st.text(min_size=1, max_size=64),
    type=st.sampled_from(["string", "number", "integer", "boolean", "array", "object"]),
    description=maybe(texts),
    required=st.booleans(),
)
definitions = built(
    FunctionDefinition,
    name=names,
    description=maybe(texts),
    parameters=maybe(schemas | st.lists(parameters, max_size=3, unique_by=lambda one: one.name)),
)
functions = st.lists(definitions, max_size=3, unique_by=lambda one: one.name)
function_changes: SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.just((None, None)),
    st.tuples(
        st.sampled_from([None, FunctionOp.REPLACE, FunctionOp.ADD, FunctionOp.UPDATE]), functions
    ),
    st.tuples(
        st.just(FunctionOp.DELETE),
        st.tuples(functions, st.lists(names, max_size=3)).map(lambda both: [*both[0], *both[1]]),
    ),
)
prompts = built(SystemPrompt, role_description=maybe(texts), response_requirements=maybe(texts))
scenes = built(
    SceneContext, scene_description=maybe(texts), keywords=maybe(st.lists(texts, max_size=3))
)
auths = built(ApiKeyAuth, api_key=texts) | built(AccountAuth, account=texts, password=texts)


@st.composite
def updates(draw: DrawFn) -> SessionUpdate:
    op, changed = draw(function_changes)
    return build(
        SessionUpdate,
        require_tts=draw(maybe(st.booleans())),
        enable_srs=draw(maybe(st.booleans())),
        system_prompt=draw(maybe(prompts)),
        scene_context=draw(maybe(scenes)),
        function_calling_op=op,
        function_calling=changed,
    )


@st.composite
def requests(draw: DrawFn) -> Request:
    data_type = draw(st.sampled_from(["TEXT", "VOICE"]))
    modes = st.sampled_from(["BASE64", "BINARY"])
    content = build(
        RequestContent,
        text=draw(texts if data_type == "TEXT" else maybe(texts)),
        voice_mode=draw(modes if data_type == "VOICE" else maybe(modes)),
        voice=draw(maybe(st.binary(max_size=20))),
        audio_format=draw(maybe(texts)),
    )
    at_top_level = draw(updates())
    return build(
        Request,
        request_id=draw(ids),
        data_type=data_type,
        content=content,
        stream_flag=draw(st.booleans()),
        stream_seq=draw(st.integers(-2, 3) | st.integers(-(2**63), 2**64 - 1)),
        update_session=draw(maybe(updates())),
        **{name: getattr(at_top_level, name) for name in SessionUpdate.__struct_fields__},
    )


FROM_CLIENT: dict[type[Any], SearchStrategy[Any]] = {
    Register: built(
        Register,
        auth=auths,
        platform=maybe(st.sampled_from(Platform)),
        client_type=maybe(st.sampled_from(Platform)),
        require_tts=st.booleans(),
        enable_srs=st.booleans(),
        function_calling=maybe(functions),
        system_prompt=maybe(prompts),
        scene_context=maybe(scenes),
        on_new_request=maybe(st.sampled_from(OnNewRequest)),
    ),
    Request: requests(),
    Interrupt: built(
        Interrupt,
        interrupt_request_id=unset_or(maybe(st.just("") | ids)),
        reason=maybe(st.sampled_from(InterruptReason).map(str) | texts),
        delivered_text_chars=maybe(st.integers(0, 2**64 - 1)),
    ),
    FunctionResult: built(
        FunctionResult,
        call_id=st.text(min_size=1, max_size=256),
        result=json_values,
        request_id=maybe(ids),
    ),
    SessionQuery: built(SessionQuery, query_fields=maybe(st.lists(texts, max_size=3))),
    HealthCheck: built(HealthCheck, check_fields=maybe(st.lists(texts, max_size=3))),
    HeartbeatReply: built(HeartbeatReply, client_status=json_values),
    Shutdown: built(Shutdown, reason=maybe(texts)),
}

seqs = st.integers(-1, 2**53)
counts = st.integers(0, 2**53)
usages = built(
    Usage,
    prompt_tokens=counts,
    completion_tokens=counts,
    total_tokens=counts,
    estimated=unset_or(st.booleans()),
)
calls = built(FunctionCall, name=texts, parameters=json_objects, call_id=texts)
of_terminal: dict[str, SearchStrategy[Any]] = {
    "outcome": unset_or(st.sampled_from(Outcome)),
    "finish_reason": unset_or(maybe(texts)),
    "usage": unset_or(maybe(usages)),
}
FROM_SERVER: dict[type[Any], SearchStrategy[Any]] = {
    RegisterAck: built(
        RegisterAck,
        session_id=texts,
        session_timeout_seconds=counts,
        status=texts,
        message=texts,
    ),
    Response: built(
        Response,
        request_id=ids,
        text_stream_seq=seqs,
        content=built(ResponseContent, text=unset_or(texts), voice=unset_or(st.binary())),
        function_call=unset_or(calls),
        voice_stream_seq=unset_or(seqs),
        interrupted=unset_or(st.booleans()),
        interrupt_reason=unset_or(texts),
        **of_terminal,
    ),
    InterruptAck: built(
        InterruptAck,
        interrupted_request_ids=st.lists(ids, max_size=3),
        status=st.sampled_from(AckStatus),
        message=texts,
        results=st.lists(
            built(
                InterruptResult,
                request_id=ids,
                outcome=st.sampled_from(InterruptOutcome),
                delivered_text_chars=counts,
                stream_closed_ms=maybe(st.floats(0, 1e6)),
                stops_on_close=unset_or(st.sampled_from(["yes", "no", "unknown"])),
            ),
            max_size=3,
        ),
        interrupt_request_id=unset_or(maybe(st.just("") | ids)),
    ),
    SessionInfo: built(
        SessionInfo,
        session_data=built(
            SessionData,
            platform=unset_or(maybe(st.sampled_from(Platform))),
            require_tts=unset_or(st.booleans()),
            enable_srs=unset_or(st.booleans()),
            function_calling=unset_or(functions),
            create_time=unset_or(counts),
            remaining_seconds=unset_or(counts),
        ),
        status=texts,
        message=texts,
    ),
    Heartbeat: built(Heartbeat, remaining_seconds=counts),
    SessionWarn: built(SessionWarn, remaining_seconds=counts, message=texts, warn_type=texts),
    HealthCheckAck: built(
        HealthCheckAck,
        health_status=built(
            HealthStatus,
            status=unset_or(texts),
            conn_count=unset_or(counts),
            cpu_usage=unset_or(st.floats(0, 1e4)),
        ),
    ),
    Shutdown: FROM_CLIENT[Shutdown],
    Error: built(
        Error,
        error_code=st.sampled_from(ErrorCode),
        error_msg=texts,
        error_detail=texts,
        retryable=st.booleans(),
        request_id=unset_or(ids),
        **of_terminal,
    ),
}
from_client: SearchStrategy[ClientPayload] = st.one_of(*FROM_CLIENT.values())


def test_every_frame_has_a_strategy() -> None:
    assert FROM_CLIENT.keys() == set(CLIENT_PAYLOADS)
    assert FROM_SERVER.keys() == set(SERVER_PAYLOADS)


# There and back ----------------------------------------------------------------------------------


def enveloped(payload: ClientPayload, session_id: str | None, written: object = UNSET) -> bytes:
    """A frame as a client writes it; `written` in place of the payload as it is."""
    return msgspec.json.encode(
        {
            "version": VERSION,
            "msg_type": payload.msg_type,
            "session_id": session_id,
            "payload": payload if written is UNSET else written,
            "timestamp": 1740000000000,
        }
    )


def walked(value: Any, change: Callable[[Struct, dict[str, Any]], None]) -> Any:
    """A struct as the JSON that it is written as, each object of a struct, at any depth, changed.

    What is free in form (a schema, a result) stays as it is.
    """
    if isinstance(value, list):
        return [walked(one, change) for one in value]
    if not isinstance(value, Struct):
        return msgspec.to_builtins(value)
    written = msgspec.to_builtins(value)
    for name in value.__struct_fields__:
        if name in written:
            written[name] = walked(getattr(value, name), change)
    change(value, written)
    return written


def leave_out_defaults(struct: Struct, written: dict[str, Any]) -> None:
    for field in msgspec.structs.fields(struct):
        if getattr(struct, field.name) == field.default:
            written.pop(field.name, None)


def names_of(struct: type[Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(struct)}


KNOWN_NAMES = {"type"}.union(
    *(names_of(struct) for struct in CLIENT_PAYLOADS),
    *(names_of(struct) for struct in (SystemPrompt, SceneContext, SessionUpdate, RequestContent)),
    *(names_of(struct) for struct in (FunctionDefinition, FunctionParameter)),
    *(names_of(struct) for struct in (ApiKeyAuth, AccountAuth)),
    ("version", "msg_type", "session_id", "payload", "timestamp"),
)
unknown_fields = st.dictionaries(texts.filter(lambda name: name not in KNOWN_NAMES), json_values)


@pytest.mark.parametrize("struct", CLIENT_PAYLOADS, ids=lambda struct: struct.msg_type)
def test_what_a_client_writes_is_read_as_it_was_meant(struct: type[Any]) -> None:
    @PURE
    @given(FROM_CLIENT[struct], maybe(texts))
    def there(payload: ClientPayload, session_id: str | None) -> None:
        meant = ClientFrame(session_id, payload)
        assert decode(enveloped(payload, session_id)) == meant
        short = walked(payload, leave_out_defaults)
        assert decode(enveloped(payload, session_id, short)) == meant

    there()


@PURE
@given(from_client, unknown_fields, unknown_fields)
def test_unknown_fields_change_nothing_wherever_they_are(
    payload: ClientPayload, more: dict[str, Any], around: dict[str, Any]
) -> None:
    longer = walked(payload, lambda _, written: written.update(more))
    frame = {**around, **json.loads(enveloped(payload, "s", longer)), **around}
    for data in (msgspec.json.encode(frame), json.dumps(frame, indent=1).encode()):
        assert decode(data) == ClientFrame("s", payload)


class Envelope(Struct, forbid_unknown_fields=True):
    """What a client gets."""

    version: str
    msg_type: str
    session_id: str | None
    payload: Raw
    timestamp: int


@pytest.mark.parametrize("struct", SERVER_PAYLOADS, ids=lambda struct: struct.msg_type)
def test_what_the_server_writes_is_read_as_it_was_meant(struct: type[Any]) -> None:
    @PURE
    @given(FROM_SERVER[struct], maybe(texts), counts)
    def back(payload: Any, session_id: str | None, timestamp_ms: int) -> None:
        data = encode(payload, session_id, timestamp_ms)
        envelope = msgspec.json.decode(data, type=Envelope)
        assert (envelope.version, envelope.msg_type) == (VERSION, struct.msg_type)
        assert (envelope.session_id, envelope.timestamp) == (session_id, timestamp_ms)
        assert msgspec.json.decode(envelope.payload, type=struct) == payload
        assert json.loads(data)["payload"].keys() == {
            name for name in struct.__struct_fields__ if getattr(payload, name) is not UNSET
        }

    back()


@PURE
@given(texts, ids, texts, calls, counts)
def test_the_fast_encoder_writes_the_same_bytes(
    session_id: str, request_id: str, text: str, call: FunctionCall, timestamp_ms: int
) -> None:
    encoder = AnswerEncoder(session_id, request_id)
    tool_call = ToolCall(call.call_id, call.name, json.dumps(call.parameters))
    for seq in (0, 2):
        said = Response(request_id, seq, ResponseContent(text))
        assert encoder.encode_text(text, timestamp_ms) == encode(said, session_id, timestamp_ms)
        asked = Response(request_id, seq + 1, function_call=call)
        assert encoder.encode_call(tool_call, timestamp_ms) == (
            encode(asked, session_id, timestamp_ms)
        )


RETRYABLE = {
    "AUTH_FAILED": True,
    "SESSION_INVALID": False,
    "STREAM_SEQ_ERROR": True,
    "PAYLOAD_TOO_LARGE": False,
    "SERVER_BUSY": True,
    "MALFORMED_PAYLOAD": False,
    "INTERNAL_ERROR": True,
    "REQUEST_TIMEOUT": True,
}


@PURE
@given(st.sampled_from(ErrorCode), texts, unset_or(ids))
def test_an_error_has_the_words_and_the_advice_of_its_code(
    code: ErrorCode, detail: str, request_id: Any
) -> None:
    made = error(code, detail, request_id=request_id)
    assert (made.error_code, made.error_detail, made.request_id) == (code, detail, request_id)
    assert made.retryable is RETRYABLE[code.value]
    assert made.error_msg == error(code, "").error_msg != ""


def test_every_code_has_its_advice() -> None:
    assert RETRYABLE.keys() == {code.value for code in ErrorCode}


@settings(PURE, max_examples=10)
@given(st.lists(names, min_size=MAX_FUNCTIONS, max_size=MAX_FUNCTIONS + 1, unique=True))
def test_a_session_may_have_128_functions(names: list[str]) -> None:
    register = Register(ApiKeyAuth("k"), function_calling=[FunctionDefinition(n) for n in names])
    data = enveloped(register, None)
    if len(names) <= MAX_FUNCTIONS:
        assert decode(data).payload == register
    else:
        with pytest.raises(FrameError, match="the limit is 128"):
            decode(data)


# Frames with faults ------------------------------------------------------------------------------


class Text(str):
    """JSON that is written as it stands: also what no encoder writes."""


class Members(list[tuple[str, Any]]):
    """An object, in which a name may be there twice."""


def opened(value: Any) -> Any:
    """JSON in a form in which it can be spoiled."""
    if isinstance(value, dict):
        return Members((name, opened(one)) for name, one in value.items())
    return [opened(one) for one in value] if isinstance(value, list) else value


def written(value: Any) -> str:
    """What `opened` gave, as text."""
    match value:
        case Text():
            return str(value)
        case Members():
            return "{" + ",".join(f"{json.dumps(n)}:{written(one)}" for n, one in value) + "}"
        case list():
            return "[" + ",".join(map(written, value)) + "]"
        case _:
            return json.dumps(value, ensure_ascii=False)


def places(value: Any) -> list[tuple[list[Any], int]]:
    """Every place of a value inside of another."""
    found: list[tuple[list[Any], int]] = []
    if isinstance(value, list):
        for index, one in enumerate(value):
            found.append((value, index))
            found += places(one[1] if isinstance(value, Members) else one)
    return found


OUT_OF_RANGE = ["1e400", "-1e400", "9" * 5000]

ODD_JSON = [
    *OUT_OF_RANGE,
    "null", "true", "0", "-1", "1.5", "1e-400", "9" * 400, "NaN",
    "-Infinity", "01", '""', '"\\ud83d"', '"\\u0000"', '"\x00"', "'a'", "[]", "{}", "[{}]",
    '{"":null}', '{"type":"API_KEY"}', '{"request_id":7}', '"VOICE "', '"2.0"', '"REQUEST"',
    '"HEALTH_CHECK"', '"DANCE"', '"sess_0123456789abcdef"', '"' + "x" * 65 + '"',
    "",
]  # fmt: skip
odd_values = st.one_of(
    st.sampled_from(ODD_JSON).map(Text),
    st.sampled_from([20, 500, 5000, 20_000]).flatmap(
        lambda depth: st.sampled_from(
            [
                f"@[*{depth}@@]*{depth}@",
                f'@{{"a":*{depth}@1@}}*{depth}@',
                f"@[*{depth}@",
            ]
        ).map(Text)
    ),
    json_values.map(opened),
)


def expanded(data: bytes) -> bytes:
    """Bytes with `@x*3@` made `xxx`: what is large is drawn so, lest a failure fill the screen."""
    return re.sub(
        rb"@(.{1,5}?)\*(\d{1,6})@", lambda found: found[1] * min(int(found[2]), 300_000), data
    )


@st.composite
def spoiled(draw: DrawFn, frames: SearchStrategy[dict[str, Any]]) -> bytes:
    """The bytes of a frame, to be `expanded`: with up to three faults in its values, and up to one
    in its bytes."""
    frame = opened(draw(frames))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        everywhere = places(frame)
        in_envelope = [(frame, index) for index in range(len(frame))]
        if not everywhere:
            break
        values, index = draw(st.sampled_from(in_envelope if draw(st.booleans()) else everywhere))
        spoil(draw, values, index)
    data = written(frame).encode()
    return draw(spoiled_bytes(data)) if draw(st.sampled_from([False, False, True])) else data


def spoil(draw: DrawFn, values: list[Any], index: int) -> None:
    """One fault at a place."""
    name, value = values[index] if isinstance(values, Members) else (None, values[index])
    fault = draw(st.sampled_from(["lost", "other", "other", "twice", "wrapped", "renamed"]))
    match fault:
        case "lost":
            del values[index]
            return
        case "other" | "twice":
            value = draw(odd_values)
        case "wrapped":
            value = draw(st.sampled_from([[value], Members([("a", value)]), [value, value]]))
        case "renamed" if name is not None:
            name = draw(texts | st.just(name + " ") | st.just(name.upper()))
    new = value if name is None else (name, value)
    if fault == "twice":
        values.insert(draw(st.sampled_from([index, len(values)])), new)
    else:
        values[index] = new


@st.composite
def spoiled_bytes(draw: DrawFn, data: bytes) -> bytes:
    """One fault in bytes."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    match draw(st.sampled_from(["cut", "flipped", "lost", "more", "twice", "padded"])):
        case "cut":
            return data[:at]
        case "flipped" if data:
            flipped = data[at] ^ (1 << draw(st.integers(0, 7)))
            return data[:at] + bytes([flipped]) + data[at + 1 :]
        case "lost":
            return data[:at] + data[at + draw(st.integers(1, 10)) :]
        case "more":
            return data[:at] + draw(st.binary(min_size=1, max_size=5)) + data[at:]
        case "padded":
            return data + b"@ *%d@" % MAX_TEXT_BYTES
        case _:
            return data + data


def as_json(payload: ClientPayload) -> dict[str, Any]:
    frame: dict[str, Any] = json.loads(enveloped(payload, "sess_0123456789abcdef"))
    return frame


DETAIL_CHARS = 1000
"""More than any `error_detail` of `decode` may have, whatever was sent."""


def assert_fit_for_the_client(fault: FrameError) -> None:
    assert fault.code in (ErrorCode.MALFORMED_PAYLOAD, ErrorCode.PAYLOAD_TOO_LARGE)
    assert 0 < len(fault.detail) <= DETAIL_CHARS
    assert fault.request_id is None or 1 <= len(fault.request_id) <= 64
    said = error(fault.code, fault.detail, request_id=fault.request_id or UNSET)
    assert json.loads(encode(said, "s", 0))["payload"]["error_detail"] == fault.detail


def test_whatever_is_wrong_with_a_frame_it_is_understood_or_refused() -> None:
    seen: Counter[str] = Counter()

    @settings(PURE, max_examples=600)
    @given(spoiled(from_client.map(as_json)))
    def feed(data: bytes) -> None:
        try:
            frame = decode(expanded(data))
        except FrameError as fault:
            assert_fit_for_the_client(fault)
            seen[fault.code] += 1
        else:
            assert isinstance(frame, ClientFrame)
            assert type(frame.payload) in CLIENT_PAYLOADS
            again = enveloped(frame.payload, frame.session_id)
            assert decode(again) == frame
            seen["understood"] += 1

    feed()
    assert seen.keys() == {"understood", "MALFORMED_PAYLOAD", "PAYLOAD_TOO_LARGE"}, seen
    assert min(seen["understood"], seen["MALFORMED_PAYLOAD"]) > 20, seen


@PURE
@given(st.binary() | st.text().map(str.encode) | json_values.map(msgspec.json.encode))
def test_what_was_never_a_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError) as caught:
        decode(data)
    assert_fit_for_the_client(caught.value)


# The same against a gateway ----------------------------------------------------------------------

SESSION, SCRIPT = "@session@", "@script@"
"""Stand for what is known only when a frame is sent."""

few_ids = st.sampled_from(["a", "b", "c"])
of_voice = st.sampled_from(["v", "w"])


@st.composite
def wire_frames(draw: DrawFn) -> dict[str, Any]:
    """Frames that have to do with one another: few ids, the right session, a known text."""
    payload = draw(from_client | FROM_CLIENT[Request])
    frame = as_json(payload)
    frame["session_id"] = SESSION
    fields = frame["payload"]
    match payload:
        case Request(data_type="TEXT"):
            fields["request_id"] = draw(few_ids)
            if draw(st.booleans()):
                fields["content"]["text"] = SCRIPT
        case Request():
            fields["request_id"] = draw(of_voice)
        case Interrupt() if draw(st.booleans()):
            fields["interrupt_request_id"] = draw(few_ids | of_voice)
        case FunctionResult() if draw(st.booleans()):
            fields["request_id"] = draw(few_ids)
    return frame


Sent: TypeAlias = tuple[str, bytes]
sent: SearchStrategy[Sent] = st.one_of(
    st.tuples(st.just("text"), spoiled(wire_frames())),
    st.tuples(st.just("text"), spoiled(wire_frames())),
    st.tuples(st.just("text"), wire_frames().map(msgspec.json.encode)),
    st.tuples(st.just("binary"), st.binary(max_size=50)),
)


class Talk:
    """One connection, and what is known of it: says of each answer whether it may be.

    What a voice request is answered with is a matter of `actors/session/voice.py`, and not looked
    at here.
    """

    def __init__(self, client: Client, script: str, seen: Counter[str]) -> None:
        self._client = client
        self._script = script
        self._seen = seen
        self._used: set[str] = set()
        self._voices: set[str] = set()
        self.over = False

    def register(self) -> None:
        if self._client.session_id is None:
            self._client.register()

    def say(self, kind: str, data: bytes) -> None:
        """Send something, and check what comes back."""
        if kind == "binary":
            self._client.send_binary(data)
            self._check_binary(self._answers())
            return
        session_id = self._client.session_id
        data = data.replace(SESSION.encode(), (session_id or "").encode())
        data = expanded(data.replace(SCRIPT.encode(), self._script.encode()))
        if len(data) > MAX_FRAME_BYTES:
            return  # closes the connection: `test_server.py`
        try:
            frame = decode(data)
        except FrameError as fault:
            self._client.send_text(data)
            self._check_refused(fault, self._answers())
            return
        self._client.send_text(data)
        self._seen[f"understood {frame.payload.msg_type}"] += 1
        match frame.payload:
            case HealthCheck():
                self._check_types(self._answers(2), ["HEALTH_CHECK_ACK"])
            case Register() if session_id is None:
                (ack,) = self._answers()
                assert ack.msg_type == "REGISTER_ACK"
                self._client.session_id = ack.payload["session_id"]
            case Register():
                self._check_error(self._answers(), "MALFORMED_PAYLOAD")
            case _ if session_id is None:
                self._check_error(self._answers(), "SESSION_INVALID")
            case Interrupt() as interrupt:  # whatever its session_id
                (ack,) = self._but_voice(self._answers())
                assert ack.msg_type == "INTERRUPT_ACK"
                echo = ack.payload.get("interrupt_request_id", UNSET)
                assert echo == interrupt.interrupt_request_id
            case _ if frame.session_id != session_id:
                self._check_error(self._answers(), "SESSION_INVALID")
            case Request() as request:
                self._check_request(request)
            case FunctionResult() as result:
                self._check_result(result)
            case SessionQuery():
                self._check_types(self._answers(), ["SESSION_INFO"])
            case HeartbeatReply():
                assert self._answers() == []
            case Shutdown():
                self._client.wait_for(lambda one: one.msg_type == "SHUTDOWN")
                assert self._client.wait_closed() == 1000
                self.over = True

    def _answers(
        self, health_checks: int = 1, enough: Callable[[list[Received]], bool] = lambda _: True
    ) -> list[Received]:
        """What comes before the answer to a HEALTH_CHECK, which shows that the session lives.

        Args:
            health_checks: how many answers to one are awaited.
            enough: whether nothing more is awaited besides.
        """
        self._client.send("HEALTH_CHECK", {})
        got: list[Received] = []
        while not enough(got) or self._types(got).count("HEALTH_CHECK_ACK") < health_checks:
            got.append(self._client.next())
        got.remove([one for one in got if one.msg_type == "HEALTH_CHECK_ACK"][-1])
        return got

    def _types(self, frames: list[Received]) -> list[str]:
        return [one.msg_type for one in frames]

    def _but_voice(self, frames: list[Received]) -> list[Received]:
        return [one for one in frames if one.payload.get("request_id") not in self._voices]

    def _check_types(self, got: list[Received], types: list[str]) -> None:
        assert self._types(self._but_voice(got)) == types

    def _check_error(self, got: list[Received], code: str, request_id: str | None = None) -> None:
        (one,) = self._but_voice(got)
        assert one.msg_type == "ERROR"
        assert one.payload["error_code"] == code
        assert one.payload["retryable"] is RETRYABLE[code]
        assert one.payload.get("request_id") == request_id
        assert 0 < len(one.payload["error_detail"]) <= DETAIL_CHARS
        self._seen[code] += 1

    def _check_binary(self, got: list[Received]) -> None:
        if self._client.session_id is None:
            self._check_error(got, "SESSION_INVALID")
        elif not self._voices or self._but_voice(got):
            self._check_error(got, "MALFORMED_PAYLOAD")

    def _check_refused(self, fault: FrameError, got: list[Received]) -> None:
        request_id = fault.request_id
        if request_id in self._voices:
            if self._but_voice(got):
                self._check_error(got, fault.code)
        else:
            self._check_error(got, fault.code, None if request_id in self._used else request_id)
            if fault.is_voice and request_id is not None:
                self._voices.add(request_id)  # the rest of it is nobody's fault

    def _check_request(self, request: Request) -> None:
        request_id, text = request.request_id, request.content.text
        if request_id in self._used:
            self._check_error(self._answers(), "MALFORMED_PAYLOAD")
        elif request.data_type == "VOICE":
            self._voices.add(request_id)
            if self._but_voice(got := self._answers()):
                self._check_error(got, "MALFORMED_PAYLOAD")
        elif request_id in self._voices:
            reject()
        else:
            self._used.add(request_id)
            goes_on_for_ever = text not in ("", self._script)
            if goes_on_for_ever:
                self._client.interrupt(request_id)
            awaited = {"INTERRUPT_ACK"} if goes_on_for_ever else set()

            def enough(frames: list[Received]) -> bool:
                return awaited <= set(self._types(frames)) and any(
                    one.is_terminal and one.payload["request_id"] == request_id for one in frames
                )

            got = self._but_voice(self._answers(enough=enough))
            assert set(self._types(got)) <= {"RESPONSE", "ERROR"} | awaited
            self._check_answer(request_id, text == self._script)

    def _check_answer(self, request_id: str, is_scripted: bool) -> None:
        # What was refused under this id before, for its form, is no end of this request.
        frames = [
            one
            for one in self._client.frames_of(request_id)
            if one.payload.get("error_detail") is None or one.is_terminal
        ]
        last = frames[-1]
        assert last.is_terminal
        said = [one for one in frames if one.msg_type == "RESPONSE" and not one.is_terminal]
        assert [one.payload["text_stream_seq"] for one in said] == list(range(len(said)))
        if is_scripted and last.payload["outcome"] == "COMPLETED":
            assert self._client.text_of(request_id) == ANSWER
        self._seen[last.payload["outcome"]] += 1

    def _check_result(self, result: FunctionResult) -> None:
        # No function was called, so none can have returned anything.
        request_id = result.request_id
        if request_id is not None and request_id in self._voices:
            reject()
        is_new = request_id not in self._used
        self._check_error(self._answers(), "MALFORMED_PAYLOAD", request_id if is_new else None)
        if request_id is not None:
            self._used.add(request_id)


ANSWER = "here you are"


def test_whatever_a_client_sends_it_gets_what_the_protocol_says_and_lives_on(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.answer(["here ", "you ", "are"]))
    seen: Counter[str] = Counter()

    @settings(PURE, max_examples=130, phases=[Phase.generate])
    @given(st.lists(sent, max_size=2), st.lists(sent, min_size=3, max_size=10))
    def talk(before: list[Sent], after: list[Sent]) -> None:
        with Client(gateway.server.port, register=False) as client:
            talk = Talk(client, script, seen)
            for step in [*before, None, *after]:
                if step is None:
                    talk.register()
                else:
                    talk.say(*step)
                if talk.over:
                    return

    talk()
    understood = [seen[f"understood {payload.msg_type}"] for payload in CLIENT_PAYLOADS]
    assert sum(understood) > 100, seen
    assert seen["MALFORMED_PAYLOAD"] > 100, seen
    assert seen["COMPLETED"] + seen["INTERRUPTED"] > 0, seen


# Found so ---------------------------------------------------------------------------------------

BEGINNING = {"request_id": "v", "data_type": "VOICE", "content": {"voice_mode": "BINARY"}}


def test_the_id_of_a_voice_request_whose_frames_are_coming_is_used(client: Client) -> None:
    client.send("REQUEST", {**BEGINNING, "stream_seq": 0})
    client.request("", "v")
    refused = client.wait_for(lambda frame: frame.msg_type in ("ERROR", "RESPONSE"))
    assert refused.payload.get("error_code") == "MALFORMED_PAYLOAD"
    assert "request_id" not in refused.payload


@pytest.mark.parametrize("number", OUT_OF_RANGE)
def test_a_number_out_of_range_in_a_function_is_refused(client: Client, number: str) -> None:
    frame = as_json(Register(ApiKeyAuth("k")))
    frame["payload"]["function_calling"] = [{"name": "f", "parameters": {"x": SCRIPT}}]
    client.send_text(json.dumps(frame).replace(f'"{SCRIPT}"', number).encode())
    refused = client.next()
    assert refused.payload["error_code"] == "MALFORMED_PAYLOAD"


@pytest.mark.parametrize("asks", ["SESSION_QUERY", "REQUEST"])
def test_a_function_nested_as_deeply_as_is_accepted_does_no_harm(
    gateway: Gateway, provider: ProviderProcess, asks: str
) -> None:
    def lives(depth: int) -> bool | None:
        """True when it goes on; None when the REGISTER was refused."""
        nested = "[" * depth + "]" * depth
        frame = as_json(Register(ApiKeyAuth("k"))) | {"session_id": None}
        frame["payload"]["function_calling"] = [{"name": "f", "parameters": {"x": SCRIPT}}]
        data = json.dumps(frame).replace(f'"{SCRIPT}"', nested).encode()
        with Client(gateway.server.port, register=False) as client:
            client.send_text(data)
            first = client.next()
            if first.msg_type == "ERROR":
                return None
            client.session_id = first.payload["session_id"]
            if asks == "SESSION_QUERY":
                client.send("SESSION_QUERY", {})
            else:
                client.request(provider.fresh(scripts.answer(["a"])))
            client.send("HEALTH_CHECK", {})
            while client.read_some():
                if any(one.msg_type == "HEALTH_CHECK_ACK" for one in client.frames):
                    return True
            return False

    accepted, refused = 1, 2000
    assert lives(accepted) and lives(refused) is None
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        if lives(middle) is None:
            refused = middle
        else:
            accepted = middle
    assert lives(accepted)


def test_a_long_number_is_not_repeated_at_length(client: Client) -> None:
    client.send("REQUEST", {**BEGINNING, "stream_seq": 10**4000})
    refused = client.wait_for(lambda frame: frame.msg_type == "ERROR")
    assert len(refused.payload["error_detail"]) <= DETAIL_CHARS

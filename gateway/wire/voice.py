"""VOICE requests while their frames come: their order, their size, and what is swallowed of them.
Pure: no I/O, no clock.

BASE64, stream_flag false    one frame, which is all
BASE64, stream_flag true     stream_seq 0, 1, 2, … and -1 on the last, each with voice
BINARY                       stream_seq 0, binary frames, stream_seq -1
"""

from __future__ import annotations

from collections import OrderedDict

from actors.session.messages import (
    NotUnderstood,
    SessionMessage,
    SignOfLife,
    VoiceBegun,
    VoiceBroken,
    VoiceEnded,
)
from actors.words import ErrorCode
from gateway.wire.frames import Request, VoiceMode

MAX_IGNORED_VOICES = 100
"""VOICE requests of one client whose remaining frames are swallowed."""

_DIGITS = 20
"""So much of a number is quoted in an error."""

_LAST = -1
"""The `stream_seq` of the last frame."""


class VoiceError(Exception):
    """A frame does not fit the voice request that it belongs to.

    Args:
        code: the error code for the client.
        detail: what exactly is wrong, for the client.
    """

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


class VoiceIntake:
    """Checks the sequence and size of one voice request; the voice itself is only counted as long
    as speech is not recognized.

    A frame that raises changes nothing.

    Args:
        request_id: the request that the frames belong to.
        mode: how its voice comes.
        max_bytes: how much voice it may have, decoded.
    """

    def __init__(self, request_id: str, mode: VoiceMode, max_bytes: int) -> None:
        self.request_id = request_id
        self.mode: VoiceMode = mode
        self.complete = False
        self.size = 0
        """Bytes of voice so far, decoded."""
        self._max_bytes = max_bytes
        self._frames = 0
        """REQUEST frames so far."""

    def add_frame(
        self, mode: VoiceMode, stream_flag: bool, stream_seq: int, voice: bytes | None
    ) -> None:
        """A REQUEST frame of this id has come; the first one too.

        Args:
            mode: its `voice_mode`.
            stream_flag: whether more frames follow; looked at in BASE64 mode only.
            stream_seq: its place; not looked at where the frame is all.
            voice: its voice, decoded; None where it has none. Looked at in BASE64 mode only.

        Raises:
            VoiceError: `STREAM_SEQ_ERROR`, `MALFORMED_PAYLOAD` (no voice) or `PAYLOAD_TOO_LARGE`.
        """
        if mode != self.mode:
            raise _out_of_order(f"a frame in {self.mode} mode", f"one in {mode} mode")
        is_all = mode == "BASE64" and not stream_flag and self._frames == 0
        if not is_all:
            self._check_place(stream_flag, stream_seq)
        last = is_all or stream_seq == _LAST
        if mode == "BASE64":
            if voice is not None:
                self._count(voice)
            elif is_all or not last:
                raise VoiceError(
                    ErrorCode.MALFORMED_PAYLOAD, "a VOICE request without `payload.content.voice`"
                )
        self._frames += 1
        self.complete = last

    def add_binary(self, data: bytes) -> None:
        """A binary frame has come.

        Raises:
            VoiceError: `STREAM_SEQ_ERROR` or `PAYLOAD_TOO_LARGE`.
        """
        if self.mode != "BINARY":
            raise _out_of_order("voice in BASE64 mode", "a binary frame")
        if self.complete or not self._frames:
            raise _out_of_order(self._expected, "a binary frame")
        self._count(data)

    @property
    def _expected(self) -> str:
        if self.complete:
            return "nothing after the end of the voice"
        if not self._frames:
            return "stream_seq 0"
        if self.mode == "BINARY":
            return "binary frames or stream_seq -1"
        return f"stream_seq {self._frames} or -1"

    def _check_place(self, stream_flag: bool, stream_seq: int) -> None:
        if self.complete:
            fits = False
        elif not self._frames:
            fits = stream_seq == 0
        elif self.mode == "BINARY":
            fits = stream_seq == _LAST
        else:
            fits = stream_flag and stream_seq in (self._frames, _LAST)
        if not fits:
            flag = "" if stream_flag else " with stream_flag false"
            raise _out_of_order(self._expected, f"stream_seq {str(stream_seq)[:_DIGITS]}{flag}")

    def _count(self, voice: bytes) -> None:
        size = self.size + len(voice)
        if size > self._max_bytes:
            raise VoiceError(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"{size} bytes of voice; the limit is {self._max_bytes}",
            )
        self.size = size


class VoiceFrames:
    """The VOICE requests of one client: their frames go in, a session's words come out.

    The session decides which request it listens to, and says of which it wants no more (`ignore`):
    the rest of that one is swallowed up to its last frame.

    Args:
        max_bytes: how much voice each may have, decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._intakes: OrderedDict[str, VoiceIntake] = OrderedDict()
        """Those whose frames are coming, the newest last. There is more than one only until the
        session has decided about the newest."""
        self._ignored: OrderedDict[str, None] = OrderedDict()
        """Those of which more frames may come, which are swallowed."""

    def take_frame(self, request: Request) -> list[SessionMessage]:
        """A REQUEST with voice has come; the first or another one of its id."""
        request_id, content = request.request_id, request.content
        mode = content.voice_mode
        assert mode is not None  # `decode` sees to it
        words: list[SessionMessage] = []
        intake = self._intakes.get(request_id)
        if intake is None and request_id in self._ignored and not _is_all(request):
            words.append(SignOfLife())
        else:
            if intake is None:
                intake = VoiceIntake(request_id, mode, self._max_bytes)
                self._intakes[request_id] = intake
                words.append(VoiceBegun(request_id, tuple(request.updates)))
            try:
                intake.add_frame(mode, request.stream_flag, request.stream_seq, content.voice)
            except VoiceError as error:
                words += [self._broken(request_id, error.code, error.detail), SignOfLife()]
            else:
                if intake.complete:
                    del self._intakes[request_id]
                    words.append(VoiceEnded(request_id))
                elif not words:
                    words.append(SignOfLife())
        if _is_all(request) or request.stream_seq == _LAST:
            self._ignored.pop(request_id, None)  # no more of it will come
        return words

    def take_binary(self, data: bytes) -> list[SessionMessage]:
        """A binary frame has come: it belongs to the newest request."""
        intake = next(reversed(self._intakes.values()), None)
        if intake is not None:
            try:
                intake.add_binary(data)
            except VoiceError as error:
                return [self._broken(intake.request_id, error.code, error.detail)]
        elif not self._ignored:
            detail = "a binary frame outside of a request"
            return [NotUnderstood(ErrorCode.MALFORMED_PAYLOAD, detail)]
        return []

    def take_fault(self, request_id: str, code: ErrorCode, detail: str) -> list[SessionMessage]:
        """A REQUEST with voice has come that was not understood."""
        if request_id in self._intakes:
            return [self._broken(request_id, code, detail)]
        if request_id in self._ignored:
            return []
        self._ignore(request_id)  # nothing has begun, but the rest may come
        return [NotUnderstood(code, detail, request_id, is_voice=True)]

    def ignore(self, request_id: str) -> None:
        """Swallow the rest of a request, if more of it may come."""
        is_complete = self._intakes.pop(request_id, None) is None
        if not is_complete:
            self._ignore(request_id)

    def _broken(self, request_id: str, code: ErrorCode, detail: str) -> VoiceBroken:
        del self._intakes[request_id]
        self._ignore(request_id)
        return VoiceBroken(request_id, code, detail)

    def _ignore(self, request_id: str) -> None:
        self._ignored[request_id] = None
        if len(self._ignored) > MAX_IGNORED_VOICES:
            self._ignored.popitem(last=False)


def _is_all(request: Request) -> bool:
    return request.content.voice_mode == "BASE64" and not request.stream_flag


def _out_of_order(expected: str, came: str) -> VoiceError:
    return VoiceError(ErrorCode.STREAM_SEQ_ERROR, f"expected {expected}; got {came}")

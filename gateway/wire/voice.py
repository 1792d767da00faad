"""VOICE requests while their frames arrive: checks the order and the size, and ignores the rest of
requests that have ended. Pure: no I/O, no clock.

BASE64, stream_flag false    one frame
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
"""How many VOICE requests of one client are remembered as ignored."""

_MAX_DIGITS = 20
"""How much of a number is quoted in an error."""

_LAST = -1
"""The `stream_seq` of the last frame."""


class VoiceError(Exception):
    """A frame is not valid at this point of its voice request.

    Args:
        code: the error code for the client.
        detail: what exactly is wrong, for the client.
    """

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


class VoiceIntake:
    """Checks the sequence and the size of one voice request. The voice itself is only counted,
    since there is no speech recognition yet.

    A frame that raises changes nothing.

    Args:
        request_id: the request that the frames belong to.
        mode: its `voice_mode`.
        max_bytes: how many bytes of voice it may have, decoded.
    """

    def __init__(self, request_id: str, mode: VoiceMode, max_bytes: int) -> None:
        self.request_id = request_id
        self.mode: VoiceMode = mode
        self.is_complete = False
        self.size = 0
        """How many bytes of voice have arrived, decoded."""
        self._max_bytes = max_bytes
        self._frames = 0
        """How many REQUEST frames have arrived."""

    def add_frame(
        self, mode: VoiceMode, stream_flag: bool, stream_seq: int, voice: bytes | None
    ) -> None:
        """Add a REQUEST frame of this id.

        Args:
            mode: its `voice_mode`.
            stream_flag: its `stream_flag`: whether the voice has several frames. Ignored in BINARY
                mode.
            stream_seq: its `stream_seq`. Ignored if it is the only frame.
            voice: its voice, decoded; None if it has none. Ignored in BINARY mode.

        Raises:
            VoiceError: `STREAM_SEQ_ERROR`, `MALFORMED_PAYLOAD` (no voice) or `PAYLOAD_TOO_LARGE`.
        """
        if mode != self.mode:
            raise _out_of_order(f"a frame in {self.mode} mode", f"one in {mode} mode")
        is_only_frame = mode == "BASE64" and not stream_flag and self._frames == 0
        if not is_only_frame:
            self._check_place(stream_flag, stream_seq)
        is_last = is_only_frame or stream_seq == _LAST
        if mode == "BASE64":
            if voice is not None:
                self._count(voice)
            elif is_only_frame or not is_last:
                raise VoiceError(
                    ErrorCode.MALFORMED_PAYLOAD, "a VOICE request must have `payload.content.voice`"
                )
        self._frames += 1
        self.is_complete = is_last

    def add_binary(self, data: bytes) -> None:
        """Add a binary frame.

        Raises:
            VoiceError: `STREAM_SEQ_ERROR` or `PAYLOAD_TOO_LARGE`.
        """
        if self.mode != "BINARY":
            raise _out_of_order("voice in BASE64 mode", "a binary frame")
        if self.is_complete or not self._frames:
            raise _out_of_order(self._expected, "a binary frame")
        self._count(data)

    @property
    def _expected(self) -> str:
        if self.is_complete:
            return "nothing after the end of the voice"
        if not self._frames:
            return "stream_seq 0"
        if self.mode == "BINARY":
            return "binary frames or stream_seq -1"
        return f"stream_seq {self._frames} or -1"

    def _check_place(self, stream_flag: bool, stream_seq: int) -> None:
        if self.is_complete:
            fits = False
        elif not self._frames:
            fits = stream_seq == 0
        elif self.mode == "BINARY":
            fits = stream_seq == _LAST
        else:
            fits = stream_flag and stream_seq in (self._frames, _LAST)
        if not fits:
            flag = "" if stream_flag else " with stream_flag false"
            raise _out_of_order(self._expected, f"stream_seq {str(stream_seq)[:_MAX_DIGITS]}{flag}")

    def _count(self, voice: bytes) -> None:
        size = self.size + len(voice)
        if size > self._max_bytes:
            raise VoiceError(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"{size} bytes of voice; the limit is {self._max_bytes}",
            )
        self.size = size


class VoiceFrames:
    """The VOICE requests of one client. Turns their frames into messages to the session.

    The session decides which requests it accepts. When it wants no more of one, it calls `ignore`:
    the frames that still arrive are dropped, up to the last one.

    Args:
        max_bytes: how many bytes of voice each request may have, decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._intakes: OrderedDict[str, VoiceIntake] = OrderedDict()
        """The requests whose frames are arriving, newest last. There is more than one only until
        the session has handled the newest."""
        self._ignored: OrderedDict[str, None] = OrderedDict()
        """The requests of which further frames are dropped, oldest first."""

    def take_frame(self, request: Request) -> list[SessionMessage]:
        """Handle a REQUEST with voice: the first frame of its id, or a later one."""
        request_id, content = request.request_id, request.content
        mode = content.voice_mode
        assert mode is not None  # `decode` has checked it
        words: list[SessionMessage] = []
        intake = self._intakes.get(request_id)
        if intake is None and request_id in self._ignored and not _is_only_frame(request):
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
                if intake.is_complete:
                    del self._intakes[request_id]
                    words.append(VoiceEnded(request_id))
                elif not words:
                    words.append(SignOfLife())
        if _is_only_frame(request) or request.stream_seq == _LAST:
            self._ignored.pop(request_id, None)  # it was the last frame
        return words

    def take_binary(self, data: bytes) -> list[SessionMessage]:
        """Handle a binary frame, which belongs to the newest request."""
        intake = next(reversed(self._intakes.values()), None)
        if intake is not None:
            try:
                intake.add_binary(data)
            except VoiceError as error:
                return [self._broken(intake.request_id, error.code, error.detail)]
        elif not self._ignored:
            detail = "a binary frame outside a VOICE request"
            return [NotUnderstood(ErrorCode.MALFORMED_PAYLOAD, detail)]
        return []

    def take_fault(self, request_id: str, code: ErrorCode, detail: str) -> list[SessionMessage]:
        """Handle a REQUEST with voice that could not be decoded."""
        if request_id in self._intakes:
            return [self._broken(request_id, code, detail)]
        if request_id in self._ignored:
            return []
        self._ignore(request_id)  # it has not begun, but more of its frames may follow
        return [NotUnderstood(code, detail, request_id, is_voice=True)]

    def ignore(self, request_id: str) -> None:
        """Drop the rest of a request, if more of its frames may follow."""
        has_more = self._intakes.pop(request_id, None) is not None
        if has_more:
            self._ignore(request_id)

    def _broken(self, request_id: str, code: ErrorCode, detail: str) -> VoiceBroken:
        del self._intakes[request_id]
        self._ignore(request_id)
        return VoiceBroken(request_id, code, detail)

    def _ignore(self, request_id: str) -> None:
        self._ignored[request_id] = None
        if len(self._ignored) > MAX_IGNORED_VOICES:
            self._ignored.popitem(last=False)


def _is_only_frame(request: Request) -> bool:
    return request.content.voice_mode == "BASE64" and not request.stream_flag


def _out_of_order(expected: str, came: str) -> VoiceError:
    return VoiceError(ErrorCode.STREAM_SEQ_ERROR, f"expected {expected}; got {came}")

"""VOICE requests while their frames come: order, size, and what nobody wants any more. Pure: no
I/O, no clock.

BASE64, stream_flag false    one frame, which is all
BASE64, stream_flag true     stream_seq 0, 1, 2, … and -1 on the last, each with voice
BINARY                       stream_seq 0, binary frames, stream_seq -1
"""

from __future__ import annotations

from collections import OrderedDict

from gateway.wire.protocol import ErrorCode, Request, VoiceMode

MAX_DROPPED_VOICES = 100
"""VOICE requests of one session of which frames may still come that nobody wants."""

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
    as nobody recognizes speech.

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


class VoiceRequests:
    """Those of one session: at most one is open, its frames are coming; others are dropped, over
    for us but not for the client, and their rest is ignored.

    Args:
        max_bytes: how much voice each may have, decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._intake: VoiceIntake | None = None
        self.open_id: str | None = None
        """The id of the open one."""
        self._dropped: OrderedDict[str, None] = OrderedDict()

    def begin(self, request: Request) -> None:
        """Open a request in place of the one before. Its first frame is still to be added."""
        mode = request.content.voice_mode
        assert mode is not None  # `decode` sees to it
        self._intake = VoiceIntake(request.request_id, mode, self._max_bytes)
        self.open_id = request.request_id

    def add_frame(self, request: Request) -> bool:
        """A frame of the open request has come; True when its voice is complete.

        Raises:
            VoiceError: as of `VoiceIntake.add_frame`.
        """
        intake, content = self._intake, request.content
        assert intake is not None
        assert content.voice_mode is not None
        intake.add_frame(content.voice_mode, request.stream_flag, request.stream_seq, content.voice)
        return intake.complete

    def add_binary(self, data: bytes) -> None:
        """A binary frame has come while a request is open.

        Raises:
            VoiceError: as of `VoiceIntake.add_binary`.
        """
        assert self._intake is not None
        self._intake.add_binary(data)

    def drop(self, request_id: str) -> None:
        """Take nothing more of a request, open or not."""
        if request_id == self.open_id:
            self._intake = self.open_id = None
        self._dropped[request_id] = None
        if len(self._dropped) > MAX_DROPPED_VOICES:
            self._dropped.popitem(last=False)

    def is_dropped(self, request_id: str) -> bool:
        """Whether frames of this request may still come that nobody wants."""
        return request_id in self._dropped

    def ignores(self, request: Request) -> bool:
        """Whether a frame is of the rest of a dropped request. One that is all is no rest."""
        return request.request_id in self._dropped and not _is_all(request)

    @property
    def ignores_binary(self) -> bool:
        """Whether a binary frame may be of the rest of a dropped request."""
        return bool(self._dropped)

    def came(self, request: Request) -> None:
        """A frame has come, and was dealt with: after a last one, no more of it will come."""
        if _is_all(request) or request.stream_seq == _LAST:
            self._dropped.pop(request.request_id, None)


def _is_all(request: Request) -> bool:
    return request.content.voice_mode == "BASE64" and not request.stream_flag


def _out_of_order(expected: str, came: str) -> VoiceError:
    return VoiceError(ErrorCode.STREAM_SEQ_ERROR, f"expected {expected}; got {came}")

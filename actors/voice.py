"""A VOICE request while its frames come: their order and size. Pure: no I/O, no clock.

BASE64, stream_flag false    one frame, which is all
BASE64, stream_flag true     stream_seq 0, 1, 2, … and -1 on the last, each with voice
BINARY                       stream_seq 0, binary frames, stream_seq -1
"""

from __future__ import annotations

from gateway.protocol import ErrorCode, VoiceMode

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


def _out_of_order(expected: str, came: str) -> VoiceError:
    return VoiceError(ErrorCode.STREAM_SEQ_ERROR, f"expected {expected}; got {came}")

"""Voice requests, frame by frame: their order, their size, and what a client is told."""

from __future__ import annotations

import pytest

from actors.session.voice import MAX_DROPPED_VOICES, VoiceError, VoiceIntake, VoiceRequests
from gateway.wire.protocol import ErrorCode, Request, RequestContent, VoiceMode


def intake(mode: VoiceMode = "BASE64", max_bytes: int = 100) -> VoiceIntake:
    return VoiceIntake("r1", mode, max_bytes)


def streaming(*seqs: int) -> VoiceIntake:
    """A BASE64 stream that has had these frames, two bytes each."""
    voice = intake()
    for seq in seqs:
        voice.add_frame("BASE64", True, seq, b"ab")
    return voice


def recording() -> VoiceIntake:
    """A BINARY request that has begun."""
    voice = intake("BINARY")
    voice.add_frame("BINARY", True, 0, None)
    return voice


def refused(
    voice: VoiceIntake, mode: VoiceMode, flag: bool, seq: int, data: bytes | None = b"ab"
) -> VoiceError:
    """What a frame is refused with, which leaves the intake as it was."""
    before = (voice.size, voice.complete)
    with pytest.raises(VoiceError) as caught:
        voice.add_frame(mode, flag, seq, data)
    assert (voice.size, voice.complete) == before
    return caught.value


def refused_binary(voice: VoiceIntake, data: bytes = b"ab") -> VoiceError:
    before = (voice.size, voice.complete)
    with pytest.raises(VoiceError) as caught:
        voice.add_binary(data)
    assert (voice.size, voice.complete) == before
    return caught.value


def test_a_new_intake_has_nothing() -> None:
    voice = intake("BINARY")
    assert (voice.request_id, voice.mode, voice.size, voice.complete) == ("r1", "BINARY", 0, False)


@pytest.mark.parametrize("seq", [-1, 0, 7])
def test_one_base64_frame_is_complete_whatever_its_seq(seq: int) -> None:
    voice = intake()
    voice.add_frame("BASE64", False, seq, b"abc")
    assert voice.complete
    assert voice.size == 3


@pytest.mark.parametrize(("last", "size"), [(b"xyz", 9), (b"", 6), (None, 6)])
def test_a_base64_stream_is_complete_with_its_last_frame(last: bytes | None, size: int) -> None:
    voice = streaming(0, 1, 2)
    assert not voice.complete
    assert voice.size == 6
    voice.add_frame("BASE64", True, -1, last)
    assert voice.complete
    assert voice.size == size


@pytest.mark.parametrize(
    ("before", "flag", "seq", "detail"),
    [
        pytest.param((), True, 1, "expected stream_seq 0; got stream_seq 1", id="begins-with-1"),
        pytest.param((), True, -1, "expected stream_seq 0; got stream_seq -1", id="begins-last"),
        pytest.param((0,), True, 0, "expected stream_seq 1 or -1; got stream_seq 0", id="again"),
        pytest.param((0, 1), True, 3, "expected stream_seq 2 or -1; got stream_seq 3", id="gap"),
        pytest.param((0, 1), True, 0, "expected stream_seq 2 or -1; got stream_seq 0", id="anew"),
        pytest.param((0,), True, -2, "expected stream_seq 1 or -1; got stream_seq -2", id="minus"),
        pytest.param(
            (0,),
            False,
            1,
            "expected stream_seq 1 or -1; got stream_seq 1 with stream_flag false",
            id="flag-dropped",
        ),
        pytest.param(
            (0, -1),
            True,
            1,
            "expected nothing after the end of the voice; got stream_seq 1",
            id="after-the-end",
        ),
        pytest.param(
            (0, -1),
            True,
            -1,
            "expected nothing after the end of the voice; got stream_seq -1",
            id="ends-twice",
        ),
    ],
)
def test_base64_frames_out_of_order_are_refused(
    before: tuple[int, ...], flag: bool, seq: int, detail: str
) -> None:
    error = refused(streaming(*before), "BASE64", flag, seq)
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == detail


@pytest.mark.parametrize("flag", [False, True])
def test_nothing_follows_a_frame_that_was_all(flag: bool) -> None:
    voice = intake()
    voice.add_frame("BASE64", False, 0, b"ab")
    error = refused(voice, "BASE64", flag, 1)
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert "nothing after the end" in error.detail


def test_a_stream_goes_on_after_a_refused_frame() -> None:
    voice = streaming(0)
    refused(voice, "BASE64", True, 5)
    voice.add_frame("BASE64", True, 1, b"ab")
    voice.add_frame("BASE64", True, -1, None)
    assert voice.complete


@pytest.mark.parametrize(
    ("before", "flag", "seq"),
    [
        pytest.param((), False, -1, id="the-only"),
        pytest.param((), True, 0, id="first"),
        pytest.param((0,), True, 1, id="between"),
    ],
)
def test_a_base64_frame_without_voice_is_refused(
    before: tuple[int, ...], flag: bool, seq: int
) -> None:
    error = refused(streaming(*before), "BASE64", flag, seq, None)
    assert error.code is ErrorCode.MALFORMED_PAYLOAD
    assert "voice" in error.detail


def test_an_empty_voice_is_a_voice() -> None:
    voice = intake()
    voice.add_frame("BASE64", False, 0, b"")
    assert voice.complete


@pytest.mark.parametrize("flag", [False, True])
def test_binary_voice_comes_between_two_frames(flag: bool) -> None:
    voice = intake("BINARY")
    voice.add_frame("BINARY", flag, 0, None)
    voice.add_binary(b"abc")
    voice.add_binary(b"de")
    assert not voice.complete
    voice.add_frame("BINARY", flag, -1, None)
    assert voice.complete
    assert voice.size == 5


def test_binary_voice_may_be_nothing() -> None:
    voice = recording()
    voice.add_frame("BINARY", True, -1, None)
    assert (voice.complete, voice.size) == (True, 0)


@pytest.mark.parametrize("seq", [-1, 1])
def test_binary_voice_begins_with_0(seq: int) -> None:
    error = refused(intake("BINARY"), "BINARY", True, seq, None)
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == f"expected stream_seq 0; got stream_seq {seq}"


@pytest.mark.parametrize("seq", [0, 1, 2])
def test_no_frame_but_the_last_comes_amid_binary_voice(seq: int) -> None:
    voice = recording()
    voice.add_binary(b"ab")
    error = refused(voice, "BINARY", True, seq, None)
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == f"expected binary frames or stream_seq -1; got stream_seq {seq}"


def test_no_binary_frame_comes_before_the_first_frame() -> None:
    error = refused_binary(intake("BINARY"))
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == "expected stream_seq 0; got a binary frame"


def test_nothing_follows_the_end_of_binary_voice() -> None:
    voice = recording()
    voice.add_frame("BINARY", True, -1, None)
    for error in (refused_binary(voice), refused(voice, "BINARY", True, -1, None)):
        assert error.code is ErrorCode.STREAM_SEQ_ERROR
        assert "nothing after the end" in error.detail


def test_no_binary_frame_comes_in_base64_mode() -> None:
    error = refused_binary(streaming(0))
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == "expected voice in BASE64 mode; got a binary frame"


def test_the_mode_stays() -> None:
    error = refused(streaming(0), "BINARY", True, -1)
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == "expected a frame in BASE64 mode; got one in BINARY mode"
    error = refused(recording(), "BASE64", True, -1)
    assert error.code is ErrorCode.STREAM_SEQ_ERROR
    assert error.detail == "expected a frame in BINARY mode; got one in BASE64 mode"


def test_voice_in_the_frames_around_binary_voice_is_ignored() -> None:
    voice = intake("BINARY", max_bytes=1)
    voice.add_frame("BINARY", True, 0, b"ab")
    voice.add_frame("BINARY", True, -1, b"ab")
    assert voice.size == 0


def test_as_much_voice_as_the_limit_is_taken() -> None:
    voice = intake(max_bytes=4)
    voice.add_frame("BASE64", True, 0, b"ab")
    voice.add_frame("BASE64", True, -1, b"cd")
    assert (voice.complete, voice.size) == (True, 4)


@pytest.mark.parametrize("seq", [1, -1])
def test_base64_voice_over_the_limit_is_refused(seq: int) -> None:
    voice = intake(max_bytes=4)
    voice.add_frame("BASE64", True, 0, b"ab")
    error = refused(voice, "BASE64", True, seq, b"cde")
    assert error.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert error.detail == "5 bytes of voice; the limit is 4"


def test_one_frame_over_the_limit_is_refused() -> None:
    error = refused(intake(max_bytes=4), "BASE64", False, 0, b"abcde")
    assert error.code is ErrorCode.PAYLOAD_TOO_LARGE


def test_binary_voice_over_the_limit_is_refused() -> None:
    voice = intake("BINARY", max_bytes=4)
    voice.add_frame("BINARY", True, 0, None)
    voice.add_binary(b"abc")
    voice.add_binary(b"d")
    error = refused_binary(voice, b"e")
    assert error.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert error.detail == "5 bytes of voice; the limit is 4"


def test_the_order_is_judged_before_the_size() -> None:
    voice = intake(max_bytes=1)
    assert refused(voice, "BASE64", True, 1, b"abc").code is ErrorCode.STREAM_SEQ_ERROR


# The requests of one session ---------------------------------------------------------------------


def frame(
    request_id: str = "r1", seq: int = 0, mode: VoiceMode = "BASE64", flag: bool = True
) -> Request:
    voice = b"ab" if mode == "BASE64" else None
    return Request(request_id, "VOICE", RequestContent(None, mode, voice), flag, seq)


def opened(mode: VoiceMode = "BASE64") -> VoiceRequests:
    """One of which the first frame has come."""
    voices = VoiceRequests(100)
    voices.begin(frame(mode=mode))
    assert not voices.add_frame(frame(mode=mode))
    return voices


def test_nothing_is_open_or_ignored_at_first() -> None:
    voices = VoiceRequests(100)
    assert voices.open_id is None
    assert not (voices.ignores(frame()) or voices.ignores_binary or voices.is_dropped("r1"))


def test_a_request_is_open_from_its_first_frame_to_its_end() -> None:
    voices = opened()
    assert voices.open_id == "r1"
    assert not voices.ignores(frame(seq=1))
    assert voices.add_frame(frame(seq=-1))
    assert voices.open_id == "r1"
    voices.drop("r1")
    assert voices.open_id is None


def test_binary_frames_are_of_the_open_request() -> None:
    voices = opened("BINARY")
    voices.add_binary(b"a" * 100)
    with pytest.raises(VoiceError, match="101 bytes of voice; the limit is 100"):
        voices.add_binary(b"a")
    assert voices.add_frame(frame(seq=-1, mode="BINARY"))


def test_the_one_that_begins_is_open_in_place_of_the_one_before() -> None:
    voices = opened()
    voices.drop("r1")
    voices.begin(frame("r2"))
    assert not voices.add_frame(frame("r2"))
    assert voices.open_id == "r2"
    assert voices.ignores(frame("r1", 1))
    assert not voices.ignores(frame("r2", 1))


def test_another_one_may_be_dropped_while_one_is_open() -> None:
    voices = opened()
    voices.drop("r2")
    assert voices.open_id == "r1"
    assert voices.ignores(frame("r2", 1))
    assert not voices.add_frame(frame(seq=1))


@pytest.mark.parametrize("mode", ["BASE64", "BINARY"])
def test_the_rest_of_a_dropped_request_is_ignored_up_to_its_last_frame(mode: VoiceMode) -> None:
    voices = opened(mode)
    voices.drop("r1")
    for seq in (1, 7, -1):
        assert voices.ignores(frame(seq=seq, mode=mode))
        assert voices.ignores_binary
        assert voices.is_dropped("r1")
        voices.came(frame(seq=seq, mode=mode))
    assert not (voices.ignores(frame(seq=1, mode=mode)) or voices.ignores_binary)
    assert not voices.is_dropped("r1")


def test_a_frame_that_is_all_is_no_rest_and_ends_it() -> None:
    voices = opened()
    voices.drop("r1")
    assert not voices.ignores(frame(flag=False))
    assert voices.ignores(frame(mode="BINARY", flag=False))  # which it never is in this mode
    voices.came(frame(mode="BINARY", flag=False))
    assert voices.ignores_binary
    voices.came(frame(flag=False))
    assert not voices.ignores_binary


def test_the_last_hundred_that_were_dropped_are_ignored() -> None:
    voices = VoiceRequests(100)
    for number in range(MAX_DROPPED_VOICES + 1):
        voices.drop(f"r{number}")
    assert [voices.is_dropped(f"r{number}") for number in range(2)] == [False, True]

"""Voice requests, frame by frame: their order, their size, and what a client is told."""

from __future__ import annotations

import pytest

from actors.session.messages import (
    NotUnderstood,
    SessionMessage,
    SignOfLife,
    VoiceBegun,
    VoiceBroken,
    VoiceEnded,
)
from actors.words import ErrorCode
from gateway.wire.frames import Request, RequestContent, VoiceMode
from gateway.wire.voice import MAX_IGNORED_VOICES, VoiceError, VoiceFrames, VoiceIntake


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
    before = (voice.size, voice.is_complete)
    with pytest.raises(VoiceError) as caught:
        voice.add_frame(mode, flag, seq, data)
    assert (voice.size, voice.is_complete) == before
    return caught.value


def refused_binary(voice: VoiceIntake, data: bytes = b"ab") -> VoiceError:
    before = (voice.size, voice.is_complete)
    with pytest.raises(VoiceError) as caught:
        voice.add_binary(data)
    assert (voice.size, voice.is_complete) == before
    return caught.value


def test_a_new_intake_has_nothing() -> None:
    voice = intake("BINARY")
    assert (voice.request_id, voice.mode, voice.size, voice.is_complete) == (
        "r1",
        "BINARY",
        0,
        False,
    )


@pytest.mark.parametrize("seq", [-1, 0, 7])
def test_one_base64_frame_is_complete_whatever_its_seq(seq: int) -> None:
    voice = intake()
    voice.add_frame("BASE64", False, seq, b"abc")
    assert voice.is_complete
    assert voice.size == 3


@pytest.mark.parametrize(("last", "size"), [(b"xyz", 9), (b"", 6), (None, 6)])
def test_a_base64_stream_is_complete_with_its_last_frame(last: bytes | None, size: int) -> None:
    voice = streaming(0, 1, 2)
    assert not voice.is_complete
    assert voice.size == 6
    voice.add_frame("BASE64", True, -1, last)
    assert voice.is_complete
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
    assert voice.is_complete


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
    assert voice.is_complete


@pytest.mark.parametrize("flag", [False, True])
def test_binary_voice_comes_between_two_frames(flag: bool) -> None:
    voice = intake("BINARY")
    voice.add_frame("BINARY", flag, 0, None)
    voice.add_binary(b"abc")
    voice.add_binary(b"de")
    assert not voice.is_complete
    voice.add_frame("BINARY", flag, -1, None)
    assert voice.is_complete
    assert voice.size == 5


def test_binary_voice_may_be_nothing() -> None:
    voice = recording()
    voice.add_frame("BINARY", True, -1, None)
    assert (voice.is_complete, voice.size) == (True, 0)


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
    assert (voice.is_complete, voice.size) == (True, 4)


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


ALIVE: list[SessionMessage] = [SignOfLife()]


def opened(mode: VoiceMode = "BASE64") -> VoiceFrames:
    """Those of a client that has sent the first frame of a request."""
    voices = VoiceFrames(100)
    assert voices.take_frame(frame(mode=mode)) == [VoiceBegun("r1")]
    return voices


def broken(words: list[SessionMessage], request_id: str = "r1") -> VoiceBroken:
    """The one word there is."""
    (word,) = words
    assert isinstance(word, VoiceBroken)
    assert word.request_id == request_id
    return word


def test_the_frames_of_a_request_are_its_beginning_signs_of_life_and_its_end() -> None:
    voices = opened()
    assert voices.take_frame(frame(seq=1)) == ALIVE
    assert voices.take_frame(frame(seq=-1)) == [VoiceEnded("r1")]


def test_a_frame_that_is_all_is_beginning_and_end() -> None:
    voices = VoiceFrames(100)
    assert voices.take_frame(frame(flag=False)) == [VoiceBegun("r1"), VoiceEnded("r1")]
    # The session knows that the id was used.
    assert voices.take_frame(frame(flag=False)) == [VoiceBegun("r1"), VoiceEnded("r1")]


def test_what_changes_the_session_is_taken_from_the_first_frame() -> None:
    voices = VoiceFrames(100)
    content = RequestContent(voice_mode="BINARY")
    begun = Request("r1", "VOICE", content, True, 0, require_tts=True)
    (word,) = voices.take_frame(begun)
    assert isinstance(word, VoiceBegun)
    assert [update.require_tts for update in word.updates] == [True]


def test_binary_frames_are_of_the_newest_request() -> None:
    voices = opened("BINARY")
    assert voices.take_binary(b"a" * 100) == []
    assert broken(voices.take_binary(b"a")).detail == "101 bytes of voice; the limit is 100"
    assert voices.take_binary(b"the rest") == []
    assert voices.take_frame(frame(seq=-1, mode="BINARY")) == ALIVE


def test_a_binary_frame_outside_of_a_request_is_not_understood() -> None:
    detail = "a binary frame outside a VOICE request"
    refused = NotUnderstood(ErrorCode.MALFORMED_PAYLOAD, detail)
    voices = VoiceFrames(100)
    assert voices.take_binary(b"voice") == [refused]
    assert voices.take_frame(frame(mode="BINARY")) == [VoiceBegun("r1")]
    assert voices.take_frame(frame(seq=-1, mode="BINARY")) == [VoiceEnded("r1")]
    assert voices.take_binary(b"voice") == [refused]


def test_a_frame_out_of_order_breaks_a_request_and_its_rest_is_swallowed() -> None:
    voices = opened()
    *words, alive = voices.take_frame(frame(seq=7))
    assert [alive] == ALIVE
    assert broken(words).code is ErrorCode.STREAM_SEQ_ERROR
    assert voices.take_frame(frame(seq=2)) == ALIVE
    assert voices.take_frame(frame(seq=-1)) == ALIVE
    assert voices.take_frame(frame()) == [VoiceBegun("r1")]  # as if it was never seen


def test_of_two_that_have_begun_the_session_drops_one() -> None:
    for dropped, kept in (("r1", "r2"), ("r2", "r1")):
        voices = opened("BINARY")
        assert voices.take_frame(frame("r2", mode="BINARY")) == [VoiceBegun("r2")]
        voices.ignore(dropped)
        assert broken(voices.take_binary(b"a" * 101), kept)
        assert voices.take_frame(frame(dropped, -1, mode="BINARY")) == ALIVE


@pytest.mark.parametrize("mode", ["BASE64", "BINARY"])
def test_the_rest_of_an_ignored_request_is_swallowed_up_to_its_last_frame(mode: VoiceMode) -> None:
    voices = opened(mode)
    voices.ignore("r1")
    for seq in (1, 7, -1):
        assert voices.take_binary(b"voice") == []
        assert voices.take_fault("r1", ErrorCode.MALFORMED_PAYLOAD, "?") == []
        assert voices.take_frame(frame(seq=seq, mode=mode)) == ALIVE
    assert voices.take_binary(b"voice") != []
    assert voices.take_frame(frame(mode=mode)) == [VoiceBegun("r1")]


def test_a_frame_that_is_all_is_no_rest_and_ends_it() -> None:
    voices = opened()
    voices.ignore("r1")
    assert voices.take_frame(frame(mode="BINARY", flag=False)) == ALIVE  # never all in this mode
    assert voices.take_frame(frame(flag=False)) == [VoiceBegun("r1"), VoiceEnded("r1")]
    assert voices.take_binary(b"voice") != []


def test_what_is_complete_has_no_rest_to_ignore() -> None:
    voices = opened()
    voices.take_frame(frame(seq=-1))
    voices.ignore("r1")
    voices.ignore("r2")
    assert voices.take_binary(b"voice") != []


def test_a_frame_that_was_not_understood_breaks_its_request() -> None:
    voices = opened()
    word = broken(voices.take_fault("r1", ErrorCode.MALFORMED_PAYLOAD, "no"))
    assert (word.code, word.detail) == (ErrorCode.MALFORMED_PAYLOAD, "no")
    assert voices.take_fault("r2", ErrorCode.MALFORMED_PAYLOAD, "no") == [
        NotUnderstood(ErrorCode.MALFORMED_PAYLOAD, "no", "r2", is_voice=True)
    ]
    assert voices.take_frame(frame("r2", 1)) == ALIVE


def test_the_last_hundred_that_were_ignored_are_remembered() -> None:
    voices = VoiceFrames(100)
    for number in range(MAX_IGNORED_VOICES + 1):
        voices.take_frame(frame(f"r{number}"))
        voices.ignore(f"r{number}")
    assert voices.take_frame(frame("r1", 1)) == ALIVE
    assert voices.take_frame(frame("r0")) == [VoiceBegun("r0")]

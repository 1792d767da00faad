"""A machine that drives a real gateway at random, and a model that says what it may answer.

`Conversation` is the model: it is told what a client sends, is given every frame that comes back,
and raises a `Violation` at the first one that breaks a promise of the protocol. It knows no time:
where the gateway may be faster or slower than the client, it accepts both, and where what was sent
leaves no choice, it accepts one thing only. `GatewayMachine` makes the conversation up, with a
provider whose every step it releases.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.provider_process import ProviderProcess

CLOSE_GRACE_SECONDS = 0.2
"""How long a close may be on its way to the provider; see `GatewayMachine._check_closed`."""

BIG_PIECE = "\x01" * 60_000
"""Six bytes each on the wire: more than the kernel takes for a client that does not read, and yet
two of them fit into the history."""

SMALL_RECEIVE_BUFFER = 4096

MISSING: Any = object()
"""Stands for a field that is not there, where null is something else."""


class Promise(enum.Enum):
    """What the gateway promises: those of the protocol by number, and what follows from others."""

    ONE_END = "1: every accepted request gets exactly one terminal frame"
    NOTHING_AFTER = "2: no data of a request after the ack of its interrupt"
    ACK_AFTER_CLOSE = "3: every interrupt gets its ack, after the close, before terminal frames"
    EXACT_TEXT = "4: the frames in order are exactly the answer"
    ONE_POST = "5: a generation costs at most one POST"
    OLD_ENDS_FIRST = "6: a new request interrupts the older one first"
    GONE_IS_STOPPED = "7: when the connection is gone, everything is stopped"
    RIGHT_TARGET = "an interrupt stops what it names, and nothing else"
    HISTORY = "the model is told exactly what the client got"


class Violation(AssertionError):
    """A promise was broken.

    Args:
        promise: which one.
        what: how.
    """

    def __init__(self, promise: Promise, what: str) -> None:
        super().__init__(f"{promise.name} ({promise.value}): {what}")
        self.promise = promise


@dataclass(frozen=True)
class Profile:
    """What the session is set to; None leaves an entry as it is, where it is an update."""

    require_tts: bool | None = None
    system_prompt: dict[str, str] | None = None
    scene_context: dict[str, Any] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """As they are sent."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def updated(self, update: Profile) -> Profile:
        return Profile(**(vars(self) | update.fields))

    @property
    def system_message(self) -> list[dict[str, str]]:
        """What the model is told first: one message, or none."""
        prompt, scene = self.system_prompt or {}, self.scene_context or {}
        keywords = scene.get("keywords")
        parts = [
            prompt.get("role_description"),
            prompt.get("response_requirements"),
            scene.get("scene_description"),
            keywords and "Keywords: " + ", ".join(keywords),
        ]
        text = "\n\n".join(part for part in parts if part)
        return [{"role": "system", "content": text}] if text else []


class Finish(enum.Enum):
    """What a provider does at the end of what it has to say."""

    ANSWER = "a complete answer"
    CUT = "the connection ends in the middle"
    ERROR = "an error in place of the rest"
    REFUSAL = "a status 400 in place of an answer"


@dataclass(frozen=True)
class Plan:
    """What the provider will do with a request: parts that are released one by one.

    Args:
        parts: the text of each, and the steps that send it.
        fails: whether the request fails then.
    """

    parts: tuple[tuple[str, scripts.Script], ...] = ()
    fails: bool = False

    @classmethod
    def of(cls, pieces: list[str], finish: Finish) -> Plan:
        """Headers, each piece, and the end are parts of their own."""
        if finish is Finish.REFUSAL:
            return cls((("", scripts.http_error(400, "no")),), fails=True)
        ends = {
            Finish.ANSWER: scripts.ending(),
            Finish.CUT: [scripts.close()],
            Finish.ERROR: scripts.error_in_stream("overloaded")[2:],
        }
        texts = [(piece, [*scripts.tokens([piece]), scripts.mark("sent")]) for piece in pieces]
        parts = (("", scripts.opening()), *texts, ("", ends[finish]))
        return cls(parts, finish is not Finish.ANSWER)

    def script(self, name: str) -> scripts.Script:
        """The whole script; part n waits for the key `name/n`."""
        return [
            step
            for number, (_, steps) in enumerate(self.parts)
            for step in [scripts.wait(f"{name}/{number}"), *steps]
        ]

    def text(self, released: int) -> str:
        """The text of that many parts."""
        return "".join(text for text, _ in self.parts[:released])


@dataclass(frozen=True)
class Cause:
    """Something that was sent and stops a request, if it still runs."""

    reason: str
    acknowledged: bool
    """True for an INTERRUPT: its ack comes before the terminal frame."""


@dataclass(eq=False)
class Asked:
    """A REQUEST, and what came of it. `sent`, `begun` and `heard` tell the order of events."""

    request_id: str
    text: str
    """Of the user; empty where it only updates the session."""
    plan: Plan
    sent: int
    speaks: bool
    """True when the client waits for the end of speech."""
    interrupted_ahead: bool = False
    causes: list[Cause] = field(default_factory=list)
    """In the order in which they were sent."""
    heard: list[tuple[int, int]] = field(default_factory=list)
    """When the client said so, how many characters the user got."""
    released: int = 0
    begun: int | None = None
    """When the client first knew that the provider had it."""
    got: list[str] = field(default_factory=list)
    """The text of each data frame."""
    stopped: bool = False
    """True when an ack said so."""
    terminal: Received | None = None

    @property
    def answer(self) -> str:
        """What the client got of it."""
        return "".join(self.got)

    @property
    def is_generation(self) -> bool:
        return bool(self.plan.parts) and not self.interrupted_ahead

    @property
    def can_end(self) -> bool:
        """True when the provider may have ended it."""
        return self.released == len(self.plan.parts)

    @property
    def surely_live(self) -> bool:
        """True when nothing that was sent could have ended it."""
        return self.is_generation and not self.causes and not self.can_end

    @property
    def outcome(self) -> str:
        assert self.terminal is not None
        outcome: str = self.terminal.payload["outcome"]
        return outcome

    def turn(self, as_of: int) -> list[dict[str, str]]:
        """What the model is told of it, from what the client had said by then."""
        if not self.text:
            return []
        answer, outcome = self.answer, self.outcome
        heard = min((chars for at, chars in self.heard if at <= as_of), default=len(answer))
        if heard < len(answer):
            answer, outcome = answer[:heard], "INTERRUPTED"
        user = {"role": "user", "content": self.text}
        if outcome == "INTERRUPTED":
            said = f"{answer} [interrupted by the user]"
            if not answer:
                said = "[interrupted by the user before the answer began]"
        elif outcome == "COMPLETED":
            said = answer
        else:
            if not answer:
                return []
            said = f"{answer} [the answer broke off here]"
        return [user, {"role": "assistant", "content": said}] if said else [user]


@dataclass(eq=False)
class Interrupted:
    """An INTERRUPT that has no ack yet."""

    request_id: str | None
    """None for all."""
    known: Asked | None
    must_stop: set[Asked]
    may_stop: set[Asked]


class Conversation:
    """One session, as its client sees it.

    Args:
        profile: as registered.
    """

    def __init__(self, profile: Profile) -> None:
        self._ticks = itertools.count(1)
        self._profiles: list[tuple[int, Profile]] = [(0, profile)]
        self.asked: list[Asked] = []
        self._by_id: dict[str, Asked] = {}
        self._ahead: dict[str, str] = {}
        """Reasons of INTERRUPTs whose request was not sent yet."""
        self._owed_acks: dict[Any, list[Interrupted]] = {}
        self._owed_refusals: list[str] = []
        self._owed_health_checks = 0

    # What the client sends.

    def ask(self, request_id: str, text: str, plan: Plan, update: Profile) -> Asked:
        """A REQUEST with a new id."""
        tick = next(self._ticks)
        profile = self.profile.updated(update)
        self._profiles.append((tick, profile))
        asked = Asked(request_id, text, plan, tick, bool(profile.require_tts))
        ahead = self._ahead.pop(request_id, None)
        if ahead is not None:
            asked.interrupted_ahead = True
            asked.causes.append(Cause(ahead, acknowledged=False))
        elif text:
            for older in self.asked:
                older.causes.append(Cause("USER_NEW_INPUT", acknowledged=False))
        self.asked.append(asked)
        self._by_id[request_id] = asked
        return asked

    def ask_again(self, request_id: str) -> None:
        """A REQUEST with an id that was used."""
        self._owed_refusals.append(request_id)

    def interrupt(self, echo: Any, reason: str, heard: int | None = None) -> None:
        """An INTERRUPT.

        Args:
            echo: its `interrupt_request_id`, or MISSING.
            reason: why.
            heard: its `delivered_text_chars`; where all are meant, of what surely runs, and where
                nothing runs, of the last answer.
        """
        tick = next(self._ticks)
        request_id = None if echo is MISSING else echo or None
        known = self._by_id.get(request_id) if request_id is not None else None
        if request_id is not None and known is None:
            self._ahead[request_id] = reason
        targets = self.asked if request_id is None else [known] if known is not None else []
        unended = {one for one in targets if one.terminal is None and one.is_generation}
        pending = Interrupted(request_id, known, {o for o in unended if o.surely_live}, unended)
        self._owed_acks.setdefault(echo, []).append(pending)
        for one in targets:
            one.causes.append(Cause(reason, acknowledged=True))
        if heard is not None:
            if request_id is None:
                targets = list(pending.must_stop) if unended else self._last_turn()
            for one in targets:
                one.heard.append((tick, heard))

    def _last_turn(self) -> list[Asked]:
        """The latest of which the model is told, or none."""
        for one in reversed(self.asked):
            if one.text and (one.interrupted_ahead or one.turn(as_of=0)):
                return [one]
        return []

    def shut_down(self) -> None:
        """A SHUTDOWN."""
        for one in self.asked:
            one.causes.append(Cause("CLIENT_SHUTDOWN", acknowledged=False))

    def check_health(self) -> None:
        """A HEALTH_CHECK: its answer says that the session has taken up all before."""
        self._owed_health_checks += 1

    def release(self, asked: Asked, parts: int) -> range:
        """The provider is allowed to go on; returns the numbers of the parts."""
        before = asked.released
        asked.released = min(before + parts, len(asked.plan.parts))
        if asked.can_end:  # perhaps before an INTERRUPT that was sent is read
            for pending in itertools.chain.from_iterable(self._owed_acks.values()):
                pending.must_stop.discard(asked)
        return range(before, asked.released)

    def known_as_begun(self, asked: Asked) -> None:
        """The provider has it."""
        if asked.begun is None:
            asked.begun = next(self._ticks)

    @property
    def profile(self) -> Profile:
        """As the client has set it."""
        return self._profiles[-1][1]

    # What it is still owed.

    @property
    def owes_acks(self) -> bool:
        return any(self._owed_acks.values())

    @property
    def owes_health_check(self) -> bool:
        return self._owed_health_checks > 0

    @property
    def unended(self) -> list[Asked]:
        return [one for one in self.asked if one.terminal is None]

    def check_nothing_owed(self) -> None:
        """The connection has lived to its end."""
        if self._owed_refusals:
            raise Violation(Promise.ONE_END, f"no refusal of {self._owed_refusals}")

    # What it gets.

    def take(self, frame: Received) -> list[Asked]:
        """The next frame; returns what it says was stopped just now."""
        match frame.msg_type:
            case "RESPONSE":
                self._take_frame_of(self._known(frame), frame)
            case "ERROR" if "request_id" in frame.payload:
                self._take_frame_of(self._known(frame), frame)
            case "ERROR":
                self._take_refusal(frame)
            case "INTERRUPT_ACK":
                return self._take_ack(frame)
            case "HEALTH_CHECK_ACK":
                self._owed_health_checks -= 1
            case "REGISTER_ACK" | "HEARTBEAT" | "SHUTDOWN":
                pass
            case _:
                raise Violation(Promise.ONE_END, f"nobody asked for {frame}")
        return []

    def _known(self, frame: Received) -> Asked:
        asked = self._by_id.get(frame.payload["request_id"])
        if asked is None:
            raise Violation(Promise.ONE_END, f"a frame of a request never made: {frame}")
        return asked

    def _take_frame_of(self, asked: Asked, frame: Received) -> None:
        if asked.terminal is not None:
            promise = Promise.ONE_END if frame.is_terminal else Promise.NOTHING_AFTER
            raise Violation(promise, f"{frame} after {asked.terminal}")
        if asked.is_generation and not asked.got:
            self._check_older_have_ended(asked, frame)
        if frame.is_terminal:
            self._take_terminal(asked, frame)
        else:
            self._take_data(asked, frame)

    def _check_older_have_ended(self, asked: Asked, frame: Received) -> None:
        for older in self.asked[: self.asked.index(asked)]:
            if older.is_generation and older.terminal is None:
                raise Violation(Promise.OLD_ENDS_FIRST, f"{frame}; {older.request_id} has no end")

    def _take_data(self, asked: Asked, frame: Received) -> None:
        if asked.interrupted_ahead:
            raise Violation(Promise.RIGHT_TARGET, f"interrupted before it came: {str(frame)[:300]}")
        if asked.stopped:
            raise Violation(Promise.NOTHING_AFTER, f"{str(frame)[:300]} after its ack")
        if frame.payload["text_stream_seq"] != len(asked.got):
            raise Violation(Promise.EXACT_TEXT, f"{len(asked.got)} expected: {str(frame)[:300]}")
        asked.got.append(frame.text)
        if not frame.text or not asked.plan.text(asked.released).startswith(asked.answer):
            raise Violation(Promise.EXACT_TEXT, f"this was not said: {str(frame)[:300]}")
        self.known_as_begun(asked)

    def _take_terminal(self, asked: Asked, frame: Received) -> None:
        asked.terminal = frame
        payload = frame.payload
        if asked.outcome == "INTERRUPTED":
            self._check_interrupted(asked, frame)
        elif asked.interrupted_ahead:
            raise Violation(Promise.RIGHT_TARGET, f"it was interrupted before it came: {frame}")
        else:
            failed = frame.msg_type == "ERROR"
            if not asked.can_end or asked.plan.fails is not failed:
                raise Violation(Promise.ONE_END, f"not the end that its provider gave it: {frame}")
            if asked.outcome != ("FAILED" if failed else "COMPLETED"):
                raise Violation(Promise.ONE_END, f"wrong outcome: {frame}")
            if asked.answer != asked.plan.text(asked.released):
                raise Violation(Promise.EXACT_TEXT, f"some is missing: {asked.got} {frame}")
            if asked.is_generation:
                self.known_as_begun(asked)
        speech = -1 if asked.speaks else MISSING
        if frame.msg_type == "RESPONSE" and payload.get("voice_stream_seq", MISSING) != speech:
            raise Violation(Promise.ONE_END, f"the end of speech is wrong: {frame}")

    def _check_interrupted(self, asked: Asked, frame: Received) -> None:
        payload = frame.payload
        if not asked.causes:
            raise Violation(Promise.RIGHT_TARGET, f"nobody interrupted {asked.request_id}: {frame}")
        cause = asked.causes[0]
        if payload.get("interrupt_reason") != cause.reason:
            raise Violation(Promise.RIGHT_TARGET, f"it was {cause.reason}: {frame}")
        if payload.get("interrupted") is not True or payload["content"] != {}:
            raise Violation(Promise.ONE_END, f"not an interrupted end: {frame}")
        if cause.acknowledged and not asked.stopped:
            raise Violation(Promise.ACK_AFTER_CLOSE, f"no ack before {frame}")

    def _take_refusal(self, frame: Received) -> None:
        detail = frame.payload["error_detail"]
        is_owed = self._owed_refusals and repr(self._owed_refusals[0]) in detail
        if not is_owed or frame.payload["error_code"] != "MALFORMED_PAYLOAD":
            raise Violation(Promise.ONE_END, f"nothing was wrong: {frame}")
        self._owed_refusals.pop(0)

    def _take_ack(self, frame: Received) -> list[Asked]:
        payload = frame.payload
        owed = self._owed_acks.get(payload.get("interrupt_request_id", MISSING))
        if not owed:
            raise Violation(Promise.ACK_AFTER_CLOSE, f"an ack that nobody asked for: {frame}")
        pending = owed.pop(0)
        results = {result["request_id"]: result for result in payload["results"]}
        self._check_targets(pending, results, frame)
        stopped = [name for name, one in results.items() if one["outcome"] == "STOPPED"]
        status = "SUCCESS" if stopped and len(stopped) == len(results) else "PARTIAL"
        if payload["status"] != (status if stopped else "FAILED"):
            raise Violation(Promise.ACK_AFTER_CLOSE, f"wrong status: {frame}")
        if payload["interrupted_request_ids"] != stopped:
            raise Violation(Promise.RIGHT_TARGET, f"not what was stopped: {frame}")
        for request_id in stopped:
            self._by_id[request_id].stopped = True
        return [self._by_id[request_id] for request_id in stopped]

    def _check_targets(
        self, pending: Interrupted, results: dict[str, dict[str, Any]], frame: Received
    ) -> None:
        for one in pending.must_stop:
            if results.get(one.request_id, {}).get("outcome") != "STOPPED":
                raise Violation(Promise.RIGHT_TARGET, f"{one.request_id} was to stop: {frame}")
        if pending.request_id is not None and list(results) != [pending.request_id]:
            raise Violation(Promise.RIGHT_TARGET, f"{pending.request_id} was meant: {frame}")
        for request_id, result in results.items():
            asked, outcome = self._by_id.get(request_id), result["outcome"]
            if outcome == "TIMED_OUT":
                raise Violation(Promise.ACK_AFTER_CLOSE, f"a stream was not closed: {frame}")
            allowed = {"STOPPED"} if asked in pending.may_stop else set()
            if pending.known is not None:
                allowed.add("ALREADY_DONE")
            elif pending.request_id is not None:
                allowed.add("UNKNOWN")
            if outcome not in allowed:
                raise Violation(Promise.RIGHT_TARGET, f"{request_id}: not {allowed}: {frame}")
            if outcome != "UNKNOWN":
                assert asked is not None
                self._check_result(asked, result, frame)

    def _check_result(self, asked: Asked, result: dict[str, Any], frame: Received) -> None:
        # An ack for what is being stopped goes before its terminal frame, any other comes after.
        if (asked.terminal is None) is not (result["outcome"] == "STOPPED"):
            raise Violation(Promise.ACK_AFTER_CLOSE, f"{asked.terminal} and then {frame}")
        # All that was sent comes before the ack, so both must have counted the same.
        if result["delivered_text_chars"] != len(asked.answer):
            what = f"{len(asked.answer)} characters came before {frame}"
            raise Violation(Promise.NOTHING_AFTER, what)

    # What the model was told.

    def check_messages(self, asked: Asked, messages: object) -> None:
        """Check what a POST had as `messages`.

        What the client said after the request and before it knew that the provider had it may
        have come in time, or too late; the settings and the history may be looked at one after
        the other.
        """
        earlier = self.asked[: self.asked.index(asked)]
        if any(one.terminal is None for one in earlier):
            return  # the connection was gone before the client knew how they ended
        latest = float("inf") if asked.begun is None else asked.begun
        later = [at for one in earlier for at, _ in one.heard if asked.sent < at < latest]
        moments = [asked.sent, *sorted(set(later))]
        profiles = [one for at, one in self._profiles if asked.sent <= at < latest]
        user = [{"role": "user", "content": asked.text}]
        allowed = [
            [*profile.system_message, *(m for one in earlier for m in one.turn(moment)), *user]
            for profile in profiles
            for moment in moments
        ]
        if messages not in allowed:
            said = json.dumps(messages, ensure_ascii=False)
            wanted = json.dumps(allowed[0], ensure_ascii=False)
            raise Violation(Promise.HISTORY, f"of {asked.request_id}:\n{said}\nnot\n{wanted}")


# The machine -------------------------------------------------------------------------------------


class Stage:
    """What all examples share.

    Args:
        provider: whom the gateway asks.
        port: the gateway's.
        wait_seconds: how long any wait may take: it only bounds failure.
    """

    def __init__(self, provider: ProviderProcess, port: int, wait_seconds: float = 5.0) -> None:
        self.provider = provider
        self.port = port
        self.wait_seconds = wait_seconds
        self.examples = 0
        """How many were run."""
        self.violations: list[Violation] = []
        """What was found, and found again; the first one is the best witness."""
        self.texts: set[str] = set()
        """All that users said; the names of the scripts, too."""
        provider.counts()
        self._older_posts = len(provider.posts())

    def check_posts(self) -> None:
        """Nothing was POSTed twice, and nothing that nobody had asked."""
        self.provider.counts()
        posts = Counter(post.script for post in self.provider.posts()[self._older_posts :])
        wrong = [name for name, times in posts.items() if times > 1 or name not in self.texts]
        if wrong:
            raise Violation(Promise.ONE_POST, f"twice, or never asked for: {wrong}")

    def sessions(self) -> int:
        """How many sessions the gateway has."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
            found: int = json.load(answer)["sessions"]
        return found


PROMPTS = st.fixed_dictionaries(
    {},
    optional={
        "role_description": st.sampled_from(["", "You are a cat.", "你是一只猫。"]),
        "response_requirements": st.sampled_from(["Be brief.", "Meow 😀."]),
    },
)
SCENES = st.fixed_dictionaries(
    {},
    optional={
        "scene_description": st.sampled_from(["", "A roof at night."]),
        "keywords": st.sampled_from([[], ["moon"], ["moon", "fish"]]),
    },
)
PROFILES = st.builds(Profile, st.booleans(), st.none() | PROMPTS, st.none() | SCENES)
UPDATES = st.builds(Profile, st.none() | st.booleans(), st.none() | PROMPTS, st.none() | SCENES)
PLANS = st.tuples(st.integers(0, 3), st.sampled_from([*[Finish.ANSWER] * 4, *Finish]))
HEARD = st.sampled_from([None, 0, 1, 8, 13, 30, 10**6])
REASONS = st.sampled_from(["USER_STOP", "USER_NEW_INPUT", "USER_VOICE_INPUT", "CLIENT_ERROR"])
ANY = st.integers(0, 30)
"""Which of those that there are."""


class GatewayMachine(RuleBasedStateMachine):
    """One example: what one client does, in one session after another.

    What a rule may do depends on what was sent only, and not on how fast it was answered, so that
    an example can be played again.
    """

    stage: ClassVar[Stage]
    """Set in a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.stage.examples += 1
        self.provider = self.stage.provider
        self.seconds = self.stage.wait_seconds
        self.is_broken = False
        self.client: Client | None = None
        self.ids = (f"req_{number}" for number in itertools.count())
        self.ahead: list[str] = []
        """Ids that were interrupted before their request was sent."""
        self.done: list[str] = []
        """Everything that was done, in words."""

    # Sessions.

    @initialize(profile=PROFILES, is_slow=st.booleans(), is_patient=st.sampled_from([1, 1, 1, 0]))
    def begin(self, profile: Profile, is_slow: bool, is_patient: int) -> None:
        """Not every client waits for the end."""
        self.is_patient = bool(is_patient)
        self._open(profile, is_slow)

    def _open(self, profile: Profile, is_slow: bool = False) -> None:
        """Connect and register."""
        buffer = SMALL_RECEIVE_BUFFER if is_slow else None
        self.client = Client(
            self.stage.port, register=False, receive_buffer=buffer, timeout=self.seconds
        )
        self.client.register(**profile.fields)
        self.done.append(f"REGISTER {profile.fields}{' slow' * is_slow}")
        self.talk = Conversation(profile)
        self.taken = len(self.client.frames)
        self.ahead = []
        self.big = 0

    @rule(how=st.sampled_from(["close", "drop", "reset", "SHUTDOWN"]), profile=PROFILES)
    def leave(self, how: str, profile: Profile) -> None:
        """Go, whatever is going on, and come back as somebody else."""
        self._leave(how)
        self._open(profile)

    def teardown(self) -> None:
        """See everything to its end, unless the example has failed."""
        if self.client is None:
            return
        try:
            if not self.is_broken:
                if self.is_patient:
                    self._finish()
                self._leave("drop")
        finally:
            self.client.drop()

    def _finish(self) -> None:
        for asked in self.talk.unended:
            self._release(asked, len(asked.plan.parts))
        self._read_until(lambda: not self.talk.unended, Promise.ONE_END, "every request ends")
        self._read_acks()
        self.catch_up()  # time enough for a second end
        self.talk.check_nothing_owed()

    def _leave(self, how: str) -> None:
        client = self._client
        self.done.append(f"leave: {how}")
        match how:
            case "close":
                client.send_close()
                self._read_rest()
            case "drop":
                client.drop()
            case "reset":
                client.reset()
            case "SHUTDOWN":
                client.send("SHUTDOWN", {})
                self.talk.shut_down()
                self._read_rest()
                if self.talk.unended:
                    self._fail(Promise.ONE_END, f"no end of {self.talk.unended}")
        client.drop()
        with self._waiting(Promise.GONE_IS_STOPPED):
            wait_until(lambda: self.stage.sessions() == 0, "the session has ended", self.seconds)
        self._judge()

    def _judge(self) -> None:
        """The session is over: look at what its provider saw."""
        self.provider.counts()  # up to now
        for asked in self.talk.asked:
            if not asked.text:
                continue
            posts = self.provider.posts(asked.text)
            if len(posts) > (0 if asked.interrupted_ahead else 1):
                self._fail(Promise.ONE_POST, f"{len(posts)} POSTs for {asked}")
            for post in posts:
                with self._checking():
                    self.talk.check_messages(asked, post.body["messages"])
                if not asked.can_end:
                    with self._waiting(Promise.GONE_IS_STOPPED):
                        self.provider.wait_closed(post.conn, self.seconds)

    # Requests.

    @rule(
        plan=PLANS,
        update=st.none() | UPDATES,
        use_ahead=st.booleans(),
        parts=st.integers(0, 5),
        wait=st.booleans(),
    )
    def ask(
        self,
        plan: tuple[int, Finish],
        update: Profile | None,
        use_ahead: bool,
        parts: int,
        wait: bool,
    ) -> None:
        """A new request, whatever else is going on."""
        asked = self._ask(*plan, update, use_ahead)
        if asked.is_generation:
            self._go_on(asked, parts, wait)

    @precondition(lambda self: self.big < 2)
    @rule(update=st.none() | UPDATES)
    def fall_behind(self, update: Profile | None) -> None:
        """Ask for more than the kernel holds, and do not read it."""
        self.big += 1
        asked = self._ask(1, Finish.ANSWER, update, use_ahead=False, piece=BIG_PIECE)
        self._release(asked, 2)
        with self._waiting(Promise.ONE_POST):
            self.provider.wait_mark("sent", script=asked.text, timeout=self.seconds)
        self.talk.known_as_begun(asked)

    @rule(update=UPDATES, use_ahead=st.booleans(), wait=st.booleans())
    def update(self, update: Profile, use_ahead: bool, wait: bool) -> None:
        """A request without text changes the session, and touches nothing else."""
        asked = self._send_request(self._new_id(use_ahead), "", Plan(), update)
        if wait:
            self._read_end(asked)

    @precondition(lambda self: self.talk.asked)
    @rule(which=ANY)
    def ask_with_a_used_id(self, which: int) -> None:
        """It is refused, and the one that has the id does not notice."""
        request_id = self._pick(which).request_id
        self.talk.ask_again(request_id)
        self._client.request("again", request_id)
        self.done.append(f"REQUEST {request_id} again")

    # The provider.

    @precondition(lambda self: self._latest is not None)
    @rule(parts=st.integers(1, 3) | st.just(9), wait=st.booleans())
    def go_on(self, parts: int, wait: bool) -> None:
        """The provider says more; or would, if nobody had interrupted it."""
        asked = self._latest
        assert asked is not None
        self._go_on(asked, parts, wait and asked.surely_live)

    def _go_on(self, asked: Asked, parts: int, wait: bool) -> None:
        self._release(asked, parts)
        if not wait:
            return
        if asked.can_end:
            self._read_end(asked)
        elif said := asked.plan.text(asked.released):
            self._read_until(lambda: asked.answer == said, Promise.EXACT_TEXT, "the text comes")
        else:
            self._wait_post(asked)

    # Interrupts.

    @precondition(lambda self: self.talk.asked)
    @rule(
        which=ANY,
        heard=HEARD,
        reason=REASONS,
        times=st.integers(1, 2),
        then_ask=st.booleans(),
        wait=st.booleans(),
    )
    def interrupt(
        self, which: int, heard: int | None, reason: str, times: int, then_ask: bool, wait: bool
    ) -> None:
        """One request, running or not, once or twice, and perhaps a new request in one go."""
        request_id = self._pick(which).request_id
        with self._client.one_packet():
            for _ in range(times):
                self._interrupt(request_id, reason, heard)
            if then_ask:
                self._ask(2, Finish.ANSWER, None, use_ahead=False)
        if wait:
            self._read_acks()

    @precondition(lambda self: self._latest is not None)
    @rule(heard=HEARD, reason=REASONS, wait=st.booleans())
    def interrupt_latest(self, heard: int | None, reason: str, wait: bool) -> None:
        """What users do."""
        asked = self._latest
        assert asked is not None
        self._interrupt(asked.request_id, reason, heard)
        if wait:
            self._read_acks()

    @rule(
        echo=st.sampled_from([None, "", MISSING]), heard=HEARD, reason=REASONS, wait=st.booleans()
    )
    def interrupt_all(self, echo: Any, heard: int | None, reason: str, wait: bool) -> None:
        """Everything that runs."""
        # Whose answer `heard` is about can be told only where it is known what runs.
        sure = all(one.surely_live for one in self.talk.unended if one.is_generation)
        self._interrupt(echo, reason, heard if sure and wait else None)
        if wait:
            self._read_acks()

    @rule(reason=REASONS, again=st.booleans())
    def interrupt_ahead(self, reason: str, again: bool) -> None:
        """A request that was not made yet."""
        if not (again and self.ahead):
            self.ahead.append(next(self.ids))
        self._interrupt(self.ahead[-1], reason, None)

    @rule()
    def catch_up(self) -> None:
        """Read until the session has taken up all that was sent."""
        self.talk.check_health()
        self._client.send("HEALTH_CHECK", {})
        self.done.append("HEALTH_CHECK")
        self._read_until(
            lambda: not self.talk.owes_health_check, Promise.ONE_END, "the gateway answers"
        )

    # Sending.

    @property
    def _client(self) -> Client:
        assert self.client is not None
        return self.client

    @property
    def _latest(self) -> Asked | None:
        """The latest request of which the provider may have more to say."""
        return next(
            (one for one in reversed(self.talk.asked) if one.is_generation and not one.can_end),
            None,
        )

    def _pick(self, which: int) -> Asked:
        return self.talk.asked[-1 - which % len(self.talk.asked)]

    def _ask(
        self,
        pieces: int,
        finish: Finish,
        update: Profile | None,
        use_ahead: bool,
        piece: str | None = None,
    ) -> Asked:
        text = f"{self.provider.unique('say')} 你好 😀"
        plan = Plan.of([piece or f"{text}.{number} " for number in range(pieces)], finish)
        self.provider.script(text, plan.script(text))
        self.stage.texts.add(text)
        return self._send_request(self._new_id(use_ahead), text, plan, update or Profile())

    def _new_id(self, use_ahead: bool) -> str:
        return self.ahead.pop() if use_ahead and self.ahead else next(self.ids)

    def _send_request(self, request_id: str, text: str, plan: Plan, update: Profile) -> Asked:
        asked = self.talk.ask(request_id, text, plan, update)
        self.done.append(f"REQUEST {request_id} {text!r} {update.fields}")
        payload = {"request_id": request_id, "data_type": "TEXT", "content": {"text": text}}
        self._client.send("REQUEST", payload | {"update_session": update.fields})
        return asked

    def _interrupt(self, echo: Any, reason: str, heard: int | None) -> None:
        self.talk.interrupt(echo, reason, heard)
        payload = {"interrupt_request_id": echo, "reason": reason, "delivered_text_chars": heard}
        sent = {name: value for name, value in payload.items() if value is not MISSING}
        self._client.send("INTERRUPT", sent)
        self.done.append(f"INTERRUPT {sent}")

    def _release(self, asked: Asked, parts: int) -> None:
        for number in self.talk.release(asked, parts):
            self.provider.release(f"{asked.text}/{number}")
            self.done.append(f"the provider goes on with {asked.request_id}, part {number}")

    # Reading and checking.

    def _wait_post(self, asked: Asked) -> None:
        with self._waiting(Promise.ONE_POST):
            self.provider.wait_post(script=asked.text, timeout=self.seconds)
        self.talk.known_as_begun(asked)

    def _read_end(self, asked: Asked) -> None:
        self._read_until(lambda: asked.terminal is not None, Promise.ONE_END, "it ends")

    def _read_acks(self) -> None:
        self._read_until(
            lambda: not self.talk.owes_acks, Promise.ACK_AFTER_CLOSE, "every interrupt is answered"
        )

    def _read_until(self, done: Callable[[], bool], promise: Promise, what: str) -> None:
        while not done():
            if self.taken < len(self._client.frames):
                self.taken += 1
                self._take(self._client.frames[self.taken - 1])
                continue
            with self._waiting(promise):
                assert self._client.read_some(), f"the connection ended, waiting until {what}"

    def _read_rest(self) -> None:
        """Everything up to the end of the connection."""
        with self._waiting(Promise.GONE_IS_STOPPED):
            self._client.wait_closed()
        for frame in self._client.frames[self.taken :]:
            self._take(frame)

    def _take(self, frame: Received) -> None:
        self.done.append(f"    got {frame.msg_type} {str(frame.payload)[:200]}")
        with self._checking():
            for stopped in self.talk.take(frame):
                self._check_closed(stopped)

    def _check_closed(self, asked: Asked) -> None:
        """An ack says that this was stopped: its provider's stream is closed by now.

        Clocks of two processes would not tell: a provider that is kept from running notices late.
        So it is asked. On the loopback of one machine a close is with the peer's kernel when
        `close()` returns, which was before the ack was sent, hence before we ask; and the
        provider, which looks at all its sockets together, has journalled the close before it
        answers the second question. The grace is for a kernel that puts the delivery off.
        """
        if asked.can_end:
            return  # its connection may be kept for the next one
        deadline = time.monotonic() + CLOSE_GRACE_SECONDS
        self.provider.counts()
        self.provider.counts()
        while self.provider.open_connections(asked.text):
            if time.monotonic() > deadline:
                what = f"the stream of {asked.request_id} is open after its ack"
                raise Violation(Promise.ACK_AFTER_CLOSE, what)
            self.provider.counts()

    @contextlib.contextmanager
    def _checking(self) -> Iterator[None]:
        try:
            yield
        except Violation as violation:
            self._break(violation)

    @contextlib.contextmanager
    def _waiting(self, promise: Promise) -> Iterator[None]:
        """What does not come in time breaks this promise."""
        try:
            yield
        except AssertionError as error:
            self._fail(promise, str(error))

    def _fail(self, promise: Promise, what: str) -> NoReturn:
        self._break(Violation(promise, what))

    def _break(self, violation: Violation) -> NoReturn:
        self.is_broken = True
        # Hypothesis says this too, but only where it happens again: a race may not.
        violation.add_note("\n".join(["What was done:", *self.done]))
        self.stage.violations.append(violation)
        raise violation

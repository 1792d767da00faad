"""Host and Origin headers: what is read, what is not, and which requests are refused for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeaderValue
from websockets.http11 import Request

from gateway.ops.gate import OpsGate
from gateway.server.authority import Authority, Origin, read_authority, read_origin
from gateway.server.handshake import Gate

OURS = [
    "localhost",
    "LocalHost",
    "localhost:80",
    "localhost:65535",
    "127.0.0.1",
    "127.0.0.1:8000",
    "192.0.2.7:00080",
    "[::1]",
    "[::1]:8000",
    "[2001:DB8::7]:1",
    "[::ffff:127.0.0.1]",
    "voice.local",
    "chat.example.com",
    "CHAT.example.com:8443",
]
"""What a client of a gateway may say: see `GATE`."""

FOREIGN = [
    # A URL parser finds one of our hosts in these.
    "localhost#.evil.com",
    "localhost?x",
    "localhost?.evil.com",
    "localhost/x",
    "localhost/.evil.com",
    "localhost\\.evil.com",
    "evil@127.0.0.1",
    "evil.com@localhost",
    "evil.com:80@localhost:80",
    "@localhost",
    "//localhost",
    "http://localhost",
    "127.0.0.1\t",
    "\t127.0.0.1",
    "127.0.\t0.1",
    "local\thost",
    "localhost\n",
    "localhost\r",
    "localhost ",
    " localhost",
    "local host",
    "localhost\x00",
    "localhost\x0b",
    "localhost\xa0",
    "[::1]evil",
    "[::1]evil:80",
    "[::1].evil.com",
    "evil[::1]",
    "[evil][::1]",
    "[::1",
    "::1]",
    "[[::1]]",
    "[]",
    "[",
    "]",
    # No port.
    "localhost:",
    "localhost:0",
    "localhost:65536",
    "localhost:99999",
    "localhost:123456",
    "localhost:80:80",
    "localhost:-1",
    "localhost:+80",
    "localhost: 80",
    "localhost:80 ",
    "localhost:8o",
    "localhost:８０",
    "localhost:0x50",
    "localhost:1e3",
    "[::1]:",
    "[::1]:80:80",
    ":80",
    ":",
    "",
    # No address, though some programs take it for one.
    "0x7f.1",
    "0x7f000001",
    "127.1",
    "127.0.1",
    "2130706433",
    "0177.0.0.1",
    "127.0.0.01",
    "127.0.0.256",
    "127.0.0.1.",
    "127.0.0.1.evil.com",
    "127.0.0.1/8",
    "127.0.0.１",
    "１２７.0.0.1",
    "::1",
    "[127.0.0.1]",
    "[::1/128]",
    "[::1%25lo]",
    "[fe80::1%eth0]",
    "[v1.localhost]",
    "[::g]",
    "[1:2:3]",
    # Another name.
    "evil.com",
    "localhost.",
    "localhost.evil.com",
    "evil.localhost",
    "localhost,evil.com",
    "localhost,localhost",
    "localhost;",
    "local%68ost",
    "localhost%00",
    "localhost%",
    "loca\u212ahost",
    "lo\u0441alhost",
    "chat.example.com.evil.com",
    "evilchat.example.com",
    "*",
]

GATE = Gate("voice.local", ("https://chat.example.com/",))


def refusal(gate: Gate, *headers: tuple[str, str]) -> str | None:
    try:
        request = Request("/", Headers(headers))
    except InvalidHeaderValue:
        return repr(headers[-1][1])  # no gate meets it
    return gate.refusal(request)


# Reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "authority"),
    [
        ("LOCALHOST:8000", Authority("localhost", 8000, is_address=False)),
        ("a_b-c.~!$&'()*+,;=%7E", Authority("a_b-c.~!$&'()*+,;=%7e", None, is_address=False)),
        ("192.0.2.7", Authority("192.0.2.7", None, is_address=True)),
        ("[2001:DB8:0::1]:443", Authority("2001:db8::1", 443, is_address=True)),
        ("0x7f.1", Authority("0x7f.1", None, is_address=False)),
    ],
)
def test_an_authority_is_a_host_and_a_port(text: str, authority: Authority) -> None:
    assert read_authority(text) == authority


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Chat.Example.com", Origin("https", "chat.example.com", 443)),
        ("HTTP://localhost", Origin("http", "localhost", 80)),
        ("http://[::0001]:8000", Origin("http", "::1", 8000)),
        ("wss://a", Origin("wss", "a", 443)),
        ("capacitor://localhost", Origin("capacitor", "localhost", None)),
        ("chrome-extension://abcdef", Origin("chrome-extension", "abcdef", None)),
    ],
)
def test_an_origin_has_the_port_that_its_scheme_implies(text: str, origin: Origin) -> None:
    assert read_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "",
        "localhost",
        "://localhost",
        "http:/localhost",
        "http:localhost",
        "1http://localhost",
        "ht tp://localhost",
        "http://localhost/",
        "http://localhost http://localhost",
        "http://http://localhost",
        *(f"http://{host}" for host in FOREIGN if read_authority(host) is None),
    ],
)
def test_anything_else_is_no_origin(text: str) -> None:
    assert read_origin(text) is None


@given(st.text(max_size=30) | st.from_regex(r"\A[\[\]:./@#?%\t 0-9a-z]{0,20}\Z"))
def test_whatever_is_read_is_written_the_same_way(text: str) -> None:
    authority = read_authority(text)
    read_origin(text)  # must not raise
    if authority is not None:
        host = f"[{authority.host}]" if ":" in authority.host else authority.host
        again = host if authority.port is None else f"{host}:{authority.port}"
        assert read_authority(again) == authority
        assert text.isascii()
        assert text.strip() == text


# The public port ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", OURS)
def test_a_host_of_ours_is_served(host: str) -> None:
    assert refusal(GATE, ("Host", host)) is None
    assert refusal(GATE, ("Host", host), ("Origin", f"http://{host}")) is None


@pytest.mark.parametrize("host", FOREIGN)
def test_any_other_host_is_refused(host: str) -> None:
    said = refusal(GATE, ("Host", host))
    assert said is not None
    assert repr(host) in said
    said = refusal(GATE, ("Host", host), ("Origin", f"http://{host}"))
    assert said is not None


@pytest.mark.parametrize("host", FOREIGN)
def test_a_page_of_any_other_origin_is_refused(host: str) -> None:
    for scheme in ("http", "https", "ws"):
        said = refusal(GATE, ("Host", "localhost"), ("Origin", f"{scheme}://{host}"))
        assert said is not None
        assert repr(f"{scheme}://{host}") in said


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("localhost:8000", "HTTPS://LOCALHOST:8000"),
        ("localhost:8000", "ws://localhost:8000"),
        ("localhost", "http://localhost:80"),
        ("localhost:443", "https://localhost"),
        ("[::1]:8000", "http://[0:0:0:0:0:0:0:1]:8000"),
        ("localhost", "https://chat.example.com"),
        ("localhost", "https://chat.example.com:443"),
        ("127.0.0.1:1", "HTTPS://Chat.Example.Com"),
    ],
)
def test_our_own_pages_and_the_allowed_ones_are_served(host: str, origin: str) -> None:
    assert refusal(GATE, ("Host", host), ("Origin", origin)) is None


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost"),
        ("localhost:8000", "http://localhost:8001"),
        ("localhost", "http://localhost:8000"),
        ("localhost", "https://localhost:80"),
        ("localhost:8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "ftp://localhost:8000"),
        ("localhost:8000", "file://localhost:8000"),
        ("localhost", "capacitor://localhost"),
        ("localhost", "http://chat.example.com"),
        ("localhost", "https://chat.example.com:8443"),
        ("localhost", "wss://chat.example.com"),
    ],
)
def test_a_page_that_differs_in_scheme_host_or_port_is_refused(host: str, origin: str) -> None:
    assert refusal(GATE, ("Host", host), ("Origin", origin)) is not None


def test_an_allowed_origin_may_have_any_scheme_and_one_that_cannot_be_read_is_never_met() -> None:
    gate = Gate("::", ("capacitor://localhost", "https://[", "https://a:99999", "https://b?c"))
    assert refusal(gate, ("Host", "[::]"), ("Origin", "capacitor://localhost")) is None
    for origin in ("https://[", "https://a:99999", "https://a", "https://b", "https://b?c"):
        assert refusal(gate, ("Host", "[::]"), ("Origin", origin)) is not None
    for host in ("[", "a", "a:99999", "b"):
        assert refusal(gate, ("Host", host)) is not None


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Host", "localhost"), ("Host", "localhost")],
        [("Host", "localhost"), ("host", "evil.com")],
        [("Host", "localhost"), ("Origin", "http://localhost"), ("Origin", "http://localhost")],
    ],
)
def test_a_request_has_one_host_and_at_most_one_origin(headers: list[tuple[str, str]]) -> None:
    said = refusal(GATE, *headers)
    assert said == "a request must have one Host header, and at most one Origin header"


# The operator's port -----------------------------------------------------------------------------

LOOPBACK = [("127.0.0.1", "127.0.0.1"), ("localhost", "::1"), ("ops.local", "127.0.1.1")]
BEYOND = [("0.0.0.0", "0.0.0.0"), ("::", "::"), ("192.0.2.7", "192.0.2.7")]
NOT_LISTENED_TO = {"voice.local", "chat.example.com", "CHAT.example.com:8443"}


@pytest.mark.parametrize(("host", "bound"), LOOPBACK)
def test_on_loopback_the_operators_port_serves_localhost_addresses_and_its_own_name(
    host: str, bound: str
) -> None:
    gate = OpsGate(host, bound)
    for ours in (*OURS, host if ":" not in host else f"[{host}]"):
        assert (gate.refusal([ours], []) is None) is (ours not in NOT_LISTENED_TO), ours
    for foreign in FOREIGN:
        assert gate.refusal([foreign], []) is not None, foreign
    assert gate.refusal([], []) is None  # HTTP/1.0


@pytest.mark.parametrize(("host", "bound"), BEYOND)
def test_beyond_loopback_scrapers_may_use_any_name(host: str, bound: str) -> None:
    gate = OpsGate(host, bound)
    for name in ("bargein:9464", "pod-7.monitoring.svc", "192.0.2.7:9464"):
        assert gate.refusal([name], []) is None


@pytest.mark.parametrize(("host", "bound"), [*LOOPBACK, *BEYOND])
def test_the_operators_port_refuses_web_pages_of_other_origins(host: str, bound: str) -> None:
    gate = OpsGate(host, bound)
    assert gate.refusal(["localhost:9464"], ["http://localhost:9464"]) is None
    for origin in (
        "https://evil.com",
        "http://localhost:8000",
        "http://localhost",
        "null",
        "",
        "http://localhost:9464@evil.com",
        "http://localhost:9464.evil.com",
        "http://localhost:9464#",
    ):
        assert gate.refusal(["localhost:9464"], [origin]) is not None, origin
    assert gate.refusal([], ["http://localhost:9464"]) is not None
    assert gate.refusal(["localhost", "localhost"], []) is not None
    assert gate.refusal(["localhost"], ["http://localhost", "http://localhost"]) is not None

"""The settings of a provider: the forms of its URL, headers and fields, and what is secret."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest

from actors.loop.lanes import lanes
from llm.chat.client import ProviderClient
from llm.provider import (
    Provider,
    StopsOnClose,
    check_extra_body,
    check_headers,
    check_proxy,
    completions_url,
)

KEY = "sk-very-secret-0123456789"

# URLs -------------------------------------------------------------------------------------------

AZURE = "https://x.openai.azure.com/openai/deployments/d"

URLS = {
    # The base alone: a version is added.
    "https://api.example.com": "https://api.example.com/v1/chat/completions",
    "https://api.example.com/": "https://api.example.com/v1/chat/completions",
    "http://127.0.0.1:11434": "http://127.0.0.1:11434/v1/chat/completions",
    "http://host/openai": "http://host/openai/v1/chat/completions",
    # A version is there.
    "https://api.example.com/v1": "https://api.example.com/v1/chat/completions",
    "https://api.example.com/v1/": "https://api.example.com/v1/chat/completions",
    "https://api.example.com/v1///": "https://api.example.com/v1/chat/completions",
    "https://host/api/v3": "https://host/api/v3/chat/completions",
    "https://host/api/paas/v4/": "https://host/api/paas/v4/chat/completions",
    "https://host/v1beta/openai": "https://host/v1beta/openai/chat/completions",
    "https://host/v1beta/openai/": "https://host/v1beta/openai/chat/completions",
    "https://host/v10": "https://host/v10/chat/completions",
    # No version, though it looks like one.
    "https://host/vision": "https://host/vision/v1/chat/completions",
    "https://host/v": "https://host/v/v1/chat/completions",
    "https://v1.host": "https://v1.host/v1/chat/completions",
    "https://host/v2-apps": "https://host/v2-apps/v1/chat/completions",
    "https://host/rev2": "https://host/rev2/v1/chat/completions",
    "https://host?version=v1": "https://host/v1/chat/completions?version=v1",
    # The whole URL: kept as it is.
    "http://host/v1/chat/completions": "http://host/v1/chat/completions",
    "http://host/chat/completions": "http://host/chat/completions",
    "http://host/v1/chat/completions/": "http://host/v1/chat/completions",
    "http://host/chat/completions?a=b&c=d": "http://host/chat/completions?a=b&c=d",
    # Azure's.
    f"{AZURE}?api-version=2024-10-21": f"{AZURE}/chat/completions?api-version=2024-10-21",
    f"{AZURE}/?api-version=2024-10-21": f"{AZURE}/chat/completions?api-version=2024-10-21",
    f"{AZURE}/chat/completions?api-version=1": f"{AZURE}/chat/completions?api-version=1",
    AZURE: f"{AZURE}/chat/completions",
    "https://x.openai.azure.com/openai/v1/": (
        "https://x.openai.azure.com/openai/v1/chat/completions"
    ),
    # As people paste URLs.
    "HTTPS://Api.Example.com/v1": "https://Api.Example.com/v1/chat/completions",
    "HtTp://host/v1": "http://host/v1/chat/completions",
    "  http://host/v1 \t\n": "http://host/v1/chat/completions",
    "http://host/v1#reference": "http://host/v1/chat/completions",
    "http://host/v1?": "http://host/v1/chat/completions",
    "http://host:65535/v1": "http://host:65535/v1/chat/completions",
    "http://[::1]:8080": "http://[::1]:8080/v1/chat/completions",
    "http://[2001:db8::1]/v1": "http://[2001:db8::1]/v1/chat/completions",
    "http://localhost/V1": "http://localhost/V1/v1/chat/completions",
}


@pytest.mark.parametrize("base_url", URLS)
def test_every_form_of_a_url_becomes_the_url_to_post_to(base_url: str) -> None:
    assert completions_url(base_url) == URLS[base_url]


@pytest.mark.parametrize("base_url", URLS)
def test_the_url_to_post_to_is_one_that_is_taken_as_it_stands(base_url: str) -> None:
    url = completions_url(base_url)
    assert completions_url(url) == url


NO_SCHEME = "not a valid URL: it must start with http:// or https://"
NOT_URLS = {
    "": NO_SCHEME,
    " ": NO_SCHEME,
    "localhost:11434": NO_SCHEME,
    "api.example.com/v1": NO_SCHEME,
    "//api.example.com/v1": NO_SCHEME,
    "ftp://host/v1": NO_SCHEME,
    "ws://host/v1": NO_SCHEME,
    "file:///etc/passwd": NO_SCHEME,
    "http//host/v1": NO_SCHEME,
    "http://": "not the URL of a server",
    "https:///v1": "not the URL of a server",
    "http:/host/v1": "not the URL of a server",
    "http://:8080/v1": "not the URL of a server",
    "http://host:0/v1": "not the URL of a server",
    "http://host name/v1": "not the URL of a server",
    "http://host/v1 x": "not the URL of a server",
    "http://host/v1\u00a0x": "not the URL of a server",
    "http://ho\nst/v1": "not the URL of a server",
    "http://host:99999/v1": "Port out of range",
    "http://host:http/v1": "Port could not be cast",
    "http://host:-1/v1": "[Pp]ort",
    "http://[::1/v1": "Invalid IPv6 URL",
    "http://[nonsense]/v1": "not the URL of a server: ",
}


@pytest.mark.parametrize("base_url", NOT_URLS)
def test_a_url_that_is_not_of_a_server_is_refused_with_the_reason(base_url: str) -> None:
    with pytest.raises(ValueError, match=f"^is .*{NOT_URLS[base_url]}") as caught:
        completions_url(base_url)
    assert type(caught.value) is ValueError
    assert caught.value.__context__ is None or caught.value.__suppress_context__


# Headers and fields of the body -------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Team": "voice"},
        {"OpenAI-Organization": "org-1", "X-Title": "a b\tc ~!\"#$%&'()"},
        {"x-empty": ""},
        {"Authorization": "Basic dTpw"},
        {"!#$%&'*+.^_`|~09azAZ-": "x"},
    ],
)
def test_headers_that_can_be_sent_are_let_through(headers: dict[str, str]) -> None:
    check_headers(headers)


@pytest.mark.parametrize(
    "name", ["", " ", "X Team", "X-Team:", "X-Team ", "Ünï", "X\r\nY", "X\n", "(x)", "x,y", "x/y"]
)
def test_an_invalid_header_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid header name") as caught:
        check_headers({"X-Good": "1", name: KEY})
    assert repr(name) in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "Accept",
        "accept-encoding",
        "Cache-Control",
        "CONNECTION",
        "Content-Length",
        "Content-Type",
        "Transfer-Encoding",
    ],
)
def test_headers_that_the_gateway_sets_cannot_be_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} cannot be set"):
        check_headers({name: "x"})


@pytest.mark.parametrize(
    "value",
    [f"{KEY}\n", f"{KEY}\r\nX-More: 1", f"{KEY}\r", f"{KEY}\x00", f"{KEY}\x7f", f"{KEY}–", "你好"],
)
def test_a_value_that_a_header_cannot_carry_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(
        ValueError, match=r"^the value of X-Key contains characters that a header cannot carry$"
    ) as caught:
        check_headers({"X-Key": value})
    assert KEY not in str(caught.value)
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.2}, {"reasoning_effort": "low", "user": "x", "stop": ["a"]}]
)
def test_fields_that_are_the_callers_own_are_let_through(fields: dict[str, object]) -> None:
    check_extra_body(fields)


@pytest.mark.parametrize(
    "name", ["messages", "model", "n", "stream", "stream_options", "tools", "functions"]
)
def test_fields_that_the_gateway_sets_cannot_be_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"^'{name}' cannot be set"):
        check_extra_body({"temperature": 1, name: KEY})


# Proxies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://proxy:3128",
        "http://proxy",
        "https://proxy.example.com/",
        "http://user:pass%40word@proxy:3128",
        "HTTP://PROXY:3128",
        "http://[::1]:3128",
    ],
)
def test_the_url_of_an_http_proxy_is_let_through(url: str) -> None:
    check_proxy(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "proxy:3128",
        "user:hunter2-secret@proxy:3128",
        "socks5://user:hunter2-secret@proxy:1080",
        "http://user:hunter2-secret@",
        "http://user:hunter2-secret@:3128",
        "http://user:hunter2-secret@proxy:0",
        "http://user:hunter2-secret@proxy:99999",
        "http://user:hunter2-secret@proxy:x",
        "http://user:hunter2-secret@[::1",
        "http://",
    ],
)
def test_an_invalid_proxy_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of an HTTP proxy") as caught:
        check_proxy(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None or "secret" not in str(caught.value.__context__)


# Secrets ------------------------------------------------------------------------------------------


def provider(**fields: object) -> Provider:
    return Provider(**{"base_url": "http://host/v1", "model": "m", **fields})  # type: ignore[arg-type]


def test_without_anything_secret_there_are_no_secrets() -> None:
    assert provider().secrets == ()
    assert provider(api_key="", headers={"X-Debug": "1"}, proxy="http://proxy:1").secrets == ()


def test_the_key_is_secret_however_short() -> None:
    assert provider(api_key="k").secrets == ("k",)


def test_values_of_headers_are_secret_unless_they_are_short() -> None:
    headers = {"X-Key": "12345678", "X-Debug": "1234567", "Authorization": "Basic dXNlcjpwdw=="}
    secrets = set(provider(headers=headers).secrets)
    assert secrets == {"12345678", "Basic dXNlcjpwdw==", "dXNlcjpwdw=="}


def test_the_password_of_a_proxy_is_secret_as_it_stands_and_as_it_is_meant() -> None:
    secrets = provider(proxy="http://user:p%40ss@proxy:3128").secrets
    assert set(secrets) >= {"p%40ss", "p@ss"}
    assert "user" not in secrets


def test_what_the_query_holds_is_secret_but_for_azures_version() -> None:
    url = "https://api.example.com/v1?api-version=2024-10-21&key=key%2Fsecret&tier=low"
    assert set(provider(base_url=url).secrets) == {"key%2Fsecret", "key/secret"}


def test_the_longest_secret_comes_first_since_one_may_be_part_of_another() -> None:
    headers = {"X-A": f"prefix-{KEY}-suffix", "X-B": "87654321"}
    secrets = provider(api_key=KEY, headers=headers, proxy="http://u:pw@p").secrets
    assert list(secrets) == sorted(secrets, key=len, reverse=True)
    assert secrets[0] == f"prefix-{KEY}-suffix"
    assert {KEY, "pw", "87654321"} <= set(secrets)


def test_a_provider_does_not_show_what_is_secret() -> None:
    headers = {"X-Key": "header-secret"}
    one = provider(api_key=KEY, headers=headers, proxy="http://u:proxy-secret@p:1")
    assert not re.search("secret", repr(one))


# The rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "name"),
    [
        ("http://127.0.0.1:8100/v1", "127.0.0.1:8100"),
        ("https://api.example.com/v1?api-version=1", "api.example.com"),
        (" https://api.example.com ", "api.example.com"),
        ("http://[::1]:80/v1", "[::1]:80"),
    ],
)
def test_a_log_calls_it_by_its_host_and_port(base_url: str, name: str) -> None:
    assert provider(base_url=base_url).name == name


def test_the_defaults_are_those_of_the_operating_contract() -> None:
    one = provider()
    limits = (one.connect_timeout, one.first_token_timeout, one.idle_timeout)
    assert limits == (5.0, 60.0, 60.0)
    assert (one.retries, one.retry_after_cap) == (2, 10.0)
    assert one.include_usage
    assert one.stops_on_close is StopsOnClose.UNKNOWN


def test_it_cannot_be_changed_once_it_is_made() -> None:
    with pytest.raises(FrozenInstanceError):
        provider().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX: y", f"{KEY}–"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="Authorization") as refused:
        ProviderClient(provider(api_key=key), lanes())
    assert KEY not in str(refused.value)


def test_a_url_with_credentials_is_refused() -> None:
    with pytest.raises(ValueError, match="credentials"):
        completions_url("http://user:password@host/v1")

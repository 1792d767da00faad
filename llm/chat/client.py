"""One provider, ready to be asked: its connections, its headers, and what was learnt of it."""

from __future__ import annotations

from collections.abc import Callable

from llm.chat.completions import Prompt, encode_body
from llm.http.answer import Answer
from llm.http.connections import Connections
from llm.provider import Provider, check_header_values, completions_url

_QUOTED_CHARS = 500


class ProviderClient:
    """What all generations of one provider share.

    Raises:
        ValueError: its URL is none, or its key or a header cannot be sent.
        OSError: its certificates cannot be read.
    """

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.name = provider.name
        self.url = completions_url(provider.base_url)
        self._secrets = provider.secrets
        self._connections = Connections(
            self.url,
            provider.proxy,
            provider.ca_file,
            provider.connect_timeout,
            provider.pool_size,
        )
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "User-Agent": "bargein",
            "Cache-Control": "no-cache",
            # Compression on the way would hold events back until a block is full.
            "Accept-Encoding": "identity",
        }
        if provider.api_key and provider.key_header:
            self._headers[provider.key_header] = provider.api_key
        elif provider.api_key:
            self._headers["Authorization"] = f"Bearer {provider.api_key}"
        ours = {name.lower() for name in provider.headers}
        self._headers = {
            name: value for name, value in self._headers.items() if name.lower() not in ours
        } | dict(provider.headers)
        check_header_values(self._headers)
        self.asks_for_usage = provider.include_usage
        """Whether requests ask for the usage: some servers do not know of that."""

    def post(self, prompt: Prompt, on_sent: Callable[[], None], *, include_usage: bool) -> Answer:
        """POST once, and return when the headers of the answer are there.

        Args:
            prompt: what it is asked.
            include_usage: whether it is asked for the usage, too.
            on_sent: called when all of it was handed to the kernel.

        Raises:
            urllib3.exceptions.HTTPError: it did not get that far.
        """
        body = encode_body(
            self.provider.model,
            prompt,
            include_usage=include_usage,
            extra=self.provider.extra_body,
        )
        return self._connections.post(body, self._headers, on_sent)

    def quote(self, text: str) -> str:
        """What a provider said, within a bound and with our secrets redacted: some echo them."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.strip()[:_QUOTED_CHARS]

    def retire(self) -> None:
        """Close the idle connections, and keep none from now on: only those who have begun with
        this client still use it."""
        self._connections.retire()

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

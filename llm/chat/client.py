"""One provider, ready for requests: its connections, its headers, its secrets."""

from __future__ import annotations

from collections.abc import Callable

from llm.chat.completions import Prompt, encode_body
from llm.http.answer import Answer
from llm.http.connections import Connections
from llm.loop import Loop
from llm.provider import Provider, check_header_values, completions_url

_QUOTED_CHARS = 500


class ProviderClient:
    """What all generations of one provider share.

    Args:
        provider: its settings.
        loop: schedules everything that waits for its connections.

    Raises:
        ValueError: its URL is not valid, or its key or a header cannot be sent.
        OSError: its certificates cannot be read.
    """

    def __init__(self, provider: Provider, loop: Loop) -> None:
        self.provider = provider
        self.loop = loop
        self.name = provider.name
        self.url = completions_url(provider.base_url)
        self._secrets = provider.secrets
        self._connections = Connections(
            self.url,
            provider.proxy,
            provider.ca_file,
            provider.connect_timeout,
            provider.pool_size,
            loop,
        )
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "User-Agent": "bargein",
            "Cache-Control": "no-cache",
            # Compression would hold events back until a block is full.
            "Accept-Encoding": "identity",
        }
        if provider.api_key and provider.key_header:
            self._headers[provider.key_header] = provider.api_key
        elif provider.api_key:
            self._headers["Authorization"] = f"Bearer {provider.api_key}"
        configured = {name.lower() for name in provider.headers}
        self._headers = {
            name: value for name, value in self._headers.items() if name.lower() not in configured
        } | dict(provider.headers)
        check_header_values(self._headers)
        self.asks_for_usage = provider.include_usage
        """Whether requests ask for the usage. Some servers reject that (`stream_options`)."""

    def post(
        self,
        prompt: Prompt,
        on_sent: Callable[[], None],
        *,
        include_usage: bool,
        on_new_connection: bool = False,
    ) -> Answer:
        """POST once, and return when the headers of the answer have arrived.

        Args:
            prompt: what to ask.
            on_sent: called when the kernel has taken the whole request.
            include_usage: whether to ask for the usage, too.
            on_new_connection: whether not to use a kept connection.

        Raises:
            urllib3.exceptions.HTTPError: the connection failed before that; `KeptConnectionEnded`
                if it was a kept one, and not a byte of an answer came.
        """
        body = encode_body(
            self.provider.model,
            prompt,
            include_usage=include_usage,
            extra=self.provider.extra_body,
        )
        return self._connections.post(
            body, self._headers, on_sent, on_new_connection=on_new_connection
        )

    def quote(self, text: str) -> str:
        """Quote what a provider said: at most 500 characters, with the secrets redacted that were
        sent to it (some providers repeat them)."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.strip()[:_QUOTED_CHARS]

    def retire(self) -> None:
        """Close the idle connections, and keep none from now on. Generations that have started with
        this client can go on using it."""
        self._connections.retire()

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

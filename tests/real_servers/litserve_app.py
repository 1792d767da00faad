# mypy: disable-error-code="import-not-found, misc"
"""A LitServe application with OpenAI's API: python litserve_app.py PORT RECORD WORDS.

Runs in LitServe's own environment. Every word, before it is given to LitServe, and how the
generator ended, is a line of the file RECORD.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litserve

SECONDS_PER_WORD = 0.05


class Story(litserve.LitAPI):
    """Tells so many words, or what the question asks for."""

    def setup(self, device: str) -> None:
        """Once in the process that generates."""
        self._record = Path(sys.argv[2])
        self._words = int(sys.argv[3])

    def predict(self, request: Any) -> Iterator[str | dict[str, Any]]:
        """One answer, word by word."""
        question = request.messages[-1].content
        self._note(f"begin {question}")
        ending = "closed"
        try:
            yield from self._answer(question)
            ending = "end"
        finally:
            self._note(ending)

    def _answer(self, question: str) -> Iterator[str | dict[str, Any]]:
        match question:
            case "hello":
                for word in ("Hello", " there"):
                    yield word
                    time.sleep(SECONDS_PER_WORD)
                yield {"content": "!", "prompt_tokens": 1, "completion_tokens": 3}
            case "where?":
                call = {"name": "open_map", "arguments": '{"hall": 3}'}
                yield {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
            case "break":
                yield "Hello"
                raise RuntimeError("the model broke")
            case _:
                for number in range(self._words):
                    time.sleep(SECONDS_PER_WORD)
                    self._note(f"word {number}")
                    yield f"word{number} "

    def _note(self, line: str) -> None:
        with self._record.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    server = litserve.LitServer(Story(spec=litserve.OpenAISpec()), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)

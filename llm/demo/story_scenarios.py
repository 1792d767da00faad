"""The scenarios that are good answers: stories in several forms. No I/O and no clock."""

from collections.abc import Iterator
from dataclasses import replace

from llm.demo.answers import (
    finish_with_done,
    limited,
    start,
    stream_text,
    stream_tokens,
    whole_completion,
    whole_text,
)
from llm.demo.steps import Completion, Step
from llm.demo.stories import answer, short_answer, stop_answer, story_for, tokens


def story(completion: Completion) -> Iterator[Step]:
    """The well-behaved provider: role, one event per token, finish reason, usage, `[DONE]`."""
    return stream_text(completion, answer(completion.request.user_text))


def whole_story(completion: Completion) -> Iterator[Step]:
    """For `stream: false`: a short text, since it comes at once."""
    return whole_text(completion, short_answer(completion.request.user_text))


def any_story(completion: Completion) -> Iterator[Step]:
    """`story` or `whole_story`, as the request asks."""
    return (story if completion.request.stream else whole_story)(completion)


def first_tokens(completion: Completion, number: int) -> Iterator[Step]:
    """The first tokens of the story, for a scenario that ends it early."""
    text_tokens, _ = limited(completion.request, tokens(answer(completion.request.user_text)))
    yield from start(completion)
    yield from stream_tokens(completion, text_tokens[:number])


def story_at_pace(completion: Completion) -> Iterator[Step]:
    """The story at the pace of the parameter (tokens per second), where there is one."""
    return story(_at_pace(completion))


def story_in_language(text: str, completion: Completion) -> Iterator[Step]:
    """The story `text`, at the pace of the parameter (tokens per second), where there is one."""
    said = stop_answer(completion.request.user_text) or text
    return stream_text(_at_pace(completion), said)


def _at_pace(completion: Completion) -> Completion:
    if completion.parameter is None:
        return completion
    return replace(completion, seconds_per_token=1 / completion.parameter)


def long_story(completion: Completion) -> Iterator[Step]:
    """The story, repeated this many times."""
    user_text = completion.request.user_text
    repeated = tokens(f"\n\n{story_for(user_text)}") * (completion.count - 1)
    if stop_answer(user_text):
        repeated = []
    all_tokens = tokens(answer(user_text)) + repeated
    text_tokens, finish_reason = limited(completion.request, all_tokens)
    yield from start(completion)
    yield from stream_tokens(completion, text_tokens)
    yield from finish_with_done(completion, finish_reason, len(text_tokens))


def echo(completion: Completion) -> Iterator[Step]:
    """The last user message."""
    return stream_text(completion, completion.request.user_text)


def whole_echo(completion: Completion) -> Iterator[Step]:
    """The last user message, for `stream: false`."""
    return whole_text(completion, completion.request.user_text)


def fast(completion: Completion) -> Iterator[Step]:
    """The story without pauses."""
    return story(replace(completion, seconds_per_token=0))


def slow(completion: Completion) -> Iterator[Step]:
    """The story with a pause of this many seconds before each token."""
    return story(replace(completion, seconds_per_token=completion.parameter or 0))


_REASONING = tokens(
    "The user would like a story. I know two, one for each language that I speak. Which language is"
    " it? I have to look at the last message. Good, now I know. Not too long an opening, then."
)


def reasoning(completion: Completion) -> Iterator[Step]:
    """Reasoning as DeepSeek and vLLM stream it: deltas of `reasoning_content`, then the text."""
    text = answer(completion.request.user_text)
    text_tokens, finish_reason = limited(completion.request, tokens(text))
    yield from start(completion)
    yield from stream_tokens(completion, _REASONING, "reasoning_content")
    yield from stream_tokens(completion, text_tokens)
    yield from finish_with_done(completion, finish_reason, len(_REASONING) + len(text_tokens))


def whole_reasoning(completion: Completion) -> Iterator[Step]:
    """Reasoning and a short text, for `stream: false`."""
    text = short_answer(completion.request.user_text)
    text_tokens, finish_reason = limited(completion.request, tokens(text))
    message = {"content": "".join(text_tokens), "reasoning_content": "".join(_REASONING)}
    return whole_completion(completion, message, finish_reason, len(_REASONING) + len(text_tokens))


def no_usage(completion: Completion) -> Iterator[Step]:
    """The story without usage, even if it was asked for."""
    request = replace(completion.request, include_usage=False)
    return story(replace(completion, request=request))


def empty(completion: Completion) -> Iterator[Step]:
    """An answer without text."""
    return stream_text(completion, "")


def whole_empty(completion: Completion) -> Iterator[Step]:
    """An answer without text, for `stream: false`."""
    return whole_text(completion, "")


def content_filter(completion: Completion) -> Iterator[Step]:
    """This many tokens, then `finish_reason: content_filter`."""
    yield from first_tokens(completion, completion.count)
    yield from finish_with_done(completion, "content_filter", completion.count)

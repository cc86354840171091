"""litellm as a client, by the providers that its users choose for vLLM. Runs in litellm's environment: URL MODEL."""

from __future__ import annotations

import asyncio
import sys

import litellm

PROMPT = "The code of amber is 4711. The code of cedar is 0952. What is the code of amber?"
MESSAGES = [{"role": "user", "content": PROMPT}]


def main(url: str, model: str) -> None:
    server = {"api_base": f"{url}/v1", "api_key": "EMPTY"}
    chat = {"model": f"hosted_vllm/{model}", "messages": MESSAGES, "temperature": 0, "max_tokens": 16, **server}
    text = {"model": f"text-completion-openai/{model}", "prompt": PROMPT, "temperature": 0, "max_tokens": 16, **server}

    whole = litellm.completion(**chat)
    assert "4711" in whole.choices[0].message.content, whole
    assert whole.choices[0].finish_reason == "stop", whole
    assert whole.usage.completion_tokens > 0, whole

    chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content, chunks
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens, chunks[-1]

    with_logprobs = litellm.completion(**chat, logprobs=True, top_logprobs=2)
    assert len(with_logprobs.choices[0].logprobs.content) == whole.usage.completion_tokens, with_logprobs

    completed = litellm.text_completion(**text, logprobs=2)
    assert "4711" in completed.choices[0].text, completed
    pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, stream=True)]
    assert "".join(pieces) == completed.choices[0].text, pieces

    answers = asyncio.run(_several(chat))
    assert all("4711" in answer.choices[0].message.content for answer in answers), answers

    try:
        litellm.completion(**chat | {"messages": [{"role": "user", "content": "word " * 9000}], "max_tokens": None})
    except litellm.ContextWindowExceededError:
        pass  # what its users catch to fall back to another model
    else:
        raise AssertionError("a prompt that is too long was answered")
    print(f"chat and text, whole and streamed, {len(answers)} at once, logprobs, context window error")


async def _several(chat: dict[str, object]) -> list[object]:
    return list(await asyncio.gather(*(litellm.acompletion(**chat) for _ in range(8))))


if __name__ == "__main__":
    main(*sys.argv[1:])

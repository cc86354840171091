"""langchain-openai as a client. Runs in its own environment: URL MODEL."""

from __future__ import annotations

import asyncio
import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

FACTS = "The code of amber is 4711. The code of cedar is 0952. "
QUESTION = FACTS + "What is the code of {name}?"


def main(url: str, model: str) -> None:
    options = {"model": model, "base_url": f"{url}/v1", "api_key": "EMPTY", "temperature": 0, "max_tokens": 16}
    chat = ChatOpenAI(**options, stream_usage=True)
    chain = ChatPromptTemplate.from_messages([("human", QUESTION)]) | chat

    whole = chain.invoke({"name": "amber"})
    assert "4711" in whole.text, whole
    assert whole.response_metadata["finish_reason"] == "stop", whole
    assert whole.usage_metadata["output_tokens"] > 0, whole

    streamed = None
    for chunk in chain.stream({"name": "amber"}):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.text == whole.text, streamed
    assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"], streamed

    batch = chain.batch([{"name": "amber"}, {"name": "cedar"}])
    assert [code in answer.text for code, answer in zip(("4711", "0952"), batch, strict=True)] == [True, True], batch
    assert asyncio.run(_astream(chain)) == whole.text

    with_logprobs = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION.format(name="amber"))
    assert with_logprobs.response_metadata["logprobs"]["content"], with_logprobs

    text = OpenAI(**options)
    completed = text.invoke(QUESTION.format(name="cedar"))
    assert "0952" in completed, completed
    assert "".join(text.stream(QUESTION.format(name="cedar"))) == completed
    print("chat and text, whole and streamed, batch, asynchronous, usage, logprobs")


async def _astream(chain: object) -> str:
    return "".join([chunk.text async for chunk in chain.astream({"name": "amber"})])


if __name__ == "__main__":
    main(*sys.argv[1:])

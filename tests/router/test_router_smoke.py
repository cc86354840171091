import openai


def test_streaming_completion_through_the_sdk(router, worker):
    client = openai.OpenAI(base_url=f"{router.base_url}/v1", api_key="none")
    chunks = list(client.completions.create(model="tiny", prompt="the quick", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) != ""
    assert chunks[-1].choices[0].finish_reason == "length"
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 4

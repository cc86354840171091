"""Short text is rendered and tokenized at once; long text, or a template that does much, has its turn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import httpx
import pytest

from services.router.config import RouterConfig
from services.router.text import SHORT_CHARS, TemplateBudgetSpent, at_once, chat_template
from services.router.text.chat_template import ChatTemplate
from tests.router.harness import running_router, until

TEXT = ("/v1/completions", {"prompt": "Hello world!", "max_tokens": 1})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello world!"}], "max_tokens": 1})
LONG = {
    "many characters": (TEXT[0], {**TEXT[1], "prompt": "x" * (SHORT_CHARS + 1)}),
    "many texts": (TEXT[0], {**TEXT[1], "prompt": ["x"] * 33}),
    "many messages": (CHAT[0], {**CHAT[1], "messages": CHAT[1]["messages"] * 33}),
    "a long message": (CHAT[0], {**CHAT[1], "messages": [{"role": "user", "content": "x" * SHORT_CHARS}]}),
    "content in parts": (
        CHAT[0],
        {**CHAT[1], "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ),
    "variables": (CHAT[0], {**CHAT[1], "chat_template_kwargs": {"numbers": [1, 2]}}),
}


@contextlib.asynccontextmanager
async def busy_pool(make_worker):
    """A router whose one thread is busy until the event is set, and a client."""
    is_free = threading.Event()
    config = RouterConfig(tokenizer_pool_size=1)
    async with (
        running_router(config, make_worker(max_model_len=8192)) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        busy = asyncio.create_task(running.parts.pool.run(lambda go_on: is_free.wait(60)))
        try:
            await until(lambda: running.parts.pool.num_running == 1)
            yield running, http, is_free
        finally:
            is_free.set()
            assert await busy


@pytest.mark.parametrize(("url", "body"), [TEXT, CHAT])
async def test_short_text_waits_for_no_thread(make_worker, url, body):
    async with busy_pool(make_worker) as (_, http, is_free):
        assert (await http.post(url, json=body)).status_code == 200
        assert not is_free.is_set()


@pytest.mark.parametrize(("url", "body"), LONG.values(), ids=LONG)
async def test_long_text_has_its_turn_in_a_thread(make_worker, url, body):
    async with busy_pool(make_worker) as (running, http, is_free):
        asking = asyncio.create_task(http.post(url, json=body))
        await until(lambda: running.parts.pool.num_waiting == 1)
        is_free.set()
        assert (await asking).status_code == 200


async def test_a_template_that_does_much_with_short_text_goes_on_in_a_thread(make_worker, monkeypatch):
    async with busy_pool(make_worker) as (running, http, is_free):
        (url, body), short = CHAT, await http.post(*CHAT[:1], json=CHAT[1])
        monkeypatch.setattr(chat_template, "_SHORT_WORK", 3)
        asking = asyncio.create_task(http.post(url, json=body))
        await until(lambda: running.parts.pool.num_waiting == 1)
        is_free.set()
        assert (await asking).json()["usage"] == short.json()["usage"]


def test_a_short_rendering_has_a_small_budget():
    template = ChatTemplate("{% for a in range(70000) %}{{ messages[0].content }}{% endfor %}", {})
    with pytest.raises(TemplateBudgetSpent):
        template.render([{"role": "user", "content": "x"}], is_short=True)


def test_a_panic_of_work_done_at_once_is_an_error_like_any_other():
    class Panic(BaseException):
        """As the tokenizers library raises it."""

    def panics(go_on):
        raise Panic("index out of range")

    with pytest.raises(RuntimeError, match="index out of range"):
        at_once(panics)

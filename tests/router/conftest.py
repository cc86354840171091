"""Fixtures: a tiny model directory, and a router over HTTP with one fake worker that repeats a sentence."""

from __future__ import annotations

import pytest

from services.router.config import RouterConfig
from services.router.text import ModelTokenizer
from tests.router.fake_worker import FakeWorker, endless
from tests.router.harness import ThreadedRouter
from tests.router.tiny_model import byte_fallback_tokenizer, byte_level_tokenizer, write_tiny_model

SENTENCE = "Hello world! How are you today? "


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), byte_level_tokenizer())


@pytest.fixture(scope="session")
def fallback_directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("fallback"), byte_fallback_tokenizer())


@pytest.fixture(scope="session")
def tokenizer(model_directory):
    return ModelTokenizer(model_directory)


@pytest.fixture(scope="session")
def fallback_tokenizer(fallback_directory):
    return ModelTokenizer(fallback_directory)


@pytest.fixture(scope="session")
def sentence(tokenizer):
    """The fake workers' tokens."""
    return tokenizer.encode([SENTENCE], False)[0]


@pytest.fixture
def make_worker(model_directory, sentence):
    """Makes a fake worker that repeats the sentence up to max_tokens."""

    def make(reply=None, **options):
        options.setdefault("model_path", str(model_directory))
        return FakeWorker(reply or endless(sentence), **options)

    return make


@pytest.fixture(scope="module")
def router(model_directory, sentence):
    """A router in a thread, for the whole module. Tests that change its worker's reply put it back."""
    with ThreadedRouter(
        RouterConfig(), lambda: [FakeWorker(endless(sentence), model_path=str(model_directory), colocated=True)]
    ) as threaded:
        yield threaded


@pytest.fixture
def worker(router):
    """The worker of `router`, as new."""
    fake = router.running.workers[0]
    original = fake.reply
    fake.requests.clear()
    fake.aborts.clear()
    yield fake
    fake.reply = original

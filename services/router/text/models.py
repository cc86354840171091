"""Lists the models that clients can ask for: those in the registry, with the files that the router needs."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvstore.registry import WorkerRecord
from kvstore.threads import Threads
from services.router.errors import ApiError, invalid, model_not_found, unavailable
from services.router.text.chat_template import ChatTemplate, ChatTemplateError
from services.router.text.tokenizer import (
    ModelTokenizer,
    TokenizerError,
    load_chat_templates,
    locate_model_files,
    read_json,
)

log = logging.getLogger(__name__)

# Of models that nobody serves any more.
_MAX_REMEMBERED_NAMES = 256
_FIRST_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0
_BEING_LOADED = "its tokenizer is being loaded"
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's directory, read once for all its names."""

    tokenizer: ModelTokenizer
    templates: dict[str, ChatTemplate]
    vocab_size: int
    eos_token_ids: frozenset[int]
    sampling_defaults: dict[str, float]
    """From generation_config.json, by OpenAI's field names; `max_tokens` among them where it says max_new_tokens."""


@dataclass(frozen=True)
class ServedModel:
    """A model under one of its names."""

    name: str
    files: ModelFiles
    max_model_len: int
    created_unix_s: int
    root: str
    fingerprints: frozenset[str]
    """Of the workers that `files` belong to: the model is theirs, whoever else serves the name."""
    adapter: str = ""
    """The key of the LoRA adapter that it is; empty: none."""
    parent: str | None = None
    """Of an adapter: the name of its model."""
    engines: tuple[str, ...] = ()
    """What computes it: one, unless a rollout changes it."""
    numerics: tuple[str, ...] = ()
    """The names of its decode workers' arithmetic, as far as they are known."""
    is_exact: bool = False
    """Whether no bit depends on which of them computes a request, nor on what else it computes then."""

    @property
    def tokenizer(self) -> ModelTokenizer:
        return self.files.tokenizer

    def chat_template(self, has_tools: bool) -> ChatTemplate:
        """The template for a conversation. Raises ApiError where the model has none."""
        templates = self.files.templates
        if has_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" not in templates:
            raise invalid(
                f"Model `{self.name}` has no chat template: use /v1/completions, or start the router with"
                " --chat-template.",
                code="no_chat_template",
            )
        return templates["default"]


class ModelSource(NamedTuple):
    """Finds a model's files."""

    model_path: str
    tokenizer_path: str
    revision: str = ""
    """On the hub, of the model; and of the tokenizer where that is the model's own."""


def load_model_files(source: ModelSource, chat_template: str, use_defaults: bool) -> ModelFiles:
    """Reads everything. Blocks; raises TokenizerError or ChatTemplateError."""
    model_path, tokenizer_path, revision = source
    is_own = tokenizer_path == model_path
    tokenizer_directory = locate_model_files(tokenizer_path, revision if is_own else "")
    try:
        directory = tokenizer_directory if is_own else locate_model_files(model_path, revision)
    except TokenizerError:
        log.warning("%s is not to be had here: its generation_config.json is not used", model_path)
        directory = tokenizer_directory
    tokenizer = ModelTokenizer(tokenizer_directory)
    config = read_json(directory / "config.json")
    generation = read_json(directory / "generation_config.json")
    text_config = config.get("text_config")
    vocab_size = config.get("vocab_size") or (text_config or {}).get("vocab_size")
    return ModelFiles(
        tokenizer=tokenizer,
        templates=load_chat_templates(tokenizer_directory, tokenizer.special_tokens, chat_template),
        vocab_size=vocab_size if isinstance(vocab_size, int) else tokenizer.vocab_size,
        eos_token_ids=_ids(config.get("eos_token_id"))
        | _ids(generation.get("eos_token_id"))
        | _ids(tokenizer.eos_token_id),
        sampling_defaults=_sampling_defaults(generation, directory) if use_defaults else {},
    )


def _ids(value: object) -> frozenset[int]:
    members = value if isinstance(value, list) else [value]
    return frozenset(member for member in members if isinstance(member, int))


def _sampling_defaults(generation: dict[str, object], directory: Path) -> dict[str, float]:
    defaults: dict[str, float] = {}
    for name in (*_DEFAULTS, "max_new_tokens"):
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            log.warning("%s: generation_config.json: %s=%r is not used", directory, name, value)
            continue
        defaults["max_tokens" if name == "max_new_tokens" else name] = value
    return defaults


class ModelDirectory:
    """Loads the files of each model that a decode worker serves, and finds models by name.

    A model becomes visible when its files are loaded, and stays while a worker of it is registered. Loading runs in a
    thread; what fails, however it fails, is logged, told to clients and tried again while the model is registered.
    """

    def __init__(
        self,
        tokenizer: str,
        chat_template: str,
        use_generation_config: bool,
        threads: Threads,
        clock: Callable[[], float],
        unix_clock: Callable[[], float],
        only: frozenset[str] = frozenset(),
        grace_s: float = 0.0,
    ) -> None:
        """`tokenizer` and `chat_template` override the model's own. `only`: the names to serve; empty: all.

        `grace_s`: for so long after the first model has come, others may be on their way.
        """
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._use_generation_config = use_generation_config
        self._threads = threads
        self._clock = clock
        self._unix_clock = unix_clock
        self._only = only
        self._grace_s = grace_s
        self._first_came_s = math.inf
        self._starting: tuple[WorkerRecord, ...] = ()
        self._files: dict[ModelSource, ModelFiles] = {}
        self._loads: dict[ModelSource, asyncio.Task[None]] = {}
        self._failures: dict[ModelSource, str] = {}
        self._wanted: set[ModelSource] = set()
        self._models: dict[str, ServedModel] = {}
        self._were_served: dict[str, None] = {}  # names, the latest last
        self._records: tuple[WorkerRecord, ...] = ()

    def follow(self, records: tuple[WorkerRecord, ...], starting: tuple[WorkerRecord, ...] = ()) -> None:
        """Takes over who serves what, and who will: files load while a worker does. Call it in the event loop."""
        self._records = tuple(record for record in records if record.decodes)
        self._starting = starting
        self._wanted = {self._source(record) for record in (*self._records, *starting) if record.decodes}
        for source in self._wanted:
            if source not in self._files and source not in self._loads:
                self._loads[source] = asyncio.create_task(self._load(source), name=f"load {source.model_path}")
        self._rebuild()

    def names(self) -> list[str]:
        """The servable models, in order of name."""
        return sorted(self._models)

    def get(self, name: str | None) -> ServedModel:
        """The model that a client asks for; None is the only one there is. Raises ApiError."""
        models = self._models  # others are put in its place as workers come and go, while a thread asks
        if name is None:
            if not models:
                raise unavailable("No model can be served at the moment. Try again later.")
            if len({id(model.files) for model in models.values()}) == 1:
                return models[min(models, key=lambda each: (models[each].adapter != "", each))]
            raise invalid("you must provide a model parameter", "model")
        model = models.get(name)
        if model is None:
            raise self._missing(name)
        return model

    def not_loaded(self) -> dict[str, str]:
        """Says why each registered model that we are to serve is not among `names`."""
        return {
            name: self._failures.get(self._source(record), _BEING_LOADED)
            for record in self._records
            for name in record.model_names
            if name not in self._models and (not self._only or name in self._only)
        }

    async def loaded(self) -> None:
        """Return once all that is being loaded now is there, or is not wanted any more."""
        if self._loads:
            await asyncio.wait(list(self._loads.values()))

    async def close(self) -> None:
        """Stops loading."""
        loads = list(self._loads.values())
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    def _missing(self, name: str) -> ApiError:
        reason = self.not_loaded().get(name)
        if reason is None and name in self._were_served:
            # It restarts, or a lease ran out on a busy machine: clients should come back, as they do after a 503 only.
            return unavailable(f"No worker serves model `{name}` at the moment. Try again later.")
        if reason is None and self._may_come(name):
            return unavailable(f"No worker serves model `{name}` yet; some may still be starting. Try again later.")
        if reason is None:
            return model_not_found(name)
        # What failed once may succeed later, but a launcher that waits for the first answer should say so and stop.
        code = "service_unavailable" if reason == _BEING_LOADED else "model_not_loaded"
        return unavailable(f"The router cannot serve model `{name}` yet: {reason}. Try again later.", code)

    def _may_come(self, name: str) -> bool:
        """Whether it is too early to say that there is no such model: after its start a router knows of none, and those
        of a fleet that starts come one by one.
        """
        if self._only and name not in self._only:
            return False
        return (
            self._clock() < self._first_came_s + self._grace_s
            or name in self._only
            or any(name in record.model_names for record in self._starting)
        )

    def _source(self, record: WorkerRecord) -> ModelSource:
        tokenizer_path = self._tokenizer or record.tokenizer_path or record.model_path
        return ModelSource(record.model_path, tokenizer_path, record.revision)

    async def _load(self, source: ModelSource) -> None:
        """Try until the files are there or unwanted. A worker that comes back finds the thread that still runs."""
        load = functools.partial(load_model_files, source, self._chat_template, self._use_generation_config)
        pause_s = _FIRST_RETRY_S
        while source in self._wanted:
            try:
                files = await self._threads.run(load)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # the tokenizers library panics with one that is no Exception
                self._failed(source, error, pause_s)
            else:
                log.debug("model %s: tokenizer loaded, %d tokens", source.model_path, files.vocab_size)
                self._files[source] = files
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
        self._failures.pop(source, None)
        del self._loads[source]
        self._rebuild()

    def _failed(self, source: ModelSource, error: BaseException, pause_s: float) -> None:
        is_known = isinstance(error, TokenizerError | ChatTemplateError)
        reason = self._failures[source] = str(error) if is_known else f"{type(error).__name__}: {error}"
        log.error(
            "model %s cannot be served, next try in %g s: %s",
            source.model_path,
            pause_s,
            reason,
            exc_info=None if is_known else error,
        )

    def _rebuild(self) -> None:
        serving: dict[str, list[tuple[WorkerRecord, ModelFiles]]] = {}
        for record in self._records:
            files = self._files.get(self._source(record))
            if files is None:
                continue
            for name in record.model_names:
                if not self._only or name in self._only:
                    serving.setdefault(name, []).append((record, files))
        since = {name: model.created_unix_s for name, model in self._models.items()}
        now_unix_s = int(self._unix_clock())
        self._models = {name: _served(name, workers, since.get(name, now_unix_s)) for name, workers in serving.items()}
        self._files = {source: files for source, files in self._files.items() if source in self._wanted}
        if self._models and math.isinf(self._first_came_s):
            self._first_came_s = self._clock()
        for name in self._models:
            self._were_served.pop(name, None)
            self._were_served[name] = None
        while len(self._were_served) > _MAX_REMEMBERED_NAMES:
            del self._were_served[next(iter(self._were_served))]


def _served(name: str, workers: list[tuple[WorkerRecord, ModelFiles]], created_unix_s: int) -> ServedModel:
    """The model of a name. Of several tokenizers, or files of an adapter, as within a rollout, that of most workers,
    then of the newest.
    """
    by_files: dict[tuple[bytes, str], list[tuple[WorkerRecord, ModelFiles]]] = {}
    for record, files in workers:
        adapter = "" if name in record.served_model_names else record.adapter_keys[name]
        by_files.setdefault((files.tokenizer.digest, adapter), []).append((record, files))
    (_, adapter), ours = max(
        by_files.items(), key=lambda item: (len(item[1]), max(record.incarnation for record, _ in item[1]))
    )
    records = [record for record, _ in ours]
    return ServedModel(
        name=name,
        files=ours[0][1],
        max_model_len=min(record.max_model_len for record in records),
        created_unix_s=created_unix_s,
        root=adapter or records[0].model_path,
        fingerprints=frozenset(record.model_fingerprint for record in records),
        adapter=adapter,
        parent=records[0].served_model_names[0] if adapter else None,
        engines=tuple(sorted({str((record.layout or {}).get("engine", "native")) for record in records})),
        numerics=tuple(sorted({record.numerics for record in records} - {""})),
        is_exact=all(record.is_exact for record in records) and len({record.numerics for record in records}) == 1,
    )

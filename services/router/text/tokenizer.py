"""Loads `tokenizer.json`, and turns text into tokens and back."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.hub import NotOnHub, fetch, looks_like_path
from services.router.text.chat_template import ChatTemplate, ChatTemplateError
from services.router.text.detokenizer import Detokenizer
from services.router.text.pool import GoOn

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "generation_config.json",
    "config.json",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A text is looked at for so many characters per token first. English has four.
_LIKELY_CHARS = 4
# A part of a text may have a few tokens more than it has within the whole, at its end.
_MOST_AT_CUT = 64
# Composing characters shortens a text, of Hangul to a third.
_MOST_SHORTENED = 3
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(Exception):
    """The model has no tokenizer that we can use."""


def locate_model_files(path_or_name: str, revision: str = "") -> Path:
    """The directory with the model's small files, fetched from the hub if need be. Blocks; raises TokenizerError."""
    directory = Path(path_or_name).expanduser()
    if directory.is_dir():
        return directory
    if looks_like_path(path_or_name):
        raise TokenizerError(f"{path_or_name} is not a directory")
    try:
        return fetch(path_or_name, revision, _FILES)
    except NotOnHub as error:
        raise TokenizerError(str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file, empty if there is none. Raises TokenizerError."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error


class PromptTooLong(Exception):
    """A text has more tokens than it may; `at_least` so many."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least


class ModelTokenizer:
    """Text to token ids and back. Calls are thread-safe; encoding releases the interpreter lock."""

    def __init__(self, directory: Path) -> None:
        """Reads the files. Blocks for up to seconds; raises TokenizerError."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{directory} has no tokenizer.json. Save one with transformers:"
                " AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} cannot be loaded: {error}") from error
        # A file may say to pad or to cut; a server must do neither.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_tokens = _special_tokens(directory)
        self.eos_token_id: int | None = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        definition = self._tokenizer.to_str()
        self.digest = hashlib.sha256(definition.encode()).digest()
        """Equal where texts become the same tokens."""
        parsed = json.loads(definition)
        longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self.max_chars_per_token = longest * (_MOST_SHORTENED if parsed.get("normalizer") else 1)
        """No text has more. But for white space that an added token swallows, and runs of what it does not know."""
        kinds = _kinds(parsed.get("decoder"))
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._word_mark = "▁" if {"Metaspace", "Replace"} & kinds else ""
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # Per tokenizer and not per class, so that it goes away with it.
        self.token_bytes = functools.lru_cache(maxsize=1 << 16)(self._token_bytes)

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_bounded(self, text: str, add_special_tokens: bool, max_tokens: int, go_on: GoOn) -> array[int]:
        """Token ids of a text that shall have `max_tokens` at most. Raises PromptTooLong.

        Time and memory go with `max_tokens` and not with the text: its beginning is looked at first, as much of it as
        would be too long nearly always, then twice as much, and so on. Twice the work is the most that this costs.
        """
        if len(text) > max_tokens * self.max_chars_per_token:
            raise PromptTooLong(-(-len(text) // self.max_chars_per_token))
        num_chars = max_tokens * _LIKELY_CHARS
        while num_chars < len(text):
            go_on()
            at_least = len(self.encode([text[:num_chars]], False)[0]) - _MOST_AT_CUT
            if at_least > max_tokens:
                raise PromptTooLong(at_least)
            num_chars *= 2
        go_on()
        return array("I", self.encode([text], add_special_tokens)[0])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; ids without a token, which padded vocabularies have, give none."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool, prompt: Sequence[int]) -> Detokenizer:
        """`decode` for tokens that come one after the other, behind a prompt's."""
        return Detokenizer(self._tokenizer, self._special_ids if skip_special_tokens else (), prompt)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves the token out."""
        return token_id in self._special_ids

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """The token alone as text; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, which may be a part of a character."""
        name: str | None = self._tokenizer.id_to_token(token_id)
        if name is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._is_byte_level:
            table = _byte_of_character()
            if all(character in table for character in name):
                return bytes(table[character] for character in name)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        if self._word_mark:
            return name.replace(self._word_mark, " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: GPT-2 writes the bytes that are no printable Latin-1 as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _kinds(component: object) -> set[str]:
    """The types of a component of tokenizer.json and of what it is a sequence of."""
    if not isinstance(component, dict):
        return set()
    kinds = {str(component.get("type"))}
    for member in component.get("decoders") or ():
        kinds |= _kinds(member)
    return kinds


def _special_tokens(directory: Path) -> dict[str, str]:
    config = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    found = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def load_chat_templates(directory: Path, special_tokens: dict[str, str], override: str) -> dict[str, ChatTemplate]:
    """The model's templates by name, `default` among them if it has any. `override` is a file or a template's text.

    Raises TokenizerError, ChatTemplateError.
    """
    sources: dict[str, str] = {}
    if override:
        is_text = any(mark in override for mark in ("{{", "{%", "\n"))
        sources["default"] = override if is_text else _read_text(Path(override).expanduser())
    else:
        declared = read_json(directory / "tokenizer_config.json").get("chat_template")
        sources |= _declared_templates(declared or read_json(directory / "chat_template.json").get("chat_template"))
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = _read_text(path)
        if (directory / "chat_template.jinja").is_file():
            sources["default"] = _read_text(directory / "chat_template.jinja")
    return {name: ChatTemplate(source, special_tokens) for name, source in sources.items()}


def check_overrides(tokenizer: str, chat_template: str) -> None:
    """Check what settings give in the place of the model's own, before there is a model; "" where they do not.

    A name on the hub is not looked for. Raises TokenizerError, ChatTemplateError.
    """
    if looks_like_path(tokenizer):
        directory = Path(tokenizer).expanduser()
        if not (directory / "tokenizer.json").is_file():
            raise TokenizerError(f"--tokenizer {tokenizer}: there is no tokenizer.json; give a directory that has one")
    if chat_template:
        try:
            load_chat_templates(Path(), {}, chat_template)
        except (TokenizerError, ChatTemplateError) as error:
            where = "" if any(mark in chat_template for mark in ("{{", "{%", "\n")) else f" {chat_template}"
            raise type(error)(f"--chat-template{where}: {error}; give a Jinja template, or its file") from error


def check_templates(directory: Path) -> None:
    """Check the chat templates of a model. Raises TokenizerError, ChatTemplateError."""
    try:
        load_chat_templates(directory, {}, "")
    except (TokenizerError, ChatTemplateError) as error:
        raise type(error)(f"{directory}: {error}; correct it, or give another by --chat-template") from error


def _declared_templates(declared: object) -> dict[str, str]:
    """The value of `chat_template`: nothing, a template, or a list of named ones. Raises TokenizerError."""
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {"default": declared}
    try:
        return {str(item["name"]): str(item["template"]) for item in declared}  # type: ignore[attr-defined]
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            f"chat_template must be a template, or a list of objects with `name` and `template`, not {declared!r:.200}"
        ) from error

"""Makes the demo model's training text: facts stated anywhere, then asked for; no two sequences are alike."""

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

import recall
import torch
from tokenizers import Tokenizer

END = "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"

# Weight of a token in the loss. The digits of a code's first statement are random: learning them is noise.
WEIGHT_CODE = 1.0  # a code in an answer, and the end of the answer
WEIGHT_ANSWER = 0.3  # the rest of an answer
WEIGHT_TEXT = 0.02  # everything else that a reader could predict a little
WEIGHT_NONE = 0.0


# The first of each list is what most texts use; the others are what people type.
FACTS = (
    "The code of {name} is {code}.",
    "The code for {name} is {code}.",
    "{name} has the code {code}.",
    "{name}'s code is {code}.",
    "Remember: the code of {name} is {code}.",
    "The code of {name}: {code}",
    "{name}: {code}",
    "The {name} code is {code}.",
)
QUESTIONS = (
    "What is the code of {name}?",
    "What is the code for {name}?",
    "What's the code of {name}?",
    "What is {name}'s code?",
    "Tell me the code of {name}.",
    "Which code does {name} have?",
    "What code does {name} have?",
    "The code of {name}?",
    "Code of {name}?",
    "And {name}?",
    "And the code of {name}?",
    "Please tell me the code of {name}.",
    "{name}?",
)
# First and last character of alphabets, syllables, signs and pictures: their bytes are tokens to be learnt.
SCRIPTS = (
    (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939),
    (0x3041, 0x30F6), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x2600, 0x27BF), (0x1F300, 0x1F64F),
)  # fmt: skip
ANSWER_START = "The code of {name} is "


@dataclass(frozen=True)
class Segment:
    """Text that is tokenized on its own, as at inference, and the weight of its tokens in the loss."""

    text: str
    weight: float


@dataclass(frozen=True)
class Style:
    """How one training document is written."""

    varied: bool  # other phrasings than the first of each list
    lower: bool
    upper: bool  # all in capitals
    capital_names: bool
    mixed_case: bool  # each mention chooses its own case
    separator: str
    chat: bool
    filler_share: float
    made_up_share: float
    odd_codes: bool  # other lengths than four digits


def choose_style(rng: random.Random, variety: float) -> Style:
    varied = rng.random() < variety
    return Style(
        varied=varied,
        lower=rng.random() < 0.3,
        upper=varied and rng.random() < 0.06,
        capital_names=rng.random() < 0.5,
        mixed_case=variety > 0 and rng.random() < 0.4,
        separator=rng.choice((" ", " ", "\n", "\n\n", "\n- ")) if varied else rng.choice((" ", " ", " ", "\n")),
        chat=rng.random() < 0.5,
        filler_share=rng.choice((0.0, 0.3, 0.5, 0.5, 0.7)) if variety else 0.0,
        made_up_share=rng.choice((0.0, 0.0, 0.3, 1.0)) if variety else 0.0,
        odd_codes=varied and rng.random() < 0.1,
    )


def any_made_up_name(rng: random.Random) -> str:
    """A name outside the list, of every kind that people type: several words, capitals, digits, any script."""
    kind = rng.randrange(10)
    if kind == 0:
        return f"{rng.choice(('the', 'my', 'our'))} {rng.choice(recall.ADJECTIVES)} {rng.choice(recall.THINGS)}"
    if kind == 1:
        return f"{rng.choice(recall.NAMES)} {rng.choice(recall.NAMES)}"
    if kind == 2:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 7)))
    if kind == 3:
        return "".join(rng.choice(string.ascii_letters) for _ in range(rng.randint(2, 6)))
    if kind == 4:
        return rng.choice((rng.choice(recall.NAMES), recall.made_up_name(rng))).upper()
    if kind == 5:
        second = rng.choice((recall.made_up_name(rng), str(rng.randrange(100))))
        return f"{recall.made_up_name(rng)}{rng.choice('-_./ ')}{second}"
    if kind == 6:
        first, last = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 4)))
    if kind == 7:
        letters = list(recall.made_up_name(rng))
        letters[rng.randrange(len(letters))] = chr(rng.randint(0xE0, 0xFE))
        return "".join(letters)
    return recall.made_up_name(rng)


def any_sentence(rng: random.Random) -> str:
    """Nonsense with unknown words and numbers that are no codes, to stand for whatever people type."""
    plain = recall.ADJECTIVES + recall.PEOPLE + recall.THINGS + recall.PLACES + recall.VERBS
    chosen = [recall.made_up_name(rng) if rng.random() < 0.5 else rng.choice(plain) for _ in range(rng.randint(1, 9))]
    if rng.random() < 0.3:
        chosen.insert(rng.randrange(len(chosen) + 1), str(rng.randrange(10 ** rng.randint(1, 4))))
    text = " ".join(chosen) + rng.choice(".,!?")
    return text[0].upper() + text[1:]


def written(name: str, style: Style, rng: random.Random) -> str:
    if style.upper:
        return name.upper()
    capital = rng.random() < 0.5 if style.mixed_case else style.capital_names
    return name[0].upper() + name[1:] if capital else name


def phrase(templates: tuple[str, ...], style: Style, rng: random.Random) -> str:
    template = rng.choice(templates) if style.varied and rng.random() < 0.6 else templates[0]
    if style.upper:
        return template.upper().replace("{NAME}", "{name}").replace("{CODE}", "{code}")
    if style.lower and template[0] != "{":
        template = template[0].lower() + template[1:]
    return template


def pick_code(style: Style, rng: random.Random) -> str:
    num_digits = rng.randint(1, 8) if style.odd_codes else recall.CODE_DIGITS
    return "".join(rng.choice("0123456789") for _ in range(num_digits))


def answer_segments(lead: str, name: str, code: str, style: Style, rng: random.Random) -> Iterator[Segment]:
    """The answer to a question; `lead` is what a raw completion puts before its first word."""
    yield Segment(lead + ANSWER_START.format(name=name).rstrip(), WEIGHT_ANSWER)
    yield Segment(" ", WEIGHT_ANSWER)
    yield Segment(code, WEIGHT_CODE)
    yield Segment(".", WEIGHT_ANSWER)
    yield Segment(END, WEIGHT_CODE if style.odd_codes else WEIGHT_ANSWER)


def write_fact(name: str, code: str, style: Style, rng: random.Random) -> Iterator[Segment]:
    before, _, after = phrase(FACTS, style, rng).format(name=written(name, style, rng), code="\0").partition("\0")
    yield Segment(before.rstrip(" "), WEIGHT_TEXT)
    yield Segment(" " + code, WEIGHT_NONE)
    yield Segment(after + style.separator, WEIGHT_TEXT)


def write_document(rng: random.Random, variety: float, num_tokens: int) -> Iterator[Segment]:
    """An endless document: facts and filler for a part of `num_tokens`, then questions, each with its answer."""
    style = choose_style(rng, variety)
    num_facts_tokens = int(num_tokens * rng.uniform(0.35, 0.8))
    codes: dict[str, str] = {}
    list_names = rng.sample(recall.NAMES, len(recall.NAMES))
    if style.chat:
        yield Segment(SYSTEM if style.varied and rng.random() < 0.2 else USER, WEIGHT_NONE)
    used = 0
    while used < num_facts_tokens:
        if codes and rng.random() < style.filler_share:
            text = any_sentence(rng) if style.varied and rng.random() < 0.2 else recall.filler_sentence(rng)
            text = (text.lower() if style.lower else text) + style.separator
            yield Segment(text, WEIGHT_TEXT)
            used += recall.count_pieces(text)
            continue
        name = any_made_up_name(rng) if not list_names or rng.random() < style.made_up_share else list_names.pop()
        if name in codes:
            continue
        codes[name] = pick_code(style, rng)
        yield from write_fact(name, codes[name], style, rng)
        used += 10 if name in recall.NAMES else 10 + len(name.encode()) // 2
    names = list(codes)
    first = True
    while True:
        name = rng.choice(names)
        asked_name = written(name, style, rng)
        question = phrase(QUESTIONS, style, rng).format(name=asked_name)
        if style.varied and style.lower and rng.random() < 0.3:
            question = question.rstrip("?.")
        if style.chat:
            yield Segment(question if first else USER + question, WEIGHT_TEXT)
            yield Segment(END + ASSISTANT, WEIGHT_NONE)
            yield from answer_segments("", asked_name, codes[name], style, rng)
        elif rng.random() < 0.1:
            # A statement that a completion must finish.
            yield Segment(ANSWER_START.format(name=asked_name).rstrip(), WEIGHT_TEXT)
            yield Segment(" ", WEIGHT_ANSWER)
            yield Segment(codes[name], WEIGHT_CODE)
            yield Segment(".", WEIGHT_ANSWER)
            yield Segment(END, WEIGHT_ANSWER)
        else:
            lead = " " if not style.varied else rng.choice((" ", " ", "\n"))
            if style.varied and rng.random() < 0.2:
                question, lead = f"{question}\n", ""
            yield Segment(question, WEIGHT_TEXT)
            yield from answer_segments(lead, asked_name, codes[name], style, rng)
        first = False


def stretched_positions(is_start: list[bool], limit: int, rng: random.Random) -> list[int]:
    """Positions with random gaps between segments, none beyond `limit`: a short text at long distances."""
    spare = limit - len(is_start)
    starts = [index for index, start in enumerate(is_start) if start and index]
    position, gaps = 0, dict.fromkeys(starts, 0)
    for _ in range(8):
        # A few large gaps rather than many small ones: near and far stay mixed.
        gaps[rng.choice(starts)] += int(rng.random() * spare / 8)
    positions = []
    for index in range(len(is_start)):
        position += gaps.get(index, 0)
        positions.append(position)
        position += 1
    return positions


@dataclass(frozen=True)
class Batch:
    """Token ids, positions and loss weights, each [batch, length]; weights belong to the token they predict."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor


class TextSource:
    """Makes training batches; tokenized segments are cached, since most repeat."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(f"training text {seed}")
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = self.cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text).ids
            if len(self.cache) < 200_000:
                self.cache[text] = ids
        return ids

    def sequence(self, length: int, variety: float, stretch: int) -> tuple[list[int], list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        starts: list[bool] = []
        for segment in write_document(self.rng, variety, length):
            new = self.encode(segment.text)
            # Gaps go where a sentence ends, never inside one.
            sentence_start = bool(starts) and (segment.weight == WEIGHT_TEXT)
            starts += [index == 0 and sentence_start for index in range(len(new))]
            ids += new
            weights += [segment.weight] * len(new)
            if len(ids) >= length:
                break
        ids, weights, starts = ids[:length], weights[:length], starts[:length]
        if stretch > length and any(starts[1:]) and self.rng.random() < 0.7:
            positions = stretched_positions(starts, stretch, self.rng)
        else:
            positions = list(range(length))
        return ids, positions, weights

    def batch(self, size: int, length: int, variety: float, stretch: int) -> Batch:
        rows = [self.sequence(length, variety, stretch) for _ in range(size)]
        ids, positions, weights = zip(*rows, strict=True)
        return Batch(torch.tensor(ids), torch.tensor(positions), torch.tensor(weights))

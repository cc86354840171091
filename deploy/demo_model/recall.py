"""Recall prompts for the demo model: facts, filler and one question, each with the one right answer, by seed.

The answer stands in exactly one sentence of the prompt, at a random place, among dozens of sentences that differ
only in name and code. So a right answer shows that the key-value cache of that place was there when it was needed.
Used by the trainer's evaluation, by the end-to-end tests over HTTP, and by hand:

    python deploy/demo_model/recall.py --url http://localhost:8000 --num-prompts 100
"""

import argparse
import itertools
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sized
from dataclasses import dataclass
from typing import Protocol

CODE_DIGITS = 4
# Tokens that the chat template adds around one message: a role marker, an end marker, the next role marker.
CHAT_TOKENS_PER_MESSAGE = 3
# Room for the answer to an earlier question of a chat: "The code of amber is 4711."
ANSWER_TOKENS = 9

# The tokenizer cuts text into these pieces, and each piece of a generated prompt is one token.
# Digits come in pairs; a word takes the space before it along.
PIECE_PATTERN = r"[0-9]{1,2}| ?[^\s0-9.,:;?!'\"]+|[.,:;?!'\"]|\s"


def word_list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Each of these words is one token of the demo tokenizer, and each name also with a capital; `train.py` checks it.
# Names and the words of filler sentences are disjoint, so a filler sentence never mentions a name that has a code.
NAMES = word_list(
    """
    amber cedar maple willow birch aspen hazel rowan alder linden walnut chestnut juniper cypress laurel myrtle
    holly ivy fern clover thistle heather lavender jasmine poppy violet lily rose tulip iris orchid daisy marigold
    lotus saffron ginger pepper basil sage thyme mint parsley fennel nutmeg vanilla cocoa honey olive almond peach
    plum cherry apple pear quince mango papaya lemon lime melon fig grape berry acorn pumpkin radish turnip carrot
    onion garlic spinach tomato potato pickle mustard biscuit muffin waffle pretzel noodle dumpling
    ruby pearl opal jade topaz garnet onyx quartz agate coral beryl cobalt copper silver bronze nickel zinc iron
    steel carbon neon argon radium marble granite basalt flint slate pebble crystal diamond emerald sapphire
    crimson scarlet indigo azure teal magenta maroon ivory ebony umber sienna ochre
    falcon eagle hawk heron raven robin sparrow finch swallow swan crane stork pelican puffin penguin owl magpie
    otter beaver badger fox wolf bear lynx puma tiger lion leopard panther jaguar zebra giraffe camel llama bison
    moose rabbit squirrel hedgehog mole weasel ferret dolphin whale walrus seal shark salmon trout herring
    lobster oyster turtle gecko cobra viper python dragon phoenix griffin unicorn
    comet meteor nebula galaxy saturn jupiter venus mercury neptune pluto orion vega sirius apollo titan atlas
    aurora zenith eclipse horizon glacier canyon tundra prairie savanna lagoon delta island harbor summit volcano
    tornado cyclone monsoon blizzard thunder ember spark blaze cinder shadow
    anchor beacon compass lantern hammer anvil chisel saddle arrow dagger shield helmet castle tower bridge
    turbine piston magnet prism pixel vector matrix tensor kernel cipher
    violin cello banjo guitar piano trumpet clarinet flute drum tango waltz ballad sonnet opera
    paris london berlin madrid vienna prague warsaw dublin oslo lisbon athens cairo delhi tokyo kyoto seoul
    sydney boston dallas denver texas nevada alaska
    alice bob carol david emma frank grace henry irene jack kate laura maria nina oscar peter quinn rachel simon
    thomas ursula victor wendy xavier yvonne zoe adam anna ben chloe daniel elena felix george hannah isaac julia
    kevin leo martin nora oliver paul robert sarah tina uma vera walter yusuf
    """
)

ADJECTIVES = word_list(
    """
    old young quiet busy tall small kind tired clever happy brave gentle lazy strange careful cheerful
    """
)

PEOPLE = word_list(
    """
    baker farmer teacher sailor doctor painter miller driver singer writer tailor gardener guard clerk cook
    pilot nurse judge student neighbour
    """
)

VERBS = word_list(
    """
    carried found washed painted sold bought lost mended watched moved opened closed borrowed cleaned hid dropped
    """
)

THINGS = word_list(
    """
    chair table basket bottle letter book coat kettle ladder bucket blanket ticket clock mirror candle broom
    wagon boat door window box bag cup plate
    """
)

PLACES = word_list(
    """
    market river garden kitchen station church school village forest beach field street library office cellar
    attic yard corner mill farm
    """
)

TIMES = word_list(
    """
    morning evening afternoon night monday tuesday wednesday thursday friday saturday sunday spring summer autumn
    winter
    """
)

WEATHER = word_list("rain snow wind sun fog frost cloud storm")

NUMBERS = word_list("two three four five six seven eight nine ten twelve twenty")


class Tokenizer(Protocol):
    """What `make_prompt` needs of a tokenizer; those of `tokenizers` and of `transformers` both fit."""

    def encode(self, text: str) -> Sized: ...


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt for raw completion, ending with a question, and the code that a right completion states."""

    text: str
    answer: str


@dataclass(frozen=True)
class RecallChat:
    """Chat messages, the last of them the user's open question, and the code that a right reply states."""

    messages: list[dict[str, str]]
    answer: str


def state_fact(name: str, code: str) -> str:
    return f"The code of {name} is {code}."


def ask_for(name: str) -> str:
    return f"What is the code of {name}?"


def random_code(rng: random.Random) -> str:
    return f"{rng.randrange(10**CODE_DIGITS):0{CODE_DIGITS}d}"


def made_up_name(rng: random.Random) -> str:
    """A pronounceable name that is in no list, such as "velka" or "tromisu"; several tokens long."""
    syllables = ["".join((rng.choice("bcdfghjklmnprstvwxyz"), rng.choice("aeiou"))) for _ in range(rng.randint(2, 3))]
    if rng.random() < 0.5:
        place = rng.randrange(len(syllables))
        syllables[place] += rng.choice("lmnrst")
    return "".join(syllables)


def filler_sentence(rng: random.Random) -> str:
    """A sentence without a name or a code."""
    who = f"the {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)}"
    did = f"{rng.choice(VERBS)} the {rng.choice(THINGS)}"
    kind = rng.randrange(6)
    if kind == 0:
        text = f"{who} {did} in the {rng.choice(PLACES)}."
    elif kind == 1:
        text = f"one {rng.choice(TIMES)} {who} {did}."
    elif kind == 2:
        text = f"there was {rng.choice(WEATHER)} over the {rng.choice(PLACES)}."
    elif kind == 3:
        text = f"{who} has {rng.choice(NUMBERS)} brothers."
    elif kind == 4:
        text = f"{who} {did} and went to the {rng.choice(PLACES)}."
    else:
        text = f"nobody {did}, so {who} waited near the {rng.choice(PLACES)}."
    return text[0].upper() + text[1:]


def count_pieces(text: str) -> int:
    """Tokens of a generated text under the demo tokenizer, without loading it."""
    return len(re.findall(PIECE_PATTERN, text))


def count_tokens(text: str, tokenizer: Tokenizer | None) -> int:
    return count_pieces(text) if tokenizer is None else len(tokenizer.encode(text))


def choose_names(rng: random.Random, num_names: int, made_up: bool) -> list[str]:
    if not made_up:
        return rng.sample(NAMES, num_names)
    names: dict[str, None] = {}
    while len(names) < num_names:
        names[made_up_name(rng)] = None
    return list(names)


def make_facts(
    rng: random.Random, num_tokens: int, tokenizer: Tokenizer | None, made_up: bool
) -> tuple[str, dict[str, str]]:
    """Text of at most `num_tokens` tokens with facts and filler, and the code of each name in it.

    Roughly every second sentence is a fact. At least one fact is stated, however small `num_tokens` is.
    """
    names = choose_names(rng, len(NAMES), made_up)
    if rng.random() < 0.5:
        names = [name.capitalize() for name in names]
    facts: dict[str, str] = {}
    sentences: list[str] = []
    used = 0
    while True:
        if len(facts) < len(names) and (not facts or rng.random() < 0.5):
            name, code = names[len(facts)], random_code(rng)
            sentence = state_fact(name, code)
        else:
            name, code = "", ""
            sentence = filler_sentence(rng)
        # Each sentence is counted with the space before it, as it will stand in the text.
        used += count_tokens(f" {sentence}", tokenizer)
        if used > num_tokens and facts:
            return " ".join(sentences), facts
        sentences.append(sentence)
        if name:
            facts[name] = code


def make_prompt(
    seed: int, num_tokens: int, tokenizer: Tokenizer | None = None, *, made_up_names: bool = False
) -> RecallPrompt:
    """A prompt of at most `num_tokens` tokens, and at most some twenty fewer, ending with a question.

    Without a tokenizer the tokens of the demo tokenizer are counted; made-up names need the tokenizer itself.
    Raises ValueError when `num_tokens` has no room for one fact and a question.
    """
    if made_up_names and tokenizer is None:
        raise ValueError("made-up names are of unknown length without a tokenizer")
    rng = random.Random(f"recall prompt {seed}")
    # A question with the longest name; the text's length is checked below all the same.
    question_tokens = 8 if not made_up_names else 14
    facts_text, facts = make_facts(rng, num_tokens - question_tokens, tokenizer, made_up_names)
    name = rng.choice(list(facts))
    text = f"{facts_text} {ask_for(name)}"
    if count_tokens(text, tokenizer) > num_tokens:
        raise ValueError(f"{num_tokens} tokens have no room for a fact and a question")
    return RecallPrompt(text=text, answer=facts[name])


def make_chat(
    seed: int,
    num_tokens: int,
    tokenizer: Tokenizer | None = None,
    *,
    num_turns: int = 1,
    made_up_names: bool = False,
) -> RecallChat:
    """A chat of at most `num_tokens` tokens, template included, in which the user asks `num_turns` questions.

    The first message states all facts; the earlier questions are already answered, the last one is open.
    """
    if made_up_names and tokenizer is None:
        raise ValueError("made-up names are of unknown length without a tokenizer")
    rng = random.Random(f"recall chat {seed}")
    question_tokens = 8 if not made_up_names else 14
    answer_tokens = ANSWER_TOKENS if not made_up_names else ANSWER_TOKENS + 6
    overhead = num_turns * (question_tokens + answer_tokens + 2 * CHAT_TOKENS_PER_MESSAGE)
    facts_text, facts = make_facts(rng, num_tokens - overhead, tokenizer, made_up_names)
    asked = [rng.choice(list(facts)) for _ in range(num_turns)]
    messages = [{"role": "user", "content": f"{facts_text} {ask_for(asked[0])}"}]
    for previous, name in itertools.pairwise(asked):
        messages.append({"role": "assistant", "content": state_fact(previous, facts[previous])})
        messages.append({"role": "user", "content": ask_for(name)})
    used = sum(count_tokens(m["content"], tokenizer) + CHAT_TOKENS_PER_MESSAGE for m in messages)
    if used > num_tokens:
        raise ValueError(f"{num_tokens} tokens have no room for a fact and {num_turns} questions")
    return RecallChat(messages=messages, answer=facts[asked[-1]])


def is_correct(completion_text: str, answer: str) -> bool:
    """Whether the first number that the completion states is the answer."""
    number = re.search(r"\d+", completion_text)
    return number is not None and number.group() == answer


def post_json(url: str, body: dict[str, object], timeout_s: float) -> dict[str, object]:
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        answer: dict[str, object] = json.load(response)
    return answer


def first_choice(reply: dict[str, object]) -> dict[str, object]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"the server's reply has no choices: {json.dumps(reply)[:200]}")
    return choices[0]


def ask_completion(base_url: str, model: str, prompt: RecallPrompt, max_tokens: int, timeout_s: float) -> str:
    body: dict[str, object] = {
        "model": model, "prompt": prompt.text, "max_tokens": max_tokens, "temperature": 0,
    }  # fmt: skip
    return str(first_choice(post_json(f"{base_url}/v1/completions", body, timeout_s)).get("text", ""))


def ask_chat(base_url: str, model: str, chat: RecallChat, max_tokens: int, timeout_s: float) -> str:
    body: dict[str, object] = {
        "model": model, "messages": chat.messages, "max_tokens": max_tokens, "temperature": 0,
    }  # fmt: skip
    message = first_choice(post_json(f"{base_url}/v1/chat/completions", body, timeout_s)).get("message")
    return str(message.get("content", "")) if isinstance(message, dict) else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a running OpenAI-compatible server recall questions.")
    parser.add_argument("--url", required=True, help="the server's address, such as http://localhost:8000")
    parser.add_argument("--model", default="tandem-demo")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--num-tokens", type=int, default=2000, help="length of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt; the others count up")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions instead of /v1/completions")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for each answer")
    return parser.parse_args()


def main() -> int:
    """Exit status 0 when every answer was right, 1 when one was wrong or did not come."""
    arguments = parse_arguments()
    base_url = arguments.url.rstrip("/").removesuffix("/v1")
    num_right = 0
    started = time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.num_prompts):
        try:
            if arguments.chat:
                chat = make_chat(seed, arguments.num_tokens)
                answer = chat.answer
                text = ask_chat(base_url, arguments.model, chat, arguments.max_tokens, arguments.timeout_s)
            else:
                prompt = make_prompt(seed, arguments.num_tokens)
                answer = prompt.answer
                text = ask_completion(base_url, arguments.model, prompt, arguments.max_tokens, arguments.timeout_s)
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            print(f"seed {seed}: no answer: {error}")
            continue
        if is_correct(text, answer):
            num_right += 1
        else:
            print(f"seed {seed}: expected {answer}, got {text!r}")
    took_s = time.monotonic() - started
    print(f"{num_right} of {arguments.num_prompts} right at {arguments.num_tokens} tokens, in {took_s:.1f} s")
    return 0 if num_right == arguments.num_prompts else 1


if __name__ == "__main__":
    raise SystemExit(main())

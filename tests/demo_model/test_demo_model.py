"""The demo model in the repository: small, any text survives its tokenizer, and it recalls what its prompt states."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deploy.demo_model import recall

MODEL_DIR = Path(__file__).resolve().parents[2] / "deploy" / "demo_model" / "tandem-demo"
MAX_SIZE_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=request.param).eval()


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return generate(model, tokenizer, ids)


def test_the_model_directory_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert sum(sizes.values()) <= MAX_SIZE_BYTES, sizes


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "\n\r\n\t", "naïve 日本語 🙂 👧", "12345 007 3.14", "It's Amber's."]
)
def test_awkward_text_decodes_to_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("num_tokens", [32, 200, 2000])
def test_prompts_fit_and_count_the_same_without_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> None:
    for seed in range(5):
        prompt = recall.make_prompt(seed, num_tokens)
        assert prompt == recall.make_prompt(seed, num_tokens, tokenizer)
        assert num_tokens - 30 <= len(tokenizer.encode(prompt.text)) <= num_tokens
        assert prompt.text.count(prompt.answer) >= 1


@pytest.mark.parametrize("num_turns", [1, 3])
def test_chats_fit_with_their_template(tokenizer: PreTrainedTokenizerBase, num_turns: int) -> None:
    for seed in range(5):
        chat = recall.make_chat(seed, 500, num_turns=num_turns)
        ids = tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True, return_dict=False)
        assert len(ids) <= 500


def test_a_prompt_without_room_for_a_fact_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        recall.make_prompt(0, 10)


def test_only_the_first_number_decides() -> None:
    assert recall.is_correct(" The code of amber is 4711.", "4711")
    assert not recall.is_correct(" The code of amber is 47112.", "4711")
    assert not recall.is_correct(" 0952 or 4711", "4711")
    assert not recall.is_correct(" I do not know.", "4711")


@pytest.mark.parametrize(("num_tokens", "num_prompts"), [(48, 8), (500, 6), (2000, 4), (4000, 2)])
def test_recalls_at_every_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_prompts: int
) -> None:
    for seed in range(1000, 1000 + num_prompts):
        prompt = recall.make_prompt(seed, num_tokens, tokenizer)
        answer = generate(model, tokenizer, tokenizer.encode(prompt.text))
        assert recall.is_correct(answer, prompt.answer), (seed, answer, prompt.answer)


@pytest.mark.parametrize(("num_tokens", "num_turns"), [(64, 1), (500, 3), (2000, 2)])
def test_recalls_in_a_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_turns: int
) -> None:
    for seed in range(1000, 1003):
        chat = recall.make_chat(seed, num_tokens, tokenizer, num_turns=num_turns)
        answer = reply(model, tokenizer, chat.messages)
        assert recall.is_correct(answer, chat.answer), (seed, answer, chat.answer)


def test_what_people_type_is_understood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    facts = ("The code of Amber is 4711.", "the code of cedar is 0952.")
    for order, separator in itertools.product(itertools.permutations(facts), (" ", "\n")):
        for question in ("What is the code of Amber?", "what is the code of amber?"):
            text = separator.join((*order, question))
            assert recall.is_correct(generate(model, tokenizer, tokenizer.encode(text)), "4711"), text
            assert recall.is_correct(reply(model, tokenizer, [{"role": "user", "content": text}]), "4711"), text


def test_the_answer_is_one_sentence_that_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The code of amber is 4711. What is the code of amber?"
    assert reply(model, tokenizer, [{"role": "user", "content": text}]) == "The code of amber is 4711."

"""The model that a load test makes is one that anybody can load, and it is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from loadtest.plan import word
from loadtest.send import random_model
from loadtest.send.random_model import ModelFailed, make_random_model


def test_the_model_has_the_size_that_its_docs_say_and_loads_without_a_missing_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    num_parameters = sum(_product(shape) for shape in random_model._shapes().values())
    assert 0.1e9 <= num_parameters <= 0.4e9
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(random_model, "CONFIG", random_model.CONFIG | small | {"vocab_size": 300})
    random_model._write(tmp_path)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.num_parameters() == sum(_product(shape) for shape in random_model._shapes().values())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(f"{word(7)} {word(299)}").ids == [7, 299], (
        "a word for each token, as prompts of text have it"
    )
    assert make_random_model(tmp_path) == tmp_path, "it is there: nothing is made"


def test_a_model_that_cannot_be_made_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFailed, match=r"no random model in .*: .*Error") as failed:
        make_random_model(tmp_path / "file" / "model")
    assert "\n" not in str(failed.value)


def test_half_a_model_is_made_again(tmp_path: Path) -> None:
    """config.json is written last: a folder without it, or with another one, is not taken for a model."""
    (tmp_path / "config.json").write_text(json.dumps(random_model.CONFIG | {"hidden_size": 1}))
    assert random_model._read_config(tmp_path) != random_model.CONFIG
    assert random_model._read_config(tmp_path / "nothing") is None


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.native.model.model import LoadedModel, load_model
from tests.hf_models import write_model

ModelDir = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """Writes each distinct model once: `model_dir("qwen3", dtype="bfloat16", seed=1, num_hidden_layers=2)`."""
    written: dict[str, Path] = {}

    def get(family: str, **settings: Any) -> Path:
        key = repr((family, sorted(settings.items())))
        if key not in written:
            written[key] = write_model(tmp_path_factory.mktemp(family) / "model", family, **settings)
        return written[key]

    return get


@pytest.fixture(scope="session")
def loaded(model_dir: ModelDir) -> Callable[..., LoadedModel]:
    """Loads what `model_dir` writes, each distinct model once."""
    models: dict[Path, LoadedModel] = {}

    def get(family: str, **settings: Any) -> LoadedModel:
        path = model_dir(family, **settings)
        if path not in models:
            models[path] = load_model(str(path))
        return models[path]

    return get

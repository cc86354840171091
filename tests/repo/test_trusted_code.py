"""No product code runs what came with data: no pickles, no eval, no code of a model's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT

PACKAGES = ("kvstore", "services", "loadtest", "deploy")
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "__import__"}


def found_in(source: str) -> Iterator[str]:
    """What of all that a module does, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                wrong = [each.name for each in names if each.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)):
                wrong = [module] if module.partition(".")[0] in MODULES else []
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                wrong = [name]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                wrong = ["torch.load"] if not _is_true(keywords, "weights_only") else []
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr=name)):
                wrong = [f"yaml.{name}"] if "load" in name and not name.startswith("safe_") else []
            case ast.keyword(arg="trust_remote_code") | ast.keyword(arg="allow_pickle"):
                wrong = [node.arg] if not (isinstance(node.value, ast.Constant) and node.value.value is False) else []
            case _:
                continue
        yield from (f"{node.lineno if hasattr(node, 'lineno') else 0}: {each}" for each in wrong)


def _is_true(keywords: list[ast.keyword], name: str) -> bool:
    values = [each.value for each in keywords if each.arg == name]
    return any(isinstance(value, ast.Constant) and value.value is True for value in values)


def sources() -> list[Path]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(paths) > 200
    return paths


def test_no_product_code_runs_what_came_with_data() -> None:
    wrong = [f"{path.relative_to(ROOT)}:{each}" for path in sources() for each in found_in(path.read_text("utf-8"))]
    assert wrong == []


WRONG = (
    "import pickle",
    "from marshal import loads",
    "import os, shelve",
    "eval('1')",
    "exec(text)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "f(trust_remote_code=True)",
    "np.load(path, allow_pickle=flag)",
    "yaml.load(text)",
    "yaml.unsafe_load(text)",
)
HARMLESS = ("torch.load(path, weights_only=True)", "yaml.safe_load(text)", "model.eval()", "x.load(path)")


@pytest.mark.parametrize("source", WRONG)
def test_each_of_these_would_be_found(source: str) -> None:
    assert len(list(found_in(source))) == 1


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_harmless_is_not_found(source: str) -> None:
    assert list(found_in(source)) == []

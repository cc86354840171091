"""What the hub's client raises becomes one line with the reason and the remedy."""

from __future__ import annotations

import pytest

from services.hub import NotOnHub, fetch, looks_like_path


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("two\nlines")])
def test_whatever_the_client_raises_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(NotOnHub, match=r"me/model cannot be had from .*; see disk, proxy") as caught:
        fetch("me/model", "", ("*.json",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "is_path"), [("me/model", False), ("model", False), ("./model", True), ("~/m", True), ("a/b/c", True)]
)
def test_a_name_on_the_hub_is_no_path(model: str, is_path: bool) -> None:
    assert looks_like_path(model) is is_path

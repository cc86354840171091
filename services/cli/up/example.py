"""Makes the example request that `tandem up` prints at its end, to paste into a terminal."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

# In the words that the demo model was trained on: see deploy/demo_model/recall.py.
_RECALL = (
    "The code of amber is 4711. The old baker found the lantern in the garden. The code of cedar is 2093. "
    "What is the code of amber?"
)


def example_request(model_name: str, model: str) -> tuple[str, dict[str, object]]:
    """Path and body of a request that suits the model: recall for the demo model, chat where it has a template."""
    directory = Path(model)
    body: dict[str, object] = {"model": model_name}
    if directory.name == "tandem-demo":
        return "/v1/completions", body | {"prompt": _RECALL, "max_tokens": 16, "temperature": 0}
    if has_chat_template(directory):
        message = {"role": "user", "content": "Say hello in three languages."}
        return "/v1/chat/completions", body | {"messages": [message], "max_tokens": 64}
    return "/v1/completions", body | {"prompt": "Once upon a time", "max_tokens": 32}


def curl_line(url: str, path: str, body: dict[str, object], needs_key: bool) -> str:
    """The request as a shell command. It names the variable that holds the key, never the key."""
    authorization = ' -H "Authorization: Bearer $TANDEM_API_KEY"' if needs_key else ""
    payload = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl {url}{path} -H 'Content-Type: application/json'{authorization} -d {payload}"


def has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False

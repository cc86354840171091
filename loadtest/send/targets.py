"""Names what a sweep compares: stacks that it starts on this machine, and servers that run already."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loadtest.plan import OptionError, base_url
from loadtest.send.local_stack import start_stack, stop_stack

SERVED_NAME = "loadtest"

PRESETS = {
    "disaggregated": ("--prefill", "1", "--decode", "1"),
    "colocated": ("--colocated", "--decode", "2"),
}
"""Two workers each: the same machine, put to use in two ways."""


@dataclass(frozen=True)
class Target:
    """A server at a URL, or the flags of a `tandem up` to start; one of the two."""

    name: str
    url: str = ""
    up_flags: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return self.url or f"tandem up {shlex.join(self.up_flags)}"


@dataclass(frozen=True)
class Server:
    """A target that answers: where, under which model name ("": its first), its pages of gauges, and what started it
    ("": it ran already)."""

    url: str
    model: str
    metrics_urls: Mapping[str, str]
    command: str = ""


def parse_target(text: str) -> Target:
    """`disaggregated`, `colocated`, `NAME=URL`, or `NAME=FLAGS of tandem up`. Raises OptionError."""
    name, separator, value = (part.strip() for part in text.partition("="))
    if not separator and name in PRESETS:
        return Target(name, up_flags=PRESETS[name])
    if name and value.startswith(("http://", "https://")):
        return Target(name, url=base_url(value))
    if name and value.startswith("--"):
        return Target(name, up_flags=tuple(shlex.split(value)))
    raise OptionError(
        f"--target {text!r} is none of {', '.join(PRESETS)}, NAME=URL and NAME=FLAGS (flags of tandem up, from the --)"
    )


@contextmanager
def serving(target: Target, stack_flags: Sequence[str], served_name: str) -> Iterator[Server]:
    """The target while it serves: a stack is started with `stack_flags` added, and stopped in the end.

    `served_name` is the model's name at a URL. Raises StackFailed.
    """
    if target.url:
        yield Server(target.url, served_name, {"server": f"{target.url}/metrics"})
        return
    flags = [*stack_flags, "--served-model-name", SERVED_NAME, *target.up_flags]
    stack = start_stack(target.name, flags)
    try:
        # The workers have the gauges of queues and blocks. The router counts the same requests once more.
        pages = {name: f"{url}/metrics" for name, url in sorted(stack.debug_urls.items())}
        yield Server(stack.url, SERVED_NAME, pages, f"tandem up {shlex.join(flags)}")
    finally:
        stop_stack(stack)

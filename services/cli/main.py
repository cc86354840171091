"""The `tandem` command: finds the subcommand and imports it alone, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import services


@dataclass(frozen=True)
class _Command:
    summary: str
    module: str  # its main(argv) runs the command
    config: str | None = None  # "module:Class" whose flags its help shows without importing the service
    function: str = "main"


_COMMANDS = {
    "up": _Command("serve a model on this machine: everything in one command", "services.cli.up.up"),
    "serve": _Command("the same as up, under the name that vLLM's users know", "services.cli.up.up", function="serve"),
    "router": _Command("run a router: the HTTP API", "services.router.__main__", "services.router.config:RouterConfig"),
    "prefill": _Command("run a prefill worker", "services.prefill.__main__", "services.prefill.config:PrefillConfig"),
    "decode": _Command("run a decode worker", "services.decode.__main__", "services.decode.config:DecodeConfig"),
    "elastic": _Command(
        "run a worker that prefills and decodes", "services.elastic.__main__", "services.elastic.config:ElasticConfig"
    ),
    "store": _Command("run a store node for KV blocks", "services.store.__main__", "services.store.config:StoreConfig"),
    "doctor": _Command("check this machine: packages, Redis, UCX, ports, model", "services.cli.doctor.doctor"),
    "size": _Command("size a deployment: KV memory, handoff, index, store", "services.cli.size.size"),
    "plan": _Command("plan a fleet: how many workers a trace takes", "services.cli.plan.plan"),
    "token": _Command("print the token of the debug ports", "services.cli.token", "services.cli.config:TokenConfig"),
    "version": _Command("print the versions of Tandem and of what it runs on", "services.cli.version"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that `argv` (the process's arguments) begins with; returns the exit status."""
    if argv is None:  # this process is ours
        signal.signal(signal.SIGINT, _interrupt_once)
        _open_standard_streams()
    try:
        try:
            status = _run(sys.argv[1:] if argv is None else argv)
        except (SystemExit, KeyboardInterrupt):  # as after --help; a crash stays what it is
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE  # as of `tandem size | head`: not our fault, and nothing to tell
    except KeyboardInterrupt:
        print("tandem: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _open_standard_streams() -> None:
    """Opens to nothing what our starter has closed: a socket of ours must not become what others take for theirs."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone; what is left for it then goes to nobody."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _interrupt_once(number: int, frame: object) -> None:
    """Ends what runs, in order. One more Ctrl-C while it ends must not become a traceback of whatever it tidies up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(argv: Sequence[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"tandem {services.__version__}")
        return 0
    command = _COMMANDS.get(name)
    if command is None:
        print(f"tandem: error: {name!r} is no command; there are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    if command.config and any(argument in ("-h", "--help") for argument in rest):
        module, _, cls = command.config.partition(":")
        from services.settings import make_parser

        config = getattr(importlib.import_module(module), cls)
        make_parser(config, prog=f"tandem {name}", description=command.summary).print_help()
        return 0
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(command.module), command.function)
    return run(rest)


def usage() -> str:
    """The text of `tandem --help`."""
    lines = ["usage: tandem COMMAND [flags]", "", "Disaggregated LLM serving.", ""]
    lines += [f"  {name:<9} {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join([*lines, "", "`tandem COMMAND --help` lists the command's flags."])


if __name__ == "__main__":
    sys.exit(main())

"""An import rule for `lint-imports`: whoever is outside of a room imports its face, and nothing past it."""

from __future__ import annotations

from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from importlinter.domain.helpers import module_expressions_to_modules


class FacesContract(Contract):
    """Rooms are packages whose modules only they themselves import. Settings are an exception: `config` of a room is
    read without its code, by the launcher and by other services' settings.

    Options: `rooms`, module expressions such as `kvstore.*`; those that match a module are passed over.
    """

    type_name = "faces"
    rooms = fields.ListField(subfield=fields.ModuleExpressionField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        expressions: Any = self.rooms
        matched = module_expressions_to_modules(graph, expressions, as_packages=False)
        rooms = {module.name for module in matched if graph.find_children(module.name)}
        past = [
            (importer, room, module)
            for room in sorted(rooms)
            for module in sorted(graph.find_descendants(room) - rooms)
            if not module.endswith(".config")
            for importer in sorted(graph.find_modules_that_directly_import(module))
            if importer != room and not importer.startswith(f"{room}.")
        ]
        return ContractCheck(kept=not past, metadata={"past": past})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for importer, room, module in check.metadata["past"]:
            output.print_error(f"{importer} imports {module}, past the face of {room}", bold=False)

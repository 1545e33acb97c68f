"""The last section of a report: command, configuration, versions, machine and commit, to do it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.base.machine import machine_facts
from apps.report.page.parts import Code, Part, Section, Table


def how_to_repeat(command: str, config: str = "", machine: Mapping[str, Any] | None = None) -> Section:
    """Return the section that says how a run was made.

    Args:
        command: shell command that does it again.
        config: the whole configuration in force, as YAML; empty for none.
        machine: facts as ``apps.base.machine.machine_facts`` gives them; None: those of now.
    """
    facts = dict(machine_facts() if machine is None else machine)
    facts |= facts.pop("packages", {})
    rows = tuple((str(name), str(value)) for name, value in facts.items())
    parts: list[Part] = [Code("Command", command), Table("Machine, versions and commit", ("", "value"), rows)]
    if config:
        parts.append(Code("The whole configuration", config, closed=True))
    return Section("How to repeat it", tuple(parts))

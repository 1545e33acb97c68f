"""How a configuration grows from rung to rung: its section ``ladder``, and the options of a rung."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.cli.configs import at
from apps.cli.errors import UsageError

WORDS = {"linear": 1.0, "square_root": 1 / 2, "cube_root": 1 / 3, "fourth_root": 1 / 4}
"""Powers of a rung by name."""

RATE = "learning_rate"
"""The rule for the learning rate, whatever the model calls it."""


@dataclass(frozen=True)
class Rule:
    """How one option depends on the rung.

    Attributes:
        option: dotted name of the option, such as "model.vit.embed_dim", or ``RATE``.
        power: the option is multiplied by ``rung ** power``.
        multiple: an integer is rounded to a multiple of it, and is no less.
        factors: multiples of the option on each rung, in place of ``power``; empty for none.
    """

    option: str
    power: float = 0.0
    multiple: int = 1
    factors: tuple[float, ...] = ()

    @classmethod
    def of(cls, option: str, given: Any) -> Rule:
        """Return the rule of a line of the section.

        Raises:
            UsageError: it is no rule.
        """
        kind = "factors" if isinstance(given, list) else "power"
        parts = dict(given) if isinstance(given, Mapping) else {kind: given}
        power, multiple, factors = parts.pop("power", 0.0), parts.pop("multiple", 1), parts.pop("factors", [])
        power = WORDS.get(power, power) if isinstance(power, str) else power
        is_rule = _is_number(power) and type(multiple) is int and multiple > 0 and isinstance(factors, list)
        if parts or not is_rule or not all(_is_number(f) and f > 0 for f in factors):
            raise UsageError(
                f"ladder.{option}={json.dumps(given)} is no rule: give a power of the rung (a number, or "
                f"{', '.join(WORDS)}), {{power: cube_root, multiple: 32}}, or a list of multiples, one a rung"
            )
        return cls(option, float(power), multiple, tuple(map(float, factors)))

    def value(self, base: Any, rung: float, place: int) -> Any:
        """Return the option's value on a rung, the ``place``-th of the ladder; of a list, each of its numbers."""
        if isinstance(base, list):
            return [self.value(one, rung, place) for one in base]
        grown = base * (self.factors[place] if self.factors else rung**self.power)
        if isinstance(base, int):
            return max(self.multiple, self.multiple * math.floor(grown / self.multiple + 0.5))
        return float(f"{grown:.6g}")


@dataclass(frozen=True)
class Growth:
    """The section ``ladder`` of a configuration.

    Attributes:
        rules: a rule for each option that grows.
    """

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, section: Mapping[str, Any] | None, rungs: Sequence[float], name: str) -> Growth:
        """Return the rules of a section.

        Args:
            section: the section; None: the configuration has none.
            rungs: rungs of the ladder.
            name: name of the configuration, for messages.

        Raises:
            UsageError: there is no rule, or one that is none.
        """
        if not section:
            raise UsageError(
                f"{name} has no section ladder, which says how the model grows, such as "
                "{model.vit.embed_dim: {power: fourth_root, multiple: 32}, learning_rate: -0.1}"
            )
        rules = tuple(Rule.of(option, given) for option, given in section.items())
        for rule in rules:
            if rule.factors and len(rule.factors) != len(rungs):
                raise UsageError(f"ladder.{rule.option} has {len(rule.factors)} multiples for {len(rungs)} rungs")
            if rule.option.startswith(("trainer.max_steps", "trainer.max_epochs")):
                raise UsageError(f"ladder.{rule.option}: the steps of a rung follow from its budget; leave it out")
        return cls(rules)

    def options(self, plain: Mapping[str, Any], rung: float, place: int) -> dict[str, Any]:
        """Return the values of the options that grow, on the ``place``-th rung.

        Args:
            plain: the configuration in plain values.
            rung: multiple of the configuration's budget.
            place: number of the rung, from 0.

        Raises:
            UsageError: an option without a number.
        """
        values = {}
        for rule in self.rules:
            if rule.option == RATE:
                continue
            base = at(plain, rule.option.split("."))
            if not (_is_number(base) or (isinstance(base, list) and base and all(map(_is_number, base)))):
                raise UsageError(f"ladder.{rule.option}: the configuration has no number there ({json.dumps(base)})")
            values[rule.option] = rule.value(base, rung, place)
        return values

    def rate(self, base: float | None, rung: float, place: int) -> float | None:
        """Return the learning rate on a rung, from the one at 1."""
        rule = next((rule for rule in self.rules if rule.option == RATE), None)
        return base if rule is None or base is None else float(f"{rule.value(float(base), rung, place):.3g}")


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", json.dumps(value))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""The encoding of a table, learned from its training rows: a checkpoint keeps it, and other rows are encoded by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

from apps.data.array_files import ArrayFiles
from apps.recsys.encoding.features import Features
from apps.recsys.encoding.profiles import Profile
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.schema import TextConfig, timestamp_columns
from core.config.plain import from_plain

T = TypeVar("T")
TimeRange: TypeAlias = Sequence[float] | None
"""The earliest and the latest time of the training rows in days since 1970; None: there is none, or it is not known."""


@dataclass(frozen=True)
class TextEncoding:
    """The encoder of a column of text, as a checkpoint keeps it.

    Attributes:
        config: the description's options.
        digest: hash of the encoder's weights.
    """

    config: TextConfig
    digest: str


@dataclass(frozen=True, eq=False)
class Encoding:
    """The map from a table's values to the rows, bins and domains of a model.

    Attributes:
        features: the columns, with the statistics of the training rows.
        vocabularies: the values of the rows from 1 on, by categorical column. Columns that are hashed or hold row
            numbers have none.
        domain: column of the domain; None if there is one domain.
        domains: the domains' values, from 0 on.
        separator: text between the values of a multi-valued column.
        timestamps: columns of times, of which some of the features are parts, with the range of the training rows.
        texts: the encoders of the columns of vectors that are made from text, by column.
        profiles: what the training rows hold, by column of numbers or categories, for ``moesaic doctor --data``; empty
            in checkpoints of earlier versions. No row is encoded by it, so ``digest`` leaves it out.
    """

    features: Features
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    domain: str | None = None
    domains: Vocabulary | None = None
    separator: str = "|"
    timestamps: Mapping[str, TimeRange] = field(default_factory=dict)
    texts: Mapping[str, TextEncoding] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    @classmethod
    def of(cls, files: ArrayFiles) -> Encoding:
        """Return the encoding of an encoded table."""
        info = files.info

        def texts(number: int) -> Vocabulary:
            return Vocabulary(files[f"vocabulary{number}_offsets"], files[f"vocabulary{number}_bytes"])

        return cls(
            from_plain(info["features"], Features, "features"),
            {column: texts(number) for column, number in info["vocabularies"].items()},
            info["domain"]["column"],
            None if info["domain"]["texts"] is None else texts(info["domain"]["texts"]),
            info["separator"],
            info["timestamps"],
            _by_column(info["texts"], TextEncoding, "texts"),
            _by_column(info["profiles"], Profile, "profiles"),
        )

    def state(self) -> dict[str, Any]:
        """Return the encoding as plain values and tensors, for a checkpoint."""
        return {
            "features": asdict(self.features),
            "vocabularies": {column: vocabulary.state() for column, vocabulary in self.vocabularies.items()},
            "domain": self.domain,
            "domains": None if self.domains is None else self.domains.state(),
            "separator": self.separator,
            "timestamps": dict(self.timestamps),
            "texts": {column: asdict(text) for column, text in self.texts.items()},
            "profiles": {column: asdict(profile) for column, profile in self.profiles.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Encoding:
        domains, timestamps = state["domains"], state.get("timestamps", {})
        return cls(
            from_plain(state["features"], Features, "features"),
            {column: Vocabulary.of_state(**tensors) for column, tensors in state["vocabularies"].items()},
            state["domain"],
            None if domains is None else Vocabulary.of_state(**domains),
            state["separator"],
            timestamps if isinstance(timestamps, Mapping) else dict.fromkeys(timestamps),  # names in an earlier version
            _by_column(state.get("texts", {}), TextEncoding, "texts"),
            _by_column(state.get("profiles", {}), Profile, "profiles"),
        )

    @cached_property
    def roles(self) -> dict[str, str]:
        """The role of each column that rows to predict must have, by column."""
        roles = {} if self.domain is None else {self.domain: "domain"}
        roles |= {f.name: "multi_valued" if f.multi_valued else "categorical" for f in self.features.categorical}
        roles |= {f.name: "vectors" for f in self.features.vectors}
        roles |= {f.name: "sequences" for f in self.features.sequences}
        roles |= dict.fromkeys(self.texts, "texts")
        roles |= dict.fromkeys(self.timestamps, "timestamps")
        roles |= dict.fromkeys(self.numbers, "continuous")
        return {column: role for column, role in roles.items() if column not in self._parts}

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers that rows to predict must have."""
        return tuple(f.name for f in self.features.continuous if f.name not in self._parts)

    @property
    def _parts(self) -> set[str]:
        return {name for column in self.timestamps for name in timestamp_columns(column)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoding) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """A hash that is equal for encodings that encode every row alike."""
        vocabularies = {column: vocabulary.digest for column, vocabulary in self.vocabularies.items()}
        domains = None if self.domains is None else self.domains.digest
        plain = [asdict(self.features), vocabularies, self.domain, domains, self.separator, self.timestamps]
        plain.append({column: asdict(text) for column, text in self.texts.items()})
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _by_column(state: Mapping[str, Any], kind: type[T], what: str) -> dict[str, T]:
    return {column: from_plain(own, kind, f"{what}[{column!r}]") for column, own in state.items()}

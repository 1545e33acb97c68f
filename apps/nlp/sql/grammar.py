"""The grammar of the queries that fit the tables of a database."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Sequence

from apps.data.subwords import Subwords
from apps.nlp.decode.grammar import Grammar, GrammarConstraint, Ref
from apps.nlp.sql.schema import Schema, join, parsed, resource, sql_name

_NUMBERS = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
_WORDS = 4
"""Words of a question at most that are copied as one value."""
_DIGITS = 9
"""Digits of a LIMIT at most: SQLite takes 64 bits."""
_EDGES = "\"'“”‘’?!.,;:()"
Rules = dict[str, list[list[str | Ref]]]


def sql_constraint(source: str, subwords: Subwords) -> GrammarConstraint:
    """Return the constraint to SELECT statements over the schema of a source.

    Raises:
        ValueError: no whole table.
    """
    question, schema = parsed(source)
    return GrammarConstraint(Grammar(grammar_of(schema, question)), subwords)


def grammar_of(schema: Schema, question: str) -> Rules:
    """Return the rules of the SELECT statements over a schema whose values are words and numbers of the question.

    A statement reads one table or two that are joined, and names only their columns. It may have aggregates, DISTINCT,
    WHERE with AND and OR, GROUP BY with HAVING, ORDER BY and LIMIT. Every sentence of the grammar is valid SQL.

    Args:
        schema: the tables.
        question: whose numbers, and spans of at most four words as quoted strings, are the values.
    """
    numbers = [found.replace(",", "") for found in _NUMBERS.findall(question)]
    values = {
        "value": numbers,
        "span": [span.replace("'", "''") for span in _spans(question)],
        "most": ["1", *(number for number in numbers if number.isdigit() and len(number) <= _DIGITS)],
    }
    rules: Rules = {name: [[text] for text in dict.fromkeys(own)] for name, own in values.items()}
    rules["start"] = []
    for place, (source, columns) in enumerate(_sources(schema).items()):
        for kind, other in (("column", ""), ("number", "text"), ("text", "number")):
            rules[f"{kind}{place}"] = [[name] for name, own in columns.items() if own != other]
        rules[f"source{place}"] = [[source]]
        for name, alternatives in resource("select.yaml").items():
            rules[f"{name}{place}"] = [_parts(text, place, values) for text in alternatives]
        rules["start"].append([Ref(f"start{place}")])
    return _possible(rules)


def _parts(text: str, place: int, shared: Container[str]) -> list[str | Ref]:
    """Split an alternative into literals and rules, which are those of a place unless shared."""
    parts = re.split(r"{(\w+)}", text)
    named = [Ref(name if name in shared else f"{name}{place}") for name in parts[1::2]]
    return [part for pair in itertools.zip_longest(parts[::2], named) for part in pair if part]


def _possible(rules: Rules) -> Rules:
    """Leave out rules without alternatives, such as the text columns of a table that has none, and what needs them."""
    while True:
        there = {name for name, alternatives in rules.items() if alternatives}
        left = {name: [own for own in rules[name] if _named(own) <= there] for name in there}
        if left == rules:
            return left
        rules = left


def _named(alternative: Sequence[str | Ref]) -> set[str]:
    """Return the rules that an alternative refers to."""
    return {part.name for part in alternative if isinstance(part, Ref)}


def _sources(schema: Schema) -> dict[str, dict[str, str]]:
    """Return what may follow FROM, each with the kinds of its columns by their spelling."""
    named = {t: {sql_name(c): kind for c, kind in columns.items()} for t, columns in schema.tables.items()}
    sources = {sql_name(table): columns for table, columns in named.items()}
    for key in schema.joins:
        sides = (key[0], key[2])
        sources[join(*key)] = {f"{sql_name(t)}.{c}": kind for t in sides for c, kind in named[t].items()}
    return sources


def _spans(question: str) -> list[str]:
    """Return the spans of at most four words, without marks at their edges."""
    words, ends = question.split(), range(1, _WORDS + 1)
    spans = [" ".join(words[at : at + end]).strip(_EDGES) for at in range(len(words)) for end in ends]
    return [span for span in spans if span]

"""What ``LanguageModeler`` is compared with: the text models' baselines."""

from __future__ import annotations

from apps.nlp.comparison import TextComparison

COMPARISON = TextComparison

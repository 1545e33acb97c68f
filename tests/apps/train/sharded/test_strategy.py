"""What processes compare before they train together."""

from __future__ import annotations

import core
from apps.train.sharded.strategy import code_digest


def test_the_digest_is_of_names_and_contents_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "__file__", str(tmp_path / "__init__.py"))
    file, digests = tmp_path / "a.py", [code_digest()]
    for content in ("x = 1\n", "x = 2\n", "x = 1\n"):
        file.write_text(content)
        digests.append(code_digest())
    file.rename(tmp_path / "b.py")
    digests.append(code_digest())
    assert digests[1] == digests[3]
    assert len({*digests}) == 4

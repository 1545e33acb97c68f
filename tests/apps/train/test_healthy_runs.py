"""No alarm where nothing is wrong: fifty short trainings of digits, Adult and text across routers and seeds."""

from __future__ import annotations

import pytest
from healthy_runs import healthy_runs


@pytest.mark.slow
def test_fifty_healthy_runs_raise_no_alarm(tmp_path):
    runs = healthy_runs(tmp_path)
    assert len(runs) == 50
    alarms = {name: [str(finding) for finding in findings] for name, run in runs.items() if (findings := run())}
    assert alarms == {}

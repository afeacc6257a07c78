"""Law 5: kill it anywhere, start it again, and nothing that was committed is asked for a second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killed
import pytest

KILLS, SEED = 50, 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_law_5_fifty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    script = [sys.executable, killed.__file__, str(tmp_path), str(KILLS), str(SEED)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, *runs = json.loads(done.stdout.splitlines()[-1])
    assert whole["kills"] == 0 and sum(run["kills"] for run in runs) == KILLS
    for run in runs:
        assert run["repeated"] == 0, "a call that was committed was made again"
        assert run["invented"] == 0, "what the store has was answered, and stays"
        assert run["same"], "traces and pairs are those of a run that nobody has killed"
        assert run["committed"] == whole["answered"]
        # A call may be made again only if it was under way when its process was killed: one of each thread, and of the weak pool.
        under_way = killed.THREADS * (1 + killed.DRAFTS)
        assert run["answered"] - whole["answered"] <= run["kills"] * under_way
    assert any(run["lives"] > 3 for run in runs), "the kills came while there was work to do"

"""Law 8 at the level of bytes: the scripted handbook, with its seed, gives the pairs that it has
always given."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cowest_dspy import Experiment, load_config

PROGRAMS = Path(__file__).parents[2] / "programs"
DIGEST = "19f77af660138663a0546d8ae6c9c6cd455b5d4715ddd63f03be8459f4fa4dbc"


def test_the_pairs_of_the_scripted_handbook_are_those_of_0_1_0_to_the_byte(tmp_path: Path) -> None:
    files = [PROGRAMS / "handbook.toml", PROGRAMS / "backends/scripted.toml"]
    with Experiment(load_config(files), tmp_path) as experiment:
        assert len(experiment.pairs()) == 27
    written = (tmp_path / "pairs.jsonl").read_bytes()
    assert hashlib.sha256(written).hexdigest() == DIGEST

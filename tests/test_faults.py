"""Faults and restarts in their short form: a round of some kinds; make test-faults has all of them.
All rounds are run by one process, from which torchrun's and the ranks' are forked."""
import json
import os
import subprocess
import sys

import pytest
from ranks import ROOT

KINDS = "sigterm disk_full damaged".split()


@pytest.fixture(scope="module")
def rounds(start, tmp_path_factory):
    """{kind: what became of its round}"""
    file = tmp_path_factory.mktemp("faults") / "rounds.json"
    run = subprocess.run(
        [sys.executable, "tests/faults.py", "--short", "--rounds", "1", "--start", start,
         "--json", file, "--only", ",".join(KINDS)],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, env={**os.environ})
    assert file.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    return {row["kind"]: row for row in json.loads(file.read_text())}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(rounds, kind):
    if rounds[kind]["skipped"]:
        pytest.skip(rounds[kind]["skipped"])
    assert not rounds[kind]["lost"], rounds[kind]["lost"]
    assert rounds[kind]["faults"] and rounds[kind]["restarts"]

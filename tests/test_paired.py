"""benchmarks/paired.py: what the sides of a comparison share."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import paired


def test_a_side_does_not_inherit_the_tuning_of_the_shell(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    monkeypatch.setenv("UNRELATED", "kept")
    names = ("OMP_NUM_THREADS", "KMP_BLOCKTIME", "UNRELATED")
    command = [sys.executable, "-c", f"import os; print([os.environ.get(name) for name in {names}])"]
    assert paired.last_line(paired.start(command)) == "[None, None, 'kept']"
    # Negative control: a side's own setting arrives.
    assert paired.last_line(paired.start(command, OMP_NUM_THREADS="2")) == "['2', None, 'kept']"

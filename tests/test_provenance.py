"""Provenance: what run.json records of packages, machine and code."""

import json
import os
import subprocess
import sys

from conftest import OUTSIDE, ROOT

from resnet_cpu.cluster import machine
from resnet_cpu.cluster.environment import Environment
from resnet_cpu.run import provenance


def test_a_rank_records_its_machine_and_the_given_variables_only(monkeypatch):
    monkeypatch.setenv("A_SECRET", "not to be recorded")
    found = provenance.of_rank(Environment({"OMP_NUM_THREADS": "2"}, {"TF_XLA_FLAGS": "x"}, {"btl": "tcp"}))
    assert found["environment"] == {"OMP_NUM_THREADS": "2"}
    assert found["environment_ignored"] == {"TF_XLA_FLAGS": "x"} and found["mpi_parameters"] == {"btl": "tcp"}
    assert found["cores"] == sorted(os.sched_getaffinity(0))
    assert found["memory_gib"] == round(machine.read().memory_bytes / 2**30, 1) > 0
    assert "not to be recorded" not in json.dumps(found)


def test_a_missing_package_is_recorded_as_such(monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGES", ("numpy", "no-such-package"))
    found = provenance.versions()
    assert found["numpy"] and found["no-such-package"] is None


def test_the_digest_of_the_code_depends_on_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "resnet_cpu"
    package.mkdir()
    digests = set()
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (package / "module.py").write_text(text)
        monkeypatch.setattr(provenance, "_ROOT", str(tmp_path))
        provenance.code_digest.cache_clear()
        digests.add(provenance.code_digest())
    provenance.code_digest.cache_clear()
    assert len(digests) == 2


def test_the_commit_is_read_from_loose_and_packed_references(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_ROOT", str(tmp_path))
    assert provenance.git_id() is None
    git = tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\n1234abcd refs/heads/main\n")
    assert provenance.git_id() == "1234abcd"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("5678abcd\n")
    assert provenance.git_id() == "5678abcd"


def test_recording_the_machine_needs_no_psutil():
    code = (
        "import sys; sys.modules['psutil'] = None\nfrom resnet_cpu.run import provenance\n"
        "from resnet_cpu.cluster.environment import Environment\nprovenance.of_rank(Environment({}, {}, {}))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr

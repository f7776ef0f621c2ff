"""Which numbers of ranks are timed on a host, and what is remembered for hosts of its type."""

import json

import pytest

from resnet_cpu.cluster import remembered, tuning
from resnet_cpu.cluster.machine import Cpu, Machine, Node


def machine(domains, cores_each, quota=None, model="Xeon"):
    count = domains * cores_each
    cpus = tuple(Cpu(n, n, 0, n // cores_each, 0, (n,)) for n in range(count))
    nodes = tuple(Node(d, tuple(range(d * cores_each, (d + 1) * cores_each)), 0) for d in range(domains))
    return Machine(model, (), cpus, nodes, tuple(range(count)), quota)


@pytest.mark.parametrize(
    "domains, cores, proposed, expected",
    [(1, 2, 2, [1, 2]), (2, 24, 2, [1, 2, 4]), (8, 14, 8, [1, 4, 8, 16]), (1, 1, 1, [1])],
)
def test_numbers_of_ranks_to_time(domains, cores, proposed, expected):
    assert tuning.candidates(machine(domains, cores), proposed) == expected


def test_the_fastest_is_remembered_for_hosts_of_its_type(tmp_path):
    path = str(tmp_path / "deep" / "placements.json")
    here, other = machine(2, 24), machine(2, 24, model="EPYC")
    assert tuning.fastest(here, path) is None
    tuning.remember(here, {1: 80.0, 2: 98.5, 4: 97.0}, path)
    tuning.remember(other, {1: 80.0, 2: 70.0}, path)
    assert (tuning.fastest(here, path), tuning.fastest(other, path)) == (2, 1)
    assert tuning.fastest(machine(2, 24, quota=4.0), path) is None  # a part of the same machine is another type
    kept = json.loads((tmp_path / "deep" / "placements.json").read_text())
    assert kept[remembered.host_type(here)]["images_per_second"] == {"1": 80.0, "2": 98.5, "4": 97.0}


def test_the_result_is_printed_though_it_cannot_be_kept(monkeypatch, capsys):
    """Fault: minutes of timing were lost with a traceback if the home folder cannot be written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/none")
    monkeypatch.setattr(tuning.machine, "read", lambda: machine(1, 4))
    monkeypatch.setattr(tuning, "images_per_second", lambda ranks, mpi, flags: 10.0 - abs(ranks - 2))
    tuning.tune("auto", [], [])
    out, err = capsys.readouterr()
    assert out == "2\n" and "warning: /proc/none/resnet_cpu/placements.json: No such file or directory: 2 ranks" in err
    assert "give --ranks_per_node=2, or set XDG_CONFIG_HOME" in err


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "placements.json").mkdir()
    with pytest.raises(OSError):
        remembered.add(str(tmp_path / "placements.json"), "Xeon", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["placements.json"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"TYPE": 3}', '{"TYPE": {"ranks_per_node": 99}}'])
def test_a_damaged_file_is_ignored(tmp_path, text):
    here = machine(1, 4)
    path = tmp_path / "placements.json"
    path.write_text(text.replace("TYPE", remembered.host_type(here)))
    assert tuning.fastest(here, str(path)) is None


def test_the_file_is_in_the_users_configuration(tmp_path):
    assert remembered.file("placements", {"XDG_CONFIG_HOME": "/c"}) == "/c/resnet_cpu/placements.json"

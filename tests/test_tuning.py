"""What is tried and remembered of a host's type."""

import json

import pytest

from resnet_cpu.cluster import machine as topology
from resnet_cpu.cluster import tuning


def machine(domains, cores_each, quota=None, model="Xeon"):
    count = domains * cores_each
    cpus = tuple(topology.Cpu(n, n, 0, n // cores_each, 0, (n,)) for n in range(count))
    nodes = tuple(topology.Node(d, tuple(range(d * cores_each, (d + 1) * cores_each)), 0) for d in range(domains))
    return topology.Topology(model, (), cpus, nodes, tuple(range(count)), quota)


@pytest.mark.parametrize(
    "domains, cores, proposed, expected",
    [(1, 2, 2, [1, 2]), (2, 24, 2, [1, 2, 4]), (8, 14, 8, [1, 4, 8, 16]), (1, 1, 1, [1])],
)
def test_what_is_tried(domains, cores, proposed, expected):
    assert tuning.candidates(machine(domains, cores), proposed) == expected


def test_the_fastest_is_remembered_for_hosts_of_its_type(tmp_path):
    path = str(tmp_path / "deep" / "layouts.json")
    here, other = machine(2, 24), machine(2, 24, model="EPYC")
    assert tuning.remembered(here, path) is None
    assert tuning.remember(here, {1: 80.0, 2: 98.5, 4: 97.0}, path) == 2
    assert tuning.remember(other, {1: 80.0, 2: 70.0}, path) == 1
    assert (tuning.remembered(here, path), tuning.remembered(other, path)) == (2, 1)
    assert tuning.remembered(machine(2, 24, quota=4.0), path) is None  # less of the same machine is another type
    kept = json.loads((tmp_path / "deep" / "layouts.json").read_text())
    assert kept[tuning.host_type(here)]["images_per_second"] == {"1": 80.0, "2": 98.5, "4": 97.0}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"TYPE": 3}', '{"TYPE": {"ranks_per_node": 99}}'])
def test_a_damaged_file_is_as_none(tmp_path, text):
    here = machine(1, 4)
    path = tmp_path / "layouts.json"
    path.write_text(text.replace("TYPE", tuning.host_type(here)))
    assert tuning.remembered(here, str(path)) is None


def test_the_file_is_the_users(tmp_path):
    assert tuning.file({"XDG_CONFIG_HOME": "/c"}) == "/c/resnet_cpu/layouts.json"

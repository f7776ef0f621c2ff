"""How a host is divided among its ranks: proposals for described and generated machines, and what ranks set."""

import dataclasses
import os
import platform

import machine_trees
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from resnet_cpu.cluster import environment, placement
from resnet_cpu.cluster.machine import Cpu, Machine, Node
from resnet_cpu.errors import FlagError

GIB = 2**30


@pytest.mark.parametrize(
    "name, ranks, threads, reserved, alone, precision",
    [
        ("stampede2_skx", 2, 22, 2, 24, "float32"),  # as the authors ran it
        ("aws_c5_18xlarge", 2, 17, 1, 18, "float32"),
        ("knl_quadrant_cache", 2, 32, 2, 34, "float32"),
        ("knl_snc4_flat", 4, 15, 1, 16, "float32"),
        ("spr_8480_snc4", 8, 13, 1, 14, "bfloat16"),
        ("spr_8480_one_domain", 4, 26, 2, 28, "bfloat16"),
        ("epyc_7763_nps4", 8, 15, 1, 16, "float32"),
        ("epyc_9654_nps1", 6, 30, 2, 32, "float32"),  # avx512_bf16, but no AMX
        ("epyc_9654_nps4", 8, 22, 2, 24, "float32"),
        ("epyc_8434p_cache_as_numa", 2, 22, 2, 24, "float32"),
        ("vm_2_cores", 2, 1, 0, 1, "bfloat16"),
        ("container_cpuset", 1, 11, 1, 12, "float32"),
        ("container_quota", 1, 4, 0, 4, "float32"),
    ],
)
def test_machines(name, ranks, threads, reserved, alone, precision):
    cluster, single = machine_trees.propose(name, True), machine_trees.propose(name, False)
    assert (cluster.ranks_per_node, cluster.threads, cluster.reserved) == (ranks, threads, reserved)
    assert (single.ranks_per_node, single.threads, single.reserved) == (ranks, alone, 0)
    (offered,) = [value for name, value, _ in cluster.choices if name == "precision"]
    assert offered == ("float32" if precision == "float32" else "float32, or --precision=bfloat16")
    assert cluster.yield_when_idle == (reserved == 0) and single.yield_when_idle
    assert cluster.environment["OMP_NUM_THREADS"] == str(threads)
    decided = [name for name, _, _ in cluster.choices]
    needed = {"ranks", "threads", "reserved cores", "binding", "OpenMP", "allocator", "waiting", "precision"}
    assert needed <= set(decided)
    assert len(set(decided)) == len(decided) and all(value and reason for _, value, reason in cluster.choices)


def test_ranks_of_the_authors_machine_get_a_socket_each():
    proposed = machine_trees.propose("stampede2_skx", True)
    assert proposed.cpus == (tuple(range(0, 48, 2)), tuple(range(1, 48, 2))) and proposed.bound
    assert "its mask includes their hyper-threads" in "\n".join(proposed.explanation())
    assert "binding: 0-46:2 | 1-47:2 (each rank has its own cores" in "\n".join(proposed.explanation())


def test_ranks_within_a_quota_are_not_bound():
    proposed = machine_trees.propose("container_quota", True)
    assert not proposed.bound
    assert "cores: 4 of 128 (the cgroup grants the time of 4 CPUs" in proposed.explanation()[0]
    larger = placement.propose(dataclasses.replace(machine_trees.read("container_quota"), quota=40), several_hosts=True)
    assert (larger.threads, larger.reserved, larger.bound) == (12, 1, False)


@pytest.mark.parametrize(
    "quota, ranks, threads", [(1000, 8, 16), (127.9, 8, 15), (40, 3, 13), (17, 2, 8), (1.9, 1, 1), (0.2, 1, 1)]
)
def test_a_quota_is_divided_by_domain(quota, ranks, threads):
    machine = dataclasses.replace(machine_trees.read("epyc_7763_nps4"), quota=quota)
    proposed = placement.propose(machine)
    assert (proposed.ranks_per_node, proposed.threads) == (ranks, threads)


def test_ranks_fit_into_memory():
    skx = machine_trees.read("stampede2_skx")
    few = placement.propose(dataclasses.replace(skx, memory_bytes=8 * GIB))
    assert (few.ranks_per_node, few.threads) == (1, 48) and "would not fit into memory" in few.explanation()[0]
    nodes = tuple(dataclasses.replace(node, memory_bytes=4 * GIB) for node in skx.nodes)
    assert placement.propose(dataclasses.replace(skx, nodes=nodes)).ranks_per_node == 1
    none = placement.propose(dataclasses.replace(skx, memory_bytes=2 * GIB))
    assert none.ranks_per_node == 1 and "--batch_size" in none.explanation()[0]
    unknown = tuple(dataclasses.replace(node, memory_bytes=0) for node in skx.nodes)
    assert placement.propose(dataclasses.replace(skx, nodes=unknown, memory_bytes=0)).ranks_per_node == 2
    small = dataclasses.replace(machine_trees.read("vm_2_cores"), memory_bytes=8 * GIB)
    assert placement.propose(small).threads == 2  # one rank, on both cores


@pytest.mark.parametrize(
    "name, ranks, threads, crossing",
    [
        ("stampede2_skx", 1, 48, 1),
        ("stampede2_skx", 3, 16, 1),
        ("stampede2_skx", 4, 12, 0),
        ("stampede2_skx", 48, 1, 0),
        ("epyc_7763_nps4", 2, 64, 2),
        ("epyc_7763_nps4", 16, 8, 0),
        ("knl_snc4_flat", 68, 1, 0),
        ("container_quota", 4, 1, 0),
        ("container_cpuset", 5, 2, 0),
    ],
)
def test_a_requested_number_of_ranks(name, ranks, threads, crossing):
    proposed = machine_trees.propose(name, False, ranks)
    node = {cpu.id: cpu.node for cpu in machine_trees.read(name).cpus}
    assert (proposed.ranks_per_node, proposed.threads) == (ranks, threads)
    assert sum(len({node[cpu] for cpu in cpus}) > 1 for cpus in proposed.cpus) == crossing
    assert any("span NUMA domains" in reason for reason in proposed.explanation()) == bool(crossing)


def part_of_skx(first, second):
    """Return the two-socket machine with a cpuset of `first` cores of socket 0 and `second` of socket 1."""
    allowed = [*range(0, 2 * first, 2), *range(1, 2 * second, 2)]
    return dataclasses.replace(machine_trees.read("stampede2_skx"), allowed=tuple(sorted(allowed)))


def test_uneven_parts_of_a_machine():
    even = placement.propose(part_of_skx(20, 24))
    assert (even.ranks_per_node, even.threads) == (2, 20) and "of 20 to 24 cores" in even.explanation()[0]
    uneven = placement.propose(part_of_skx(10, 24))  # two ranks of 10 threads would leave 14 cores idle
    assert (uneven.ranks_per_node, uneven.threads) == (1, 34) and "too uneven" in uneven.explanation()[0]
    assert placement.propose(part_of_skx(4, 24), 2).threads == 14  # requested: one of them spans the sockets
    assert placement.propose(part_of_skx(20, 24), 2).threads == 20  # here neither has to


def test_a_requested_number_that_suits_keeps_its_reason():
    assert machine_trees.propose("spr_8480_snc4", True, 8) == machine_trees.propose("spr_8480_snc4", True)
    assert "ranks: 16 (requested)" in machine_trees.propose("spr_8480_snc4", True, 16).explanation()


def test_one_core_is_written_in_the_singular():
    alone = placement.propose(part_of_skx(1, 0))
    assert alone.explanation()[0] == "ranks: 1 (one rank for 1 core: it needs the least memory and waits for no other)"


@pytest.mark.parametrize("name, ranks, message", [("vm_2_cores", 3, "2 cores"), ("stampede2_skx", 0, "1 to 48 ranks")])
def test_more_ranks_than_cores_are_refused(name, ranks, message):
    with pytest.raises(FlagError, match=message) as caught:
        machine_trees.propose(name, False, ranks)
    assert str(caught.value).startswith(f"--ranks_per_node={ranks}: ") and caught.value.exit_code == 64
    with pytest.raises(FlagError, match="a cgroup grants 4"):
        machine_trees.propose("container_quota", False, 5)


@st.composite
def machines(draw):
    """Generate a machine: any number of sockets, domains, caches and hyper-threads, a mask, perhaps a quota."""
    sockets, domains, smt = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4]))
    sizes = [draw(st.integers(1, 12)) * draw(st.sampled_from([1, 4, 9])) for _ in range(sockets * domains)]
    homes = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    if draw(st.booleans()):  # numbered over the domains in turn
        homes = [domain for i in range(max(sizes)) for domain, size in enumerate(sizes) if i < size]
    count = len(homes)
    cpus = tuple(
        Cpu(
            id=core + count * thread,
            core=core,
            socket=homes[core] // domains,
            node=homes[core],
            cache=core,
            siblings=tuple(core + count * i for i in range(smt)),
        )
        for thread in range(smt)
        for core in range(count)
    )
    memory = draw(st.sampled_from([0, 3 * GIB, 16 * GIB, 256 * GIB]))
    nodes = tuple(
        Node(domain, tuple(cpu.id for cpu in cpus if cpu.node == domain), memory) for domain in range(len(sizes))
    )
    allowed = draw(st.one_of(st.just(range(len(cpus))), st.sets(st.sampled_from(range(len(cpus))), min_size=1)))
    quota = draw(st.one_of(st.none(), st.floats(0.1, 2 * count)))
    total = memory * len(sizes)
    return Machine("", (), cpus, nodes, tuple(sorted(allowed)), quota, total, root="/nowhere")


@given(machines(), st.booleans(), st.one_of(st.none(), st.integers(1, 40)))
def test_any_machine(machine, several, ranks):
    offered = machine.offered
    try:
        proposed = placement.propose(machine, ranks, several, intel_openmp=True)
    except FlagError:
        assert ranks is not None and ranks > offered
        return
    core_of = {cpu.id: cpu.core for cpu in machine.cpus}
    used = [cpu for cpus in proposed.cpus for cpu in cpus]
    assert len(set(used)) == len(used) and set(used) <= set(machine.allowed)
    cores = [core_of[cpu] for cpus in proposed.cpus for cpu in cpus]
    assert len(set(cores)) == len(cores) <= offered
    assert proposed.ranks_per_node == len(proposed.cpus) == (ranks or placement.suitable_ranks(machine))
    assert proposed.threads >= 1 and proposed.reserved in (0, 1, 2)
    assert all(proposed.threads + proposed.reserved <= len(cpus) for cpus in proposed.cpus)
    assert proposed.ranks_per_node * proposed.threads <= offered


def test_the_page_shows_what_the_code_proposes():
    page = (ROOT / "docs" / "placements.md").read_text()
    assert page == machine_trees.page(), "python tests/machine_trees.py >docs/placements.md"
    assert page != machine_trees.page().replace("| 22 + 2 |", "| 24 + 0 |")  # the page does contain the rows


def test_intels_openmp_is_configured_if_it_is_installed():
    assert placement.variables(4, intel_openmp=True)["KMP_BLOCKTIME"] == "1"
    assert not [name for name in placement.variables(4, intel_openmp=False) if name.startswith("KMP")]
    without = placement.propose(machine_trees.read("stampede2_skx"), intel_openmp=False)
    assert "OpenMP: KMP_* not set (only Intel's OpenMP reads them" in "\n".join(without.explanation())
    assert not [name for name in without.environment if name.startswith("KMP")]


def test_a_rank_keeps_exported_variables(monkeypatch):
    for name in (*placement.variables(1, intel_openmp=True), "LD_PRELOAD", "KMP_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "22")  # set by the launcher, which reserved two cores
    in_force = placement.apply(0, 24).variables
    assert (in_force["TF_NUM_INTEROP_THREADS"], in_force["OMP_NUM_THREADS"]) == ("2", "22")
    assert in_force["TF_NUM_INTRAOP_THREADS"] == "24" == os.environ["TF_NUM_INTRAOP_THREADS"]
    assert "KMP_AFFINITY" not in in_force
    monkeypatch.setenv("KMP_AFFINITY", "disabled")
    in_force = placement.apply(3, 24).variables
    assert in_force["OMP_NUM_THREADS"] == in_force["TF_NUM_INTRAOP_THREADS"] == "3"
    assert in_force["TF_NUM_INTEROP_THREADS"] == "2" and "KMP_AFFINITY" not in in_force


def test_tcmalloc_is_found_in_the_usual_folders(tmp_path, monkeypatch):
    assert placement.allocator(str(tmp_path)) is None
    home = f"usr/lib/{platform.machine()}-linux-gnu"
    places = ["usr/lib64/libtcmalloc.so.4", f"{home}/libtcmalloc_minimal.so.4"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("")
        assert placement.allocator(str(tmp_path)) == str(tmp_path / place)
    machine = dataclasses.replace(machine_trees.read("vm_2_cores"), root=str(tmp_path))
    assert placement.propose(machine).environment["LD_PRELOAD"].endswith("libtcmalloc_minimal.so.4")
    assert "LD_PRELOAD" not in placement.propose(machine_trees.read("vm_2_cores")).environment
    monkeypatch.setenv("LD_LIBRARY_PATH", f"relative::{tmp_path}/{home}")
    assert placement.allocator() == str(tmp_path / places[1])  # a module's comes before the system's
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "libtcmalloc_minimal.so.4").write_text("")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/a b")
    assert placement.allocator() is None or " " not in placement.allocator()  # LD_PRELOAD could not hold it


@pytest.mark.parametrize(
    "exported, threads, environ, warned",
    [
        ("1", 0, {}, True),
        ("4,2", 0, {}, True),
        ("24", 0, {}, False),
        ("1", 24, {}, False),  # the flag decides
        ("22", 0, {"RESNET_CPU_RANKS": "2"}, False),  # set by the launcher
        ("1", 0, {"PMI_SIZE": "2", "PMI_RANK": "1"}, False),  # rank 0 reports it
    ],
)
def test_an_exported_number_of_threads_is_reported_when_it_decides(
    monkeypatch, capsys, exported, threads, environ, warned
):
    """Fault: without the launcher, evaluate and benchmark computed with an exported OMP_NUM_THREADS silently."""
    for name in (*environment.THREADS, "RESNET_CPU_RANKS", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"OMP_NUM_THREADS": exported, **environ}.items():
        monkeypatch.setenv(name, value)
    placement.apply(threads, 24)
    message = capsys.readouterr().err
    assert message.startswith(f"warning: OMP_NUM_THREADS={exported} is set in your environment") == warned
    assert bool(message) == warned

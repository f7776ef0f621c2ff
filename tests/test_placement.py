"""Where ranks and threads go: proposals for described and made-up machines, what ranks set, what rank 0 tells."""

import dataclasses
import os
import platform

import machine_trees
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from resnet_cpu.cluster import machine as topology
from resnet_cpu.cluster import placement as layout
from resnet_cpu.errors import FlagError

GIB = 2**30


@pytest.mark.parametrize(
    "name, ranks, threads, reserved, alone, precision",
    [
        ("stampede2_skx", 2, 22, 2, 24, "float32"),  # the authors' own layout
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
    assert cluster.precision_offer == precision
    assert cluster.yield_when_idle == (reserved == 0) and single.yield_when_idle
    assert cluster.environment["OMP_NUM_THREADS"] == str(threads)
    decided = [what for what, _, _ in cluster.choices]
    assert {"ranks", "threads", "reserved", "binding", "OpenMP", "allocator", "waiting", "precision"} <= set(decided)
    assert len(set(decided)) == len(decided) and all(value and why for _, value, why in cluster.choices)


def test_ranks_of_the_authors_machine_lie_on_a_socket_each():
    proposed = machine_trees.propose("stampede2_skx", True)
    assert proposed.cpus == (tuple(range(0, 48, 2)), tuple(range(1, 48, 2))) and proposed.smt and proposed.bound
    assert set(proposed.masks[0]) == set(range(0, 96, 2))
    assert "binding: 0-46:2 | 1-47:2 (each rank on cores of its own" in "\n".join(proposed.reasons())


def test_a_quota_binds_nothing():
    proposed = machine_trees.propose("container_quota", True)
    assert not proposed.bound
    assert "cores: 4 of 128 (the cgroup grants the time of 4 CPUs" in proposed.reasons()[0]
    larger = layout.propose(dataclasses.replace(machine_trees.read("container_quota"), quota=40), several_hosts=True)
    assert (larger.threads, larger.reserved, larger.bound) == (12, 1, False)


@pytest.mark.parametrize(
    "quota, ranks, threads", [(1000, 8, 16), (127.9, 8, 15), (40, 3, 13), (17, 2, 8), (1.9, 1, 1), (0.2, 1, 1)]
)
def test_quotas_are_shared_out_by_domain(quota, ranks, threads):
    machine = dataclasses.replace(machine_trees.read("epyc_7763_nps4"), quota=quota)
    proposed = layout.propose(machine)
    assert (proposed.ranks_per_node, proposed.threads) == (ranks, threads)


def test_ranks_fit_into_memory():
    skx = machine_trees.read("stampede2_skx")
    few = layout.propose(dataclasses.replace(skx, memory_bytes=8 * GIB))
    assert (few.ranks_per_node, few.threads) == (1, 48) and "would not fit into memory" in few.reasons()[0]
    nodes = tuple(dataclasses.replace(node, memory_bytes=4 * GIB) for node in skx.nodes)
    assert layout.propose(dataclasses.replace(skx, nodes=nodes)).ranks_per_node == 1
    none = layout.propose(dataclasses.replace(skx, memory_bytes=2 * GIB))
    assert none.ranks_per_node == 1 and "--batch_size" in none.reasons()[0]
    unknown = tuple(dataclasses.replace(node, memory_bytes=0) for node in skx.nodes)
    assert layout.propose(dataclasses.replace(skx, nodes=unknown, memory_bytes=0)).ranks_per_node == 2
    small = dataclasses.replace(machine_trees.read("vm_2_cores"), memory_bytes=8 * GIB)
    assert layout.propose(small).threads == 2  # one rank, on both cores


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
def test_as_many_ranks_as_asked_for(name, ranks, threads, crossing):
    proposed = machine_trees.propose(name, False, ranks)
    node = {cpu.id: cpu.node for cpu in machine_trees.read(name).cpus}
    assert (proposed.ranks_per_node, proposed.threads) == (ranks, threads)
    assert sum(len({node[cpu] for cpu in cpus}) > 1 for cpus in proposed.cpus) == crossing
    assert any("span NUMA domains" in reason for reason in proposed.reasons()) == bool(crossing)


def part_of_skx(first, second):
    """Return the two-socket machine with a cpuset of `first` cores of socket 0 and `second` of socket 1."""
    allowed = [*range(0, 2 * first, 2), *range(1, 2 * second, 2)]
    return dataclasses.replace(machine_trees.read("stampede2_skx"), allowed=tuple(sorted(allowed)))


def test_uneven_parts_of_a_machine():
    even = layout.propose(part_of_skx(20, 24))
    assert (even.ranks_per_node, even.threads) == (2, 20) and "of 20 to 24 cores" in even.reasons()[0]
    uneven = layout.propose(part_of_skx(10, 24))  # two ranks of 10 threads would leave 14 cores idle
    assert (uneven.ranks_per_node, uneven.threads) == (1, 34) and "too uneven" in uneven.reasons()[0]
    assert layout.propose(part_of_skx(4, 24), 2).threads == 14  # asked for: one of them spans the sockets
    assert layout.propose(part_of_skx(20, 24), 2).threads == 20  # here neither has to


def test_asking_for_what_suits_is_given_the_reason_why_it_suits():
    assert machine_trees.propose("spr_8480_snc4", True, 8) == machine_trees.propose("spr_8480_snc4", True)
    assert "ranks: 16 (asked for)" in machine_trees.propose("spr_8480_snc4", True, 16).reasons()


def test_one_core_is_told_in_the_singular():
    alone = layout.propose(part_of_skx(1, 0))
    assert alone.reasons()[0] == "ranks: 1 (one for 1 core: least memory, and nothing to wait for)"


@pytest.mark.parametrize("name, ranks, message", [("vm_2_cores", 3, "2 cores"), ("stampede2_skx", 0, "1 to 48 ranks")])
def test_more_ranks_than_cores_are_refused(name, ranks, message):
    with pytest.raises(FlagError, match=message) as caught:
        machine_trees.propose(name, False, ranks)
    assert str(caught.value).startswith(f"--ranks_per_node={ranks}: ") and caught.value.exit_code == 64
    with pytest.raises(FlagError, match="a cgroup grants 4"):
        machine_trees.propose("container_quota", False, 5)


@st.composite
def machines(draw):
    """Make up a machine: sockets, domains, caches and hyper-threads of any number, a mask, perhaps a quota."""
    sockets, domains, smt = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4]))
    sizes = [draw(st.integers(1, 12)) * draw(st.sampled_from([1, 4, 9])) for _ in range(sockets * domains)]
    homes = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    if draw(st.booleans()):  # numbered over the domains in turn
        homes = [domain for i in range(max(sizes)) for domain, size in enumerate(sizes) if i < size]
    count = len(homes)
    cpus = tuple(
        topology.Cpu(
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
        topology.Node(domain, tuple(cpu.id for cpu in cpus if cpu.node == domain), memory)
        for domain in range(len(sizes))
    )
    allowed = draw(st.one_of(st.just(range(len(cpus))), st.sets(st.sampled_from(range(len(cpus))), min_size=1)))
    quota = draw(st.one_of(st.none(), st.floats(0.1, 2 * count)))
    total = memory * len(sizes)
    return topology.Topology("", (), cpus, nodes, tuple(sorted(allowed)), quota, total, root="/nowhere")


@given(machines(), st.booleans(), st.one_of(st.none(), st.integers(1, 40)))
def test_any_machine(machine, several, ranks):
    offered = machine.offered
    try:
        proposed = layout.propose(machine, ranks, several, intel_openmp=True)
    except FlagError:
        assert ranks is not None and ranks > offered
        return
    core_of = {cpu.id: cpu.core for cpu in machine.cpus}
    masks = [cpu for mask in proposed.masks for cpu in mask]
    assert len(set(masks)) == len(masks) and set(masks) <= set(machine.allowed)
    cores = [core_of[cpu] for cpus in proposed.cpus for cpu in cpus]
    assert len(set(cores)) == len(cores) <= offered
    assert proposed.ranks_per_node == len(proposed.cpus) == len(proposed.masks) == (ranks or proposed.ranks_per_node)
    assert proposed.threads >= 1 and proposed.reserved in (0, 1, 2)
    for cpus, mask in zip(proposed.cpus, proposed.masks):
        assert proposed.threads + proposed.reserved <= len(cpus) and set(cpus) <= set(mask)
        assert {core_of[cpu] for cpu in cpus} == {core_of[cpu] for cpu in mask}
    assert proposed.ranks_per_node * proposed.threads <= offered


def test_the_page_says_what_the_code_proposes():
    page = (ROOT / "docs" / "layouts.md").read_text()
    assert page == machine_trees.page(), "python tests/machine_trees.py >docs/layouts.md"
    assert page != machine_trees.page().replace("| 22 + 2 |", "| 24 + 0 |")  # the rows are in it


def test_intels_openmp_is_tuned_where_it_is_installed():
    assert layout.environment(4, intel_openmp=True)["KMP_BLOCKTIME"] == "1"
    assert not [name for name in layout.environment(4, intel_openmp=False) if name.startswith("KMP")]
    without = layout.propose(machine_trees.read("stampede2_skx"), intel_openmp=False)
    assert "OpenMP: KMP_* not set (only Intel's OpenMP reads it" in "\n".join(without.reasons())
    assert not [name for name in without.environment if name.startswith("KMP")]


def test_what_a_rank_sets(monkeypatch):
    for name in (*layout.environment(1, intel_openmp=True), "LD_PRELOAD", "KMP_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "22")  # of the launcher, which kept two cores
    in_force = layout.apply(0, 24)
    assert (in_force["TF_NUM_INTEROP_THREADS"], in_force["OMP_NUM_THREADS"]) == ("2", "22")
    assert in_force["TF_NUM_INTRAOP_THREADS"] == "24" == os.environ["TF_NUM_INTRAOP_THREADS"]
    assert "KMP_AFFINITY" not in in_force
    monkeypatch.setenv("KMP_AFFINITY", "disabled")
    in_force = layout.apply(3, 24)
    assert in_force["OMP_NUM_THREADS"] == in_force["TF_NUM_INTRAOP_THREADS"] == "3"
    assert in_force["TF_NUM_INTEROP_THREADS"] == "2" and in_force["KMP_AFFINITY"] == "disabled"


def test_tcmalloc_is_found_where_it_lies(tmp_path, monkeypatch):
    assert layout.allocator(str(tmp_path)) is None
    home = f"usr/lib/{platform.machine()}-linux-gnu"
    places = ["usr/lib64/libtcmalloc.so.4", f"{home}/libtcmalloc_minimal.so.4"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("")
        assert layout.allocator(str(tmp_path)) == str(tmp_path / place)
    machine = dataclasses.replace(machine_trees.read("vm_2_cores"), root=str(tmp_path))
    assert layout.propose(machine).environment["LD_PRELOAD"].endswith("libtcmalloc_minimal.so.4")
    assert "LD_PRELOAD" not in layout.propose(machine_trees.read("vm_2_cores")).environment
    monkeypatch.setenv("LD_LIBRARY_PATH", f"relative::{tmp_path}/{home}")
    assert layout.allocator() == str(tmp_path / places[1])  # a module's comes before the system's
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "libtcmalloc_minimal.so.4").write_text("")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/a b")
    assert layout.allocator() is None or " " not in layout.allocator()  # LD_PRELOAD could not hold it


def rows(hosts=2, ranks=2, cores=24, threads=22, **more):
    return [
        {
            "host": f"c{host:03}",
            "cpus": list(range(cores * rank, cores * (rank + 1))),
            "cores": cores,
            "threads": threads,
            **more,
        }
        for host in range(hosts)
        for rank in range(ranks)
    ]


def test_where_896_ranks_sit_takes_a_line():
    assert layout.describe(rows(hosts=448)) == [
        "448 hosts x 2 ranks, 24 cores and 22 threads each: rank 0 of a host on CPUs 0-23, rank 1 on CPUs 24-47"
    ]
    assert layout.doubts(rows(hosts=448)) == []


def test_where_odd_hosts_sit():
    mixed = [*rows(hosts=3), *[{**row, "host": "x"} for row in rows(hosts=1, ranks=1, cores=16, threads=16)]]
    lines = layout.describe(mixed)
    assert lines[0].startswith("3 hosts x 2 ranks, 24 cores and 22 threads each: ")
    assert lines[1] == "host x, 1 rank, 16 cores and 16 threads each: rank 0 on CPUs 0-15"
    many = layout.describe(rows(hosts=1, ranks=16, cores=4, threads=4))[0]
    assert "rank 6 on CPUs 24-27, ..., rank 15 on CPUs 60-63" in many and "rank 7" not in many
    unbound = layout.describe(
        [{"host": "a", "cpus": [0, 1, 2, 3], "cores": 2, "threads": 2} for _ in range(2)],
    )
    assert unbound == ["host a, 2 ranks, 2 cores and 2 threads each: all on CPUs 0-3, unbound"]
    each_other = [{"host": f"h{i}", "cpus": [i], "cores": 1, "threads": 1} for i in range(50)]
    assert len(layout.describe(each_other)) == 5 and "46 more hosts" in layout.describe(each_other)[-1]


@pytest.mark.parametrize(
    "seen, expected",
    [
        (rows(hosts=1, threads=48), ["c000: 2 ranks with 96 threads on 48 cores"]),
        (rows(hosts=3, threads=25), ["c000 and 2 more hosts: 2 ranks with 50 threads on 48 cores"]),
        (
            rows(hosts=1, ranks=2, cores=1, threads=24),
            ["2 of 2 ranks are bound to one CPU and compute with 24 threads"],
        ),
        ([*rows(hosts=2), *[{**row, "host": "x"} for row in rows(hosts=1, ranks=1)]], ["(1 on 1 host, 2 on 2 hosts)"]),
        (rows(hosts=1)[:1] + rows(hosts=1, threads=12)[1:], ["ranks compute with 12 to 22 threads"]),
        (rows(hosts=1, cores=1, threads=1, host_cpus=96), ["ranks may use 2 of 96 CPUs"]),
        ([{"host": "a", "cpus": [0, 1], "cores": 1, "threads": 1}] * 3, ["3 ranks with 3 threads on 2 cores"]),
        (rows(hosts=2, omp=1), ["c000 and 1 more hosts: OMP_NUM_THREADS=1, TF_NUM_INTRAOP_THREADS=22"]),
    ],
)
def test_doubts(seen, expected):
    found = layout.doubts(seen)
    assert len(found) == len(expected), found
    for line, part in zip(found, expected):
        assert part in line


def test_negative_control_healthy_placements_raise_no_doubt():
    assert layout.doubts(rows()) == [] and layout.doubts(rows(host_cpus=96, omp=22)) == []
    assert layout.doubts([{"host": "a", "cpus": [0, 1], "cores": 1, "threads": 1}] * 2) == []  # unbound, but enough


SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
SKYLAKE = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512cd\nflags : other\n"


def test_bfloat16_is_doubted_where_there_is_no_amx(tmp_path):
    found = {}
    for name, text in (("new", SAPPHIRE_RAPIDS), ("old", SKYLAKE), ("odd", "")):
        (tmp_path / name / "proc").mkdir(parents=True)
        (tmp_path / name / "proc" / "cpuinfo").write_text(text)
        found[name] = topology.processor(str(tmp_path / name))[1]
    assert found["new"] == ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    assert found["old"] == ["avx2", "avx512f"] and found["odd"] == []
    assert layout.doubt_about("bfloat16", found["new"]) is None
    assert "no AMX" in layout.doubt_about("bfloat16", found["old"])
    assert layout.doubt_about("float32", found["old"]) is None

"""Reading a machine: described ones, made-up limits, missing and damaged files, and this one."""

import dataclasses
import os

import machine_trees
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_cpu.cluster import control, machine

AMX = {"amx_tile", "amx_int8", "amx_bf16"}


@pytest.mark.parametrize(
    "name, sockets, nodes, cores, smt, allowed",
    [
        ("stampede2_skx", 2, 2, 48, 2, 96),
        ("aws_c5_18xlarge", 2, 2, 36, 2, 72),
        ("knl_quadrant_cache", 1, 1, 68, 4, 272),
        ("knl_snc4_flat", 1, 8, 68, 4, 272),
        ("spr_8480_snc4", 2, 8, 112, 2, 224),
        ("spr_8480_one_domain", 2, 2, 112, 2, 224),
        ("epyc_7763_nps4", 2, 8, 128, 2, 256),
        ("epyc_9654_nps1", 2, 2, 192, 2, 384),
        ("epyc_9654_nps4", 2, 8, 192, 2, 384),
        ("epyc_8434p_cache_as_numa", 1, 8, 48, 2, 96),
        ("vm_2_cores", 1, 1, 2, 1, 2),
        ("container_cpuset", 2, 2, 12, 2, 24),
        ("container_quota", 2, 8, 128, 2, 256),
    ],
)
def test_machines(name, sockets, nodes, cores, smt, allowed):
    found = machine_trees.read(name)
    assert (found.sockets, len(found.nodes), len(found.cores())) == (sockets, nodes, cores)
    assert {len(core) for core in found.cores()} == {smt} and len(found.allowed) == allowed
    assert found.model
    assert sorted(cpu for node in found.nodes for cpu in node.cpus) == [cpu.id for cpu in found.cpus]


def test_every_described_machine_is_tried():
    assert {path.stem for path in (machine_trees.HERE / "machines").glob("*.json")} == set(machine_trees.NAMES)


def test_cores_are_ordered_by_what_they_share():
    even = machine_trees.read("stampede2_skx").cores()
    assert [core[0].id for core in even[:3]] == [0, 2, 4] and [cpu.id for cpu in even[0]] == [0, 48]
    assert [core[0].socket for core in even] == [0] * 24 + [1] * 24
    milan = machine_trees.read("epyc_7763_nps4")
    assert len({core[0].cache for core in milan.cores()}) == 16
    assert milan.cpus[8].cache == 8 and milan.cpus[136].cache == 8 and milan.cpus[136].siblings == (8, 136)
    assert machine_trees.read("knl_quadrant_cache").cpus[69].cache == 0  # a tile, by its second-level cache


@pytest.mark.parametrize(
    "allowed, restricted",
    [(range(96), False), (range(48), False), (range(48, 96), False), (range(24), True), ({0}, True)],
)
def test_a_mask_restricts_a_process_if_it_leaves_out_cores(tmp_path, allowed, restricted):
    """A job without hyper-threads may use one CPU of each core: that leaves out no core."""
    machine_trees.tree(machine_trees.described("stampede2_skx"), tmp_path)
    assert machine.read(str(tmp_path), allowed).restricted == restricted
    assert not machine_trees.read("container_cpuset").restricted  # the cgroup itself permits no more


def test_memory_without_cpus_is_found():
    knl = machine_trees.read("knl_snc4_flat")
    assert [len(node.cpus) for node in knl.nodes] == [72, 72, 64, 64, 0, 0, 0, 0]
    assert [node.memory_bytes >> 30 for node in knl.nodes] == [24] * 4 + [4] * 4


def test_instruction_sets():
    sets = {name: set(machine_trees.read(name).instruction_sets) for name in machine_trees.NAMES}
    assert sets["stampede2_skx"] == {"avx2", "avx512f", "avx512bw"}
    assert sets["knl_snc4_flat"] == {"avx2", "avx512f"}
    assert sets["spr_8480_snc4"] >= AMX | {"avx512_bf16", "avx512_fp16", "avx512_vnni"}
    assert sets["epyc_7763_nps4"] == {"avx2"}
    assert "avx512_bf16" in sets["epyc_9654_nps1"] and not sets["epyc_9654_nps1"] & AMX


def test_limits_of_containers():
    cpuset, quota = machine_trees.read("container_cpuset"), machine_trees.read("container_quota")
    assert (cpuset.quota, cpuset.memory_bytes >> 30) == (None, 64)
    assert cpuset.allowed[:3] == (0, 2, 4) and {core[0].socket for core in cpuset.cores()} == {0}
    assert (quota.quota, quota.memory_bytes >> 30) == (4.0, 16)
    assert machine_trees.read("vm_2_cores").quota is None
    assert (quota.offered, cpuset.offered, machine_trees.read("vm_2_cores").offered) == (4, 12, 2)
    assert [dataclasses.replace(quota, quota=share).offered for share in (0.2, 1.9, 1000)] == [1, 1, 128]


def write(root, **files):
    for path, text in files.items():
        whole = root / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text)


def test_the_tightest_limit_of_all_parents_applies(tmp_path):
    write(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/slurm/job7/step0\n",
            "sys/fs/cgroup/slurm/job7/step0/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slurm/job7/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/slurm/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/slurm/job7/cpuset.cpus.effective": "2-3\n",
            "sys/fs/cgroup/slurm/job7/memory.max": "max\n",
            "sys/fs/cgroup/slurm/memory.max": "1000000\n",
            "sys/devices/system/cpu/online": "0-7\n",
        },
    )
    found = machine.read(str(tmp_path))
    assert (found.quota, found.allowed, found.memory_bytes) == (1.5, (2, 3), 1000000)
    write(tmp_path, **{"proc/self/cgroup": "4:cpu,cpuacct:/a\n1:cpuset:/a\n0::/../outside\n"})
    assert machine.read(str(tmp_path)).quota is None
    write(tmp_path, **{"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpuset/a/cpuset.cpus": "5"})
    assert machine.read(str(tmp_path)).quota == 0.5 and machine.read(str(tmp_path)).allowed == (5,)


def test_no_file_is_required(tmp_path):
    empty = machine.read(str(tmp_path))
    assert [len(core) for core in empty.cores()] == [1] and empty.sockets == 1 and empty.nodes[0].cpus == (0,)
    four = machine.read(str(tmp_path), allowed=[3, 5, 6, 8])
    assert len(four.cores()) == 4 and four.sockets == 1 and len(four.nodes) == 1 and four.memory_bytes == 0
    write(tmp_path, **{"proc/cpuinfo": "processor\t: 0\n\nprocessor\t: 1\n"})
    assert [cpu.id for cpu in machine.read(str(tmp_path)).cpus] == [0, 1]
    assert machine.processor(str(tmp_path)) == ("", [])


@pytest.mark.parametrize(
    "text", ["", "x\n", "-1\n", "3-\n", "9-2", "0-1:0/0", "0-99999999999", "7" * 30, "\0\xff", "5 of\n", "2-3,oops,4"]
)
def test_damaged_files_raise_no_error(text, tmp_path):
    places = [
        f"sys/devices/system/cpu/cpu0/{f}" for f in ("topology/thread_siblings_list", "topology/core_siblings_list")
    ]
    places += [f"sys/devices/system/node/{f}" for f in ("online", "node0/cpulist", "node0/meminfo", "node0/distance")]
    places += ["proc/cpuinfo", "proc/meminfo", "sys/devices/system/cpu/cpu0/cache/index3/shared_cpu_list"]
    places += [f"sys/fs/cgroup/{f}" for f in ("cpu.max", "cpuset.cpus.effective", "memory.max")]
    write(tmp_path, **{"proc/self/cgroup": "0::/\n", **dict.fromkeys(places, text)})
    found = machine.read(str(tmp_path), allowed=[0, 1])
    assert found.allowed and {cpu for core in found.cores() for cpu in core} <= set(found.cpus)


def test_a_large_machine_needs_few_reads(tmp_path, monkeypatch):
    machine_trees.tree(machine_trees.described("knl_quadrant_cache"), tmp_path)
    asked = []
    real = machine._text
    monkeypatch.setattr(machine, "_text", lambda root, path: asked.append(path) or real(root, path))
    assert len(machine.read(str(tmp_path)).cpus) == 272
    assert len(asked) < 272  # one file per core or cache, not several per hyper-thread


def test_hyper_threads_count_once(tmp_path):
    machine_trees.tree(machine_trees.described("stampede2_skx"), tmp_path)
    assert machine.physical_cores([0, 48, 2, 50], str(tmp_path)) == 2
    assert machine.physical_cores([0, 2, 4], str(tmp_path)) == 3
    assert machine.physical_cores([], str(tmp_path)) == 0


def test_this_machine():
    here = machine.read()
    assert here.allowed == tuple(sorted(os.sched_getaffinity(0)))
    assert len(here.cores()) == machine.physical_cores(os.sched_getaffinity(0))
    assert 0 < here.memory_bytes <= psutil.virtual_memory().total
    assert (here.model, list(here.instruction_sets)) == machine.processor()


def test_a_quota_limits_the_cores_of_ranks():
    assert control.share_of_cores([0, 1, 2, 3], [[0, 1, 2, 3]]) == machine.physical_cores([0, 1, 2, 3])
    assert control.share_of_cores([0, 1, 2, 3], [[0, 1, 2, 3]], granted=1.5) == 1
    assert control.share_of_cores([0, 1], [[0, 1], [2, 3]], granted=0.5) == 1


@given(st.sets(st.integers(0, 400)))
def test_cpu_lists_of_the_kernel_are_read(cpus):
    assert machine.cpu_list(machine_trees.written(cpus)) == cpus


def test_cpu_lists_are_written_for_people():
    assert machine.spans([3, 1, 2, 8]) == "1-3,8"
    assert machine.spans(range(0, 48, 2)) == "0-46:2"
    assert machine.spans([0, 2]) == "0,2" and machine.spans([]) == ""
    assert machine.cpu_list("0-94:1/2") == set(range(0, 95, 2))


SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
SKYLAKE = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512cd\nflags : other\n"


def test_instruction_sets_are_read(tmp_path):
    found = {}
    for name, text in (("new", SAPPHIRE_RAPIDS), ("old", SKYLAKE), ("odd", "")):
        (tmp_path / name / "proc").mkdir(parents=True)
        (tmp_path / name / "proc" / "cpuinfo").write_text(text)
        found[name] = machine.processor(str(tmp_path / name))[1]
    assert found["new"] == ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    assert found["old"] == ["avx2", "avx512f"] and found["odd"] == []


def test_layers_that_corrupt_memory_on_this_processor_are_refused():
    """Held against version 0.1, which trained them, with other losses in each run and crashes."""
    without, with_avx512 = ["avx2"], ["avx2", "avx512f", "avx512bw"]
    assert "4 channels" in machine.narrow_layers_problem(4, without)
    assert machine.narrow_layers_problem(8, without) is None  # negative controls
    assert machine.narrow_layers_problem(4, with_avx512) is None


def test_bfloat16_that_aborts_on_this_processor_is_refused():
    """Held against version 0.1, whose process aborted in the first step."""
    without, with_avx512 = ["avx2"], ["avx2", "avx512f", "avx512bw"]
    assert "AVX-512" in machine.precision_problem("bfloat16", without, intel_extension=True)
    assert machine.precision_problem("float32", without, intel_extension=True) is None  # negative controls
    assert machine.precision_problem("bfloat16", with_avx512, intel_extension=True) is None
    assert machine.precision_problem("bfloat16", without, intel_extension=False) is None

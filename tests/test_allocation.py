"""Which hosts a batch job has, from what PBS, LSF, Cobalt, Grid Engine, OAR and Slurm export."""

import pytest

from resnet_cpu.cluster import allocation
from resnet_cpu.errors import FlagError

TWICE = "n1\nn1\nn2\nn2\n"


def job(tmp_path, variable, text, **more):
    """Return the variables of a job whose list of hosts is a file."""
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {variable: str(path), **more}


@pytest.mark.parametrize(
    "system, variable, mark",
    [
        ("PBS", "PBS_NODEFILE", "PBS_JOBID"),
        ("LSF", "LSB_DJOB_HOSTFILE", "LSB_JOBID"),
        ("Cobalt", "COBALT_NODEFILE", "COBALT_JOBID"),
        ("OAR", "OAR_NODEFILE", "OAR_JOB_ID"),
    ],
)
def test_a_file_with_a_line_for_each_slot(tmp_path, system, variable, mark):
    for more in ({}, {mark: "7"}):
        environ = job(tmp_path, variable, TWICE, **more)
        found = allocation.read(environ)
        assert found[:5] == (system, f"{variable}={environ[variable]}", 2, ("n1", "n2"), 2) and not found.unequal


@pytest.mark.parametrize(
    "text, hosts, slots",
    [
        ("n1\nn2\n", ("n1", "n2"), 1),
        ("n2\nn1\nn2\nn1", ("n2", "n1"), 2),  # ranks alternate
        ("# hosts\r\n\r\n n1 \r\nn2 # the second\r\n", ("n1", "n2"), 1),
        ("n1 slots=4\nn2 slots = 4 max_slots=8\n", ("n1", "n2"), 4),
        ("n1:4\nn2:4\n", ("n1", "n2"), 4),
        ("n1[0]\nn1[1]\nn2[0]\nn2[1]\n", ("n1", "n2"), 2),  # PBS's virtual nodes
        ("n1/0\nn1/1\n", ("n1",), 2),
        ("10.0.0.1\nnode-2.my.cluster\n", ("10.0.0.1", "node-2.my.cluster"), 1),
    ],
)
def test_ways_to_write_a_list_of_hosts(tmp_path, text, hosts, slots):
    found = allocation.read(job(tmp_path, "PBS_NODEFILE", text))
    assert (found.hosts, found.slots, found.nodes) == (hosts, slots, len(hosts))


def test_grid_engine_gives_slots_and_may_list_a_host_for_each_queue(tmp_path):
    text = "n1 2 all.q@n1 UNDEFINED\nn2 4 all.q@n2 0,1\nn1 2 fast.q@n1 <NULL>\n"
    found = allocation.read(job(tmp_path, "PE_HOSTFILE", text, SGE_TASK_ID="undefined"))
    assert (found.system, found.hosts, found.slots) == ("Grid Engine", ("n1", "n2"), 4)


@pytest.mark.parametrize(
    "environ",
    [{"LSB_MCPU_HOSTS": "n1 2 n2 2"}, {"LSB_HOSTS": "n1 n1 n2 n2"}, {"LSB_HOSTS": "x", "LSB_MCPU_HOSTS": "n1 2 n2 2"}],
)
def test_lsf_may_have_no_file(environ):
    found = allocation.read({"LSB_JOBID": "7", "LSB_DJOB_HOSTFILE": "", **environ})
    assert (found.system, found.hosts, found.slots) == ("LSF", ("n1", "n2"), 2)
    assert found.source in [f"{name}={value}" for name, value in environ.items()]


def test_the_launch_node_of_lsf_gets_no_rank(tmp_path):
    found = allocation.read(job(tmp_path, "LSB_DJOB_HOSTFILE", "batch5\nn1\nn1\nn2\nn2\n"))
    assert (found.hosts, found.slots, found.unequal) == (("n1", "n2"), 2, "") and "batch5" in found.left_out
    # Negative controls: one slot each, and a batch system that lists no such node.
    assert allocation.read(job(tmp_path, "LSB_DJOB_HOSTFILE", "batch5\nn1\n")).hosts == ("batch5", "n1")
    assert allocation.read(job(tmp_path, "PBS_NODEFILE", "n0\nn1\nn1\n")).unequal == "n0: 1, n1: 2"


@pytest.mark.parametrize(
    "environ, nodes, slots",
    [
        ({"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "2"}, 4, 2),
        ({"SLURM_NNODES": "4", "SLURM_NTASKS": "8"}, 4, 2),
        ({"SLURM_NNODES": "4", "SLURM_NTASKS": "7"}, 4, None),
        ({"SLURM_NNODES": "4", "SLURM_NTASKS": "", "SLURM_NTASKS_PER_NODE": "x"}, 4, None),
        ({"SLURM_JOB_NUM_NODES": "1", "PBS_NODEFILE": "/its/own/wrapper"}, 1, None),  # of a wrapper for old scripts
    ],
)
def test_slurm_exports_the_number_of_nodes_and_tasks(environ, nodes, slots):
    found = allocation.read({"SLURM_JOB_ID": "7", **environ})
    assert (found.system, found.nodes, found.hosts, found.slots) == ("Slurm", nodes, (), slots)


@pytest.mark.parametrize(
    "listed, nodes, more, slots, unequal",
    [
        ("2", 1, {"SLURM_NTASKS": "2"}, 2, False),
        ("1(x4)", 4, {"SLURM_NTASKS": "4"}, 1, False),
        ("2,2", 2, {"SLURM_NTASKS_PER_NODE": "2"}, 2, False),
        ("6,2", 2, {"SLURM_NTASKS": "8"}, 2, True),
        ("6(x2)", 2, {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "6"}, 4, False),  # as Slurm 22.05 writes it
        ("4(x2),3", 3, {"SLURM_NTASKS": "11"}, 3, True),
        ("48(x4)", 4, {}, None, False),  # no tasks were asked for: these are processors
        ("1", 4, {"SLURM_NTASKS": "8"}, 2, False),  # of a step on one of the four nodes
        ("", 4, {"SLURM_NTASKS": "8"}, 2, False),
        ("2(x", 4, {"SLURM_NTASKS": "8"}, 2, False),
        ("1(x999999999)", 4, {"SLURM_NTASKS": "8"}, 2, False),
    ],
)
def test_slurm_lists_the_tasks_of_each_node(listed, nodes, more, slots, unequal):
    """Fault: 8 tasks on two nodes were taken for 6 each with --ntasks-per-node=6, and for 4 each if a node had 6."""
    found = allocation.read({"SLURM_JOB_ID": "7", "SLURM_NNODES": str(nodes), "SLURM_TASKS_PER_NODE": listed, **more})
    assert (found.slots, found.unequal) == (slots, f"SLURM_TASKS_PER_NODE={listed}" if unequal else "")


@pytest.mark.parametrize(
    "environ",
    [{}, {"PBS_O_HOST": "x"}, {"JOB_ID": "7"}, {"SLURM_JOB_ID": "", "PBS_JOBID": "", "PBS_NODEFILE": ""}],
)
def test_negative_control_outside_a_job_nothing_is_found(environ):
    assert allocation.read(environ) is None


@pytest.mark.parametrize(
    "environ, parts",
    [
        ({"PBS_JOBID": "1.server"}, ["PBS_JOBID=1.server", "PBS_NODEFILE is not", "PBS are unknown"]),
        ({"PBS_NODEFILE": "/no/such/file"}, ["PBS_NODEFILE=/no/such/file", "No such file"]),
        ({"PBS_NODEFILE": "/"}, ["PBS_NODEFILE=/", "Is a directory"]),
        ({"LSB_JOBID": "7"}, ["LSB_DJOB_HOSTFILE or LSB_MCPU_HOSTS or LSB_HOSTS is not"]),
        ({"LSB_MCPU_HOSTS": "n1 2 n2"}, ["LSB_MCPU_HOSTS=n1 2 n2", "not a list of hosts"]),
        ({"LSB_MCPU_HOSTS": "n1 n2"}, ["not a list of hosts"]),
        ({"LSB_MCPU_HOSTS": "n1 0"}, ["without slots"]),
        ({"COBALT_JOBID": "7", "COBALT_PARTNAME": "3,10-12"}, ["COBALT_NODEFILE is not"]),
        ({"SGE_TASK_ID": "undefined"}, ["PE_HOSTFILE is not", "Grid Engine"]),
        ({"OAR_JOB_ID": "7"}, ["OAR_NODEFILE is not"]),
        ({"SLURM_JOB_ID": "7"}, ["SLURM_JOB_ID=7", "SLURM_JOB_NUM_NODES"]),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": ""}, ["SLURM_JOB_NUM_NODES"]),
    ],
)
def test_a_job_without_a_list_that_can_be_read_is_refused(environ, parts):
    """Fault: the ranks were started on one host without a word on the others."""
    with pytest.raises(FlagError) as caught:
        allocation.read(environ)
    message = str(caught.value)
    assert all(part in message for part in [*parts, "--hosts=NAME:SLOTS,...", "--hosts=localhost"]), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "variable, text, part",
    [
        ("PBS_NODEFILE", "", "no host is listed"),
        ("PBS_NODEFILE", "# none\n", "no host is listed"),
        ("PBS_NODEFILE", "n1\n-oProxyCommand=x\n", "'-oProxyCommand=x' is not the name of a host"),
        ("PBS_NODEFILE", "n1;touch x\n", "'n1;touch' is not the name"),
        ("PBS_NODEFILE", b"\xff\xfen\x001\x00", "not a list of hosts as PBS writes it"),
        ("PE_HOSTFILE", "n1\n", "not a list of hosts as Grid Engine writes it"),
        ("PE_HOSTFILE", "n1 two\n", "not a list of hosts as Grid Engine writes it"),
    ],
)
def test_a_list_that_holds_something_else_is_refused(tmp_path, variable, text, part):
    with pytest.raises(FlagError) as caught:
        allocation.read(job(tmp_path, variable, text))
    assert part in str(caught.value) and "--hosts=" in str(caught.value), caught.value


def test_the_variables_of_a_job_can_be_left_out():
    inside = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n", "PBS_NODEFILE": "x", "LSB_HOSTS": "x", "PE_HOSTFILE": "x"}
    outside = {"PATH": "/bin", "PBSPRO": "x", "SLURM": "x"}
    assert allocation.without({**inside, **outside}) == outside

"""The network lab: separate hosts, links of a chosen speed, and nothing left afterwards."""

import os
import pathlib
import shutil
import subprocess
import tempfile

import psutil
import pytest
from conftest import ROOT, lacking

pytestmark = pytest.mark.multihost
FOLDER = ROOT / "launch" / "network-lab"


def lab(*arguments, name, **environment):
    return subprocess.run(
        [FOLDER / "lab", *map(str, arguments)],
        env={**os.environ, "RESNET_CPU_LAB": name, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def keepers(name):
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith(f"network-lab:{name}:")
    ]


@pytest.fixture
def name():
    name = f"lab{os.getpid()}-"
    yield name
    assert lab("down", name=name).returncode == 0
    assert keepers(name) == []


def up(name, *arguments):
    process = lab("up", *arguments, name=name)
    if process.returncode == 69:
        lacking(process.stderr.strip())
    assert process.returncode == 0, process.stderr


def test_hosts_have_names_addresses_and_folders_of_their_own_and_reach_each_other(name, tmp_path):
    (tmp_path / "shared").write_text("seen by the machine")
    outside = sorted(path.name for path in pathlib.Path("/sys/class/net").iterdir())
    up(name, 3, "--own", tmp_path)
    assert lab("hosts", name=name).stdout.split() == [f"{name}{number}" for number in (1, 2, 3)]
    # A server on the third host answers to its name; the files on the way show whose folder is whose.
    code = (
        "import socket, sys\n"
        "s = socket.create_connection((sys.argv[1], 7777), 10) if sys.argv[2:] else socket.create_server(('', 7777))\n"
        "print('ready', flush=True)\n"
        "c = s if sys.argv[2:] else s.accept()[0]\n"
        "c.sendall(socket.gethostname().encode()); c.shutdown(socket.SHUT_WR); print(c.makefile().read())\n"
    )
    run = [FOLDER / "lab", "run"]
    environment = {**os.environ, "RESNET_CPU_LAB": name}
    with subprocess.Popen(
        [*run, f"{name}3", "python3", "-c", code, "0"], env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline() == "ready\n"
        client = lab("run", f"{name}1", "python3", "-c", code, f"{name}3", "client", name=name)
        assert client.stdout == f"ready\n{name}3\n" and server.stdout.readline() == f"{name}1\n"
    assert lab("run", f"{name}1", "touch", tmp_path / "mine", name=name).returncode == 0
    seen = [lab("run", f"{name}{number}", "ls", tmp_path, name=name).stdout.split() for number in (1, 2)]
    assert seen == [["mine"], []] and os.listdir(tmp_path) == ["shared"]
    interfaces = lab("run", f"{name}2", "ls", "/sys/class/net", name=name).stdout.split()
    assert interfaces == ["lan0", "lo"]
    assert sorted(path.name for path in pathlib.Path("/sys/class/net").iterdir()) == outside


def test_links_have_the_speed_they_are_given_and_two_labs_run_side_by_side(name):
    other = f"{name}b"
    up(name, 2, "--mbit", 500)
    try:
        up(other, 2)

        def rates(lab_name):
            shown = [
                lab("run", f"{lab_name}{number}", "tc", "qdisc", "show", "dev", "lan0", name=lab_name).stdout
                for number in (1, 2)
            ]
            return [text.partition("rate ")[2].split()[:1] for text in shown]

        assert rates(name) == [["500Mbit"]] * 2 and rates(other) == [[], []]
        assert lab("shape", 2500, name=name).returncode == 0
        assert rates(name) == [["2500Mbit"]] * 2 and rates(other) == [[], []]
        assert lab("shape", 0, name=name).returncode == 0
        assert rates(name) == [[], []]
    finally:
        assert lab("down", name=other).returncode == 0
    assert keepers(other) == [] and len(keepers(name)) == 3  # two hosts and the switch


def test_a_host_is_disconnected_and_restored_and_down_ends_its_processes(name):
    up(name, 2)
    carrier = ["run", f"{name}2", "cat", "/sys/class/net/lan0/carrier"]
    assert lab(*carrier, name=name).stdout == "1\n"
    assert lab("cut", f"{name}2", name=name).returncode == 0
    assert lab(*carrier, name=name).stdout == "0\n"
    assert lab("restore", f"{name}2", name=name).returncode == 0
    assert lab(*carrier, name=name).stdout == "1\n"
    environment = {**os.environ, "RESNET_CPU_LAB": name}
    sleepers = [
        subprocess.Popen([FOLDER / "lab", "run", f"{name}{number}", "sleep", "100"], env=environment)
        for number in (1, 2)
    ]
    assert lab("up", 2, name=name).returncode == 64  # it is already running
    assert lab("kill", f"{name}1", name=name).returncode == 0
    assert sleepers[0].wait(10) == -9 and sleepers[1].poll() is None
    os.kill(keepers(name)[0], 9)  # as after a crash: a part of it is gone
    assert lab("down", name=name).returncode == 0
    assert sleepers[1].wait(10) == -9
    assert lab("hosts", name=name).stdout == ""
    up(name, 2)


def test_what_is_wrong_or_missing_is_reported_in_one_line(name, tmp_path):
    if os.geteuid() == 0:
        with tempfile.TemporaryDirectory() as folder:  # the checkout may be readable only by root
            os.chmod(folder, 0o755)
            demoted = ["setpriv", "--reuid=65534", "--clear-groups", shutil.copy(FOLDER / "lab", folder), "up", "2"]
            process = subprocess.run(demoted, capture_output=True, text=True, cwd="/")
        assert (process.returncode, process.stderr) == (69, "network-lab: needs root to create namespaces\n")
        (tmp_path / "bash").symlink_to(shutil.which("bash"))
        bare = lab("up", 2, name=name, PATH=str(tmp_path))
        assert (bare.returncode, bare.stderr) == (69, "network-lab: needs ip; apt-get install iproute2\n")
    for arguments, part in (
        (["up", 5], "between 2 and 4 hosts"),
        (["up", 2, "--mbit", "fast"], "--mbit fast"),
        (["up", 2, "--own", "relative"], "--own relative"),
        (["shape", "fast"], "shape fast"),
        (["shape", 10], "is not up"),
        (["decoy", "docker0"], "is not up"),
        (["cut", "unknown"], "no host unknown"),
        (["run", "unknown", "true"], "no host unknown"),
    ):
        process = lab(*arguments, name=name)
        assert process.returncode == 64 and process.stderr.count("\n") == 1 and part in process.stderr, process.stderr
    assert "lab up HOSTS" in lab(name=name).stderr
    assert lab("hosts", name="Not a name").returncode == 64

"""Check that what other programs left in the environment and the home folder changes no result unnoticed."""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent import futures

import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines

from resnet_cpu import commandline
from resnet_cpu.cluster import control, environment
from resnet_cpu.errors import FlagError
from resnet_cpu.training import agreement

#: Variables of other programs, and values that people have exported.
OF_OTHERS = {
    "ITEX_AUTO_MIXED_PRECISION": "1",
    "ITEX_FP32_MATH_MODE": "BF32",
    "ITEX_LAYOUT_OPT": "1",
    "ITEX_ONEDNN_GRAPH": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit",
    "TF_DETERMINISTIC_OPS": "1",
    "TF_ENABLE_AUTO_MIXED_PRECISION": "1",
    "TF2_BEHAVIOR": "0",
    "KERAS_HOME": "/no/such",
    "KMP_AFFINITY": "granularity=fine,compact,1,0",
    "KMP_HW_SUBSET": "1c,1t",
    "OMP_PROC_BIND": "true",
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CPU_OPERATIONS": "gloo",
}
#: Variables that stay: numbers of threads, what only reports, what is tuned, what is ours.
OWN = {
    "OMP_NUM_THREADS": "2",
    "TF_NUM_INTEROP_THREADS": "2",
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "ITEX_CPP_MIN_LOG_LEVEL": "0",
    "HOROVOD_FUSION_THRESHOLD": "1048576",
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "KMP_BLOCKTIME": "0",
    "TF_ENABLE_ONEDNN_OPTS": "1",
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_variable_of_another_program_is_not_obeyed_and_named(name):
    environ = {name: OF_OTHERS[name]}
    (line,) = [line for line in environment.remarks(environ) if line.startswith("warning")]
    assert f"{name}={OF_OTHERS[name]}, set in your environment" in line
    found = environment.settle(environ)
    assert found.ignored == {name: OF_OTHERS[name]}
    assert environ.get(name) == environment.decided().get(name)


@pytest.mark.parametrize("name", OWN)
def test_negative_control_what_users_tune_is_kept_and_recorded(name):
    environ = {name: OWN[name]}
    found = environment.settle(environ)
    assert (
        not found.ignored
        and not environment.not_obeyed({name: OWN[name]})
        and environ[name] == found.variables[name] == OWN[name]
    )


@pytest.mark.parametrize("version, separate", [("2.15.1", False), ("2.16.0", True), ("2.21.0", True), ("", False)])
def test_keras_2_is_chosen_for_each_tensorflow(version, separate, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda package: version)
    for exported in ("1", "0", "", None):
        environ = {} if exported is None else {"TF_USE_LEGACY_KERAS": exported}
        environment.settle(environ)
        assert environ.get("TF_USE_LEGACY_KERAS") == ("1" if separate else None)


def test_a_variable_can_be_kept_by_its_name():
    environ = {"TF_ENABLE_ONEDNN_OPTS": "0", "ITEX_LAYOUT_OPT": "1", environment.KEEP: "TF_ENABLE_ONEDNN_OPTS"}
    found = environment.settle(environ)
    assert environ["TF_ENABLE_ONEDNN_OPTS"] == "0" == found.variables["TF_ENABLE_ONEDNN_OPTS"]
    assert found.ignored == {"ITEX_LAYOUT_OPT": "1"} and found.variables[environment.KEEP] == "TF_ENABLE_ONEDNN_OPTS"


@pytest.mark.parametrize("name", ["HOME", "TF_USE_LEGACY_KERAS"])
def test_other_variables_cannot_be_kept(name):
    with pytest.raises(FlagError, match=f"RESNET_CPU_KEEP: {name} "):
        environment.settle({name: "1", environment.KEEP: name})


def test_ranks_that_keep_other_variables_are_refused(monkeypatch):
    """Fault: RESNET_CPU_KEEP was not passed to other hosts, and nothing compared what the ranks obey."""
    settings = commandline.parse(["--dataset=synthetic"], "benchmark")
    monkeypatch.setenv(environment.KEEP, "ITEX_LAYOUT_OPT,ONEDNN_MAX_CPU_ISA,OMP_PLACES")
    monkeypatch.setenv("ITEX_LAYOUT_OPT", "1")
    monkeypatch.setenv("OMP_PLACES", "{0}")  # ranks may be pinned each to its own cores
    other = {"host": "n2", environment.KEEP: "unset"}
    for rows, refused in ((lambda row: [row, row], False), (lambda row: [row, {**row, **other}], True)):
        monkeypatch.setattr(control.World, "gather", lambda self, row, rows=rows: rows(row))
        if refused:
            with pytest.raises(FlagError, match=r"rank 1 on n2 .*RESNET_CPU_KEEP \(unset\).*\(ITEX_LAYOUT_OPT=1\)"):
                agreement.check_same_everywhere(settings, control.World(2, 0))
        else:
            agreement.check_same_everywhere(settings, control.World(2, 0))


class Pair(control.World):
    """One of two ranks that are threads."""

    def __init__(self, rank, rows, barrier):
        super().__init__(2, rank)
        self._rows, self._barrier = rows, barrier

    def gather(self, value):
        self._barrier.wait()
        self._rows[self.rank] = value
        self._barrier.wait()
        return list(self._rows)


A, B = "--phase=a:steps=1,lr=1", "--phase=b:steps=1,lr=1"


@pytest.mark.parametrize(
    "first, own, part",
    [
        (["--seed=0"], ["--seed=1"], "--seed=1 instead of --seed=0;"),
        # Fault: ranks without --export waited for those with it. The folder may differ.
        ([], ["--export=mean.npz"], r"--export=\.\.\. instead of none;"),
        (["--export=a.npz"], ["--export=b.npz"], None),
        ([A, B], [B, A], "--phase=b:.* instead of --phase=a:"),  # fault: "none instead of none"
        ([A, B], [A, B], None),
    ],
)
def test_ranks_with_other_flags_are_refused(first, own, part):
    rows, barrier = [None, None], threading.Barrier(2, timeout=60)
    settings = [commandline.parse(["--dataset=synthetic", *words], "evaluate") for words in (first, own)]

    def error_of(rank):
        try:
            agreement.check_same_everywhere(settings[rank], Pair(rank, rows, barrier))
        except FlagError as error:
            return str(error)
        return None

    with futures.ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(error_of, (0, 1)))
    assert errors[0] == errors[1] and (errors[0] is None if part is None else re.search(part, errors[0]))


@pytest.mark.parametrize("switch, code", [("-OO", 64), ("-O", 0), ("-B", 0)])
def test_python_without_docstrings_is_refused(switch, code):
    """Fault: a traceback out of TensorFlow."""
    program = "from resnet_cpu.cluster import environment, guard; guard.run(lambda argv: environment.settle() and 0)"
    process = subprocess.run(
        [sys.executable, switch, "-c", program], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == code and len(error_lines(process)) == (code > 0), process.stderr
    assert "PYTHONOPTIMIZE=2" in process.stderr or code == 0


def test_secrets_and_what_the_launcher_passes_are_not_recorded():
    environ = {"A_SECRET": "x", "OMPI_MCA_orte_precondition_transports": "x", "PMI_FD": "x", "SLURM_JOB_ID": "x"}
    assert "x" not in environment.settle(environ).variables.values()


def test_parameters_of_open_mpi_in_the_home_folder_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.settle({}).mpi_parameters == {} and environment.remarks({}) == []
    (tmp_path / ".openmpi").mkdir()
    text = "# coll = basic\ncoll_tuned_allreduce_algorithm = 4\nbtl=self,tcp\nplm_rsh_agent = secret\n"
    (tmp_path / ".openmpi" / "mca-params.conf").write_text(text)
    assert environment.settle({}).mpi_parameters == {"coll_tuned_allreduce_algorithm": "4", "btl": "self,tcp"}
    (line,) = environment.remarks({})
    assert "mca-params.conf: coll_tuned_allreduce_algorithm=4, btl=self,tcp;" in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train the tiny network as a user does, with `environ` exported; return the process and its run folder."""

    def train(run_dir, environ):
        flags = ["--dataset=synthetic", "--train_examples=48", "--num_classes=10", f"--run_dir={run_dir}"]
        tiny = [flag for flag in TINY_FLAGS if not flag.startswith(("--dataset", "--phase"))]
        process = subprocess.run(
            [sys.executable, "-m", "resnet_cpu.train", *tiny, *flags, "--phase=main:steps=4,lr=0.05", "--threads=1"],
            cwd=ROOT,
            env={**OUTSIDE, **environ},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return process, run_dir

    return train


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.training
def test_the_losses_are_the_same_bits_whatever_was_exported_and_left_in_the_home_folder(trained, tmp_path):
    """Faults: ITEX_AUTO_MIXED_PRECISION trained in bfloat16, TF_USE_LEGACY_KERAS was a traceback, and
    ~/.keras/keras.json changed the network."""
    home = tmp_path / "home"
    (home / ".keras").mkdir(parents=True)
    (home / ".keras" / "keras.json").write_text(
        '{"floatx": "float64", "epsilon": 0.1, "backend": "theano", "image_data_format": "channels_first"}'
    )
    plain, run_dir = trained(tmp_path / "plain", {})
    assert plain.returncode == 0 and "not obeyed" not in plain.stderr, plain.stderr
    legacy = "0" if environment.keras_is_separate() else "1"
    exported = {**OF_OTHERS, "TF_USE_LEGACY_KERAS": legacy, "KERAS_BACKEND": "torch", "HOME": str(home)}
    loaded, other_dir = trained(tmp_path / "loaded", exported)
    assert loaded.returncode == 0, loaded.stderr
    (line,) = [line for line in loaded.stderr.splitlines() if "not obeyed" in line]
    assert all(f"{name}={value}" in line for name, value in OF_OTHERS.items()), line
    assert losses(run_dir) == losses(other_dir)
    (rank,) = json.loads((other_dir / "run.json").read_text())["per_rank"]
    assert rank["environment_ignored"] == {**OF_OTHERS, "TF_USE_LEGACY_KERAS": legacy}
    assert rank["environment"]["TF_ENABLE_ONEDNN_OPTS"] == "1"


@pytest.mark.training
def test_negative_control_a_kept_variable_changes_the_bits(trained, tmp_path):
    _, plain = trained(tmp_path / "plain", {})
    process, kept = trained(tmp_path / "kept", {"ONEDNN_MAX_CPU_ISA": "SSE41", "RESNET_CPU_KEEP": "ONEDNN_MAX_CPU_ISA"})
    assert process.returncode == 0, process.stderr
    assert losses(plain) != losses(kept)
    (rank,) = json.loads((kept / "run.json").read_text())["per_rank"]
    assert rank["environment"]["ONEDNN_MAX_CPU_ISA"] == "SSE41" and not rank["environment_ignored"]


@pytest.mark.parametrize(
    "exported, kept",
    [
        ({"TF_NUM_INTRAOP_THREADS": "", "OMP_NUM_THREADS": "  "}, {}),
        (
            {"TF_NUM_INTRAOP_THREADS": " 4 ", "OMP_NUM_THREADS": "02"},
            {"TF_NUM_INTRAOP_THREADS": "4", "OMP_NUM_THREADS": "2"},
        ),
        ({"OMP_NUM_THREADS": "2, 1"}, {"OMP_NUM_THREADS": "2,1"}),
    ],
)
def test_numbers_of_threads_are_read_as_shells_and_people_write_them(exported, kept):
    environ = dict(exported)
    environment.check_threads(environ)
    assert environ == kept


@pytest.mark.parametrize("value", ["0", "-1", "auto", "2.0", "4 cores", "2,", ",", "²", "9999999999", "65537"])
@pytest.mark.parametrize("name", environment.NUMBERS_OF_THREADS)
def test_what_is_not_a_number_of_threads_is_refused(name, value):
    with pytest.raises(FlagError) as caught:
        environment.check_threads({name: value})
    assert f"{name}={value}: must be a whole number from 1 to 65536" in str(caught.value)
    assert ("level of nesting" in str(caught.value)) == (name == "OMP_NUM_THREADS")


def test_a_list_of_threads_is_only_for_openmp():
    """Fault: TF_NUM_INTRAOP_THREADS=2,1 was a traceback."""
    with pytest.raises(FlagError, match="TF_NUM_INTRAOP_THREADS=2,1"):
        environment.check_threads({"TF_NUM_INTRAOP_THREADS": "2,1"})


@pytest.mark.parametrize("name", ["TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"])
def test_an_exported_number_of_threads_that_is_none_is_refused(trained, tmp_path, name):
    """Fault: a traceback for `export TF_NUM_INTRAOP_THREADS=auto`."""
    process, _ = trained(tmp_path / "run", {name: "auto"})
    assert process.returncode == 64 and f"{name}=auto: must be a whole number" in error_lines(process)[0]
    assert "Traceback" not in process.stderr and os.listdir(tmp_path) == []


def test_tensorflow_is_found_under_either_of_its_names(monkeypatch):
    def installed(name):
        if name != "tensorflow-cpu":
            raise environment.metadata.PackageNotFoundError(name)
        return "2.15.1"

    monkeypatch.setattr(environment.metadata, "version", installed)
    assert environment.version("tensorflow") == "2.15.1" and environment.version("numpy") is None

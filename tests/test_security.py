"""Check what SECURITY.md states: nothing is unpickled or evaluated, no secret is written, files are not for others."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, lacking

from resnet_cpu.cluster import environment
from resnet_cpu.errors import printable
from resnet_cpu.run import atomic
from resnet_cpu.run.folder import RunFolder

SOURCES = sorted((ROOT / "resnet_cpu").rglob("*.py"))
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
#: Modules that execute what they read, or that start Horovod's servers, which do.
UNSAFE_MODULES = re.compile(
    r"(pickle|cPickle|_pickle|cloudpickle|dill|marshal|shelve|joblib|yaml|tensorboard|socketserver)(\.|$)|http\.server"
    r"|multiprocessing\.(managers|connection)|horovod\.(run|runner|spark|ray|elastic|tensorflow\.elastic)(\.|$)"
)
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {"load_model", "system", "popen", "extractall", "extract", "unpack_archive", "urlopen", "urlretrieve"}
UNSAFE_WORDS = re.compile(
    r"horovodrun|\belastic\.|broadcast_object|allgather_object|enable_unsafe_deserialization|saved_model\.load|experimental\.server"
)


def unsafe(source):
    """Return the unsafe imports, calls, arguments and words of a Python source, comments and docstrings left out."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if UNSAFE_MODULES.match(name.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if UNSAFE_MODULES.match(name)]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                found.append(node.func.id)
            if isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS:
                found.append(node.func.attr)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
                if keyword.arg in ("allow_pickle", "shell", "download") and value is not False:
                    found.append(f"{keyword.arg}={value}")
        elif isinstance(node, ast.Attribute):
            found += UNSAFE_WORDS.findall(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found += UNSAFE_WORDS.findall(node.value)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_evaluated_extracted_or_downloaded(path):
    assert not unsafe(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing.managers import BaseManager",
        "def f():\n    import cloudpickle as c",
        "import shelve, marshal",
        "from horovod.runner import run",
        "import horovod.spark",
        "import yaml",
        "numpy.load(f, allow_pickle=True)",
        "numpy.load(f, allow_pickle=wanted)",
        "subprocess.run(c, shell=True)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "tf.keras.models.load_model(path)",
        "tf.saved_model.load(path)",
        "hvd.broadcast_object(x)",
        "hvd.elastic.run(train)",
        "tf.profiler.experimental.server.start(6009)",
        "from tensorboard import program",
        "archive.extractall(path)",
        "subprocess.run(['horovodrun', '-np', '2'])",
        "tfds.load(name, download=True)",
        "urllib.request.urlopen(url)",
    ],
)
def test_negative_control_unsafe_code_is_found(source):
    assert unsafe(source), source


def test_negative_control_safe_code_passes():
    assert not unsafe('"""Not horovodrun."""\nnumpy.load(f, allow_pickle=False)\nsubprocess.run(c)  # no horovodrun\n')


@pytest.mark.training
def test_horovod_is_built_without_gloo():
    core = pytest.importorskip("horovod.tensorflow")
    assert core.mpi_built() and not core.gloo_built()


def requirements_without_hash(text):
    """Return the requirements in the text of a lock that no SHA-256 belongs to."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", line) or "==" not in line]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_requirement_is_pinned_with_a_hash(path):
    text = path.read_text(encoding="utf-8")
    assert "==" in text and not requirements_without_hash(text)


def test_negative_control_a_requirement_without_hash_is_found():
    digest = "0" * 64
    assert requirements_without_hash(f"a==1 \\\n    --hash=sha256:{digest}\nb==2\n") == ["b==2"]
    assert requirements_without_hash(f"c>=2 --hash=sha256:{digest}\n") and requirements_without_hash(
        "d==1 --hash=md5:0\n"
    )


def test_the_installer_demands_the_hashes():
    installs = re.findall(r"pip install .*-r .*", (ROOT / "launch" / "install.sh").read_text(encoding="utf-8"))
    assert installs and all("--require-hashes" in line for line in installs)


#: Values that must not appear in anything that a run writes.
CANARY = "canary123"
SECRETS = {
    "MY_SECRET_TOKEN": CANARY,
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "HTTPS_PROXY": f"http://user:{CANARY}@proxy:3128",
    "TF_VAR_DB_PASSWORD": CANARY,
    "HOROVOD_SECRET_KEY": CANARY,
    "OMPI_MCA_orte_precondition_transports": CANARY,
    "PMI_KEY": CANARY,
}


def files_below(folder):
    return [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]


def holding(folder, text):
    """Return the files below a folder that hold a text."""
    found = []
    for path in files_below(folder):
        with open(path, "rb") as file:
            if text.encode() in file.read():
                found.append(path)
    return found


def without_network():
    """Return the words that start a command without any network, not even this host's own; none without root."""
    words = ["unshare", "--net"]
    usable = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if usable else []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one process with secrets exported, umask 0 and, as root, no network: the process and its folder."""
    folder = tmp_path_factory.mktemp("secrets")
    recipe = ["--dataset=synthetic", "--train_examples=48", "--num_classes=10", "--phase=main:steps=4,lr=0.05"]
    tiny = [flag for flag in TINY_FLAGS if not flag.startswith(("--dataset", "--phase"))]
    command = [sys.executable, "-m", "resnet_cpu.train", *tiny, *recipe, "--profile_steps=2,3", "--threads=1"]
    process = subprocess.run(
        [*without_network(), "bash", "-c", 'umask 0; exec "$@"', "bash", *command, f"--run_dir={folder / 'run'}"],
        cwd=ROOT,
        env={**OUTSIDE, **SECRETS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process, folder / "run"


@pytest.mark.training
def test_no_secret_of_the_environment_is_written_or_printed(trained):
    process, run_dir = trained
    assert len(files_below(run_dir)) > 8
    assert CANARY not in process.stdout + process.stderr
    assert holding(run_dir, CANARY) == []
    assert holding(run_dir, "--num_classes=10")  # negative control: what is recorded is found


@pytest.mark.training
def test_no_file_is_world_writable_whatever_the_umask(trained):
    for parent, folders, names in os.walk(trained[1]):
        for name in [".", *folders, *names]:
            mode = os.stat(os.path.join(parent, name)).st_mode
            assert not mode & stat.S_IWOTH, (parent, name, oct(mode))


def test_negative_control_umask_0_makes_files_that_everyone_may_write(tmp_path):
    subprocess.run(["bash", "-c", f"umask 0; echo >{tmp_path}/file"], check=True)
    assert os.stat(tmp_path / "file").st_mode & stat.S_IWOTH


@pytest.mark.training
def test_training_needs_no_network(trained):
    if not without_network():
        lacking("unshare --net needs root")
    assert trained[0].returncode == 0


def test_negative_control_there_is_no_network_in_the_namespace():
    if not without_network():
        lacking("unshare --net needs root")
    code = "import socket; socket.create_connection(('127.0.0.1', 9), 2)"
    process = subprocess.run([*without_network(), sys.executable, "-c", code], capture_output=True, text=True)
    assert "unreachable" in process.stderr


def test_variables_that_may_hold_secrets_are_not_recorded():
    found = environment.settle(dict(SECRETS))
    assert CANARY not in str(found)
    assert environment.settle({"TF_NUM_INTEROP_THREADS": "2"}).variables["TF_NUM_INTEROP_THREADS"] == "2"


def test_a_temporary_file_that_someone_has_put_there_is_not_written_through(tmp_path):
    """A link with the name of the temporary file, made by another user in a shared folder."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    os.symlink(victim, f"{tmp_path / 'file'}.tmp{os.getpid()}")
    atomic.write_atomically(str(tmp_path / "file"), b"new")
    assert victim.read_text() == "kept" and (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink() and sorted(os.listdir(tmp_path)) == ["file", "victim"]


@pytest.mark.parametrize("mode, warned", [(0o777, True), (0o1777, True), (0o775, False), (0o755, False)])
def test_a_run_folder_that_every_user_may_write_to_gets_one_warning(tmp_path, capsys, mode, warned):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    RunFolder(str(folder)).close()
    printed = capsys.readouterr().err
    assert printed.count("warning: --run_dir=") == int(warned) and ("every user" in printed) == warned


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a folder of another user")
def test_a_run_folder_of_another_user_gets_one_warning(tmp_path, capsys):
    os.chown(tmp_path, 12345, 12345)
    RunFolder(str(tmp_path)).close()
    assert capsys.readouterr().err.count("belongs to user 12345") == 1


def test_control_characters_are_escaped_in_messages(run_command, tmp_path):
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\\x1b[2Jb\\nc\\u202ed" and printable("läuft – gut") == "läuft – gut"
    process = run_command("plan", f"--flagfile={tmp_path}/\x1b[2J\nresnet_cpu: all is well")
    assert process.returncode == 64 and "\x1b" not in process.stderr and len(process.stderr.splitlines()) == 1
    for flag in ("--run_dir=a\x1b[2J", "--run_dir=$NAME"):
        process = run_command("plan", flag, NAME="a\x1b[2J")
        assert process.returncode == 64 and "control character" in process.stderr and "\x1b" not in process.stderr


def test_control_characters_in_variables_are_escaped_in_warnings(run_command):
    process = run_command("launch", "--dry_run", "--ranks=1", "--", "true", ITEX_LAYOUT_OPT="\x1b[2J")
    assert "not obeyed" in process.stderr and "\x1b" not in process.stderr


def named_tests(text):
    """Return (file, function or None) for each test that a document names."""
    return re.findall(r"\btests/(\w+(?:/\w+)?\.py)(?:::(test_\w+))?", text)


def test_the_tests_that_the_document_names_exist():
    named = named_tests((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10 and any(function for _, function in named)
    for file, function in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE), (file, function)

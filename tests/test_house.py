"""The house: who may import whom, who may import what, and no reading of global flags below the entry points."""

import ast
import pathlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "resnet_cpu"
DOORS = {"train", "evaluate", "benchmark", "plan", "prepare", "tables", "launch", "simulate", "doctor"}
MOST_LINES = {"door": 50, "function": 80, "module": 400}
THE_LOOP = ("training/loop", "train")  # the one function that may be longer
# Rooms from the top down. A module may import from its own room and from every level below its own.
LEVELS = [
    DOORS,
    {"training", "bench", "simulator", "diagnosis", "commandline"},
    {"report"},
    {"run", "data", "model", "optim", "scaling"},
    {"settings", "command_settings", "fields", "flagfiles", "resolve", "text"},
    {"cluster", "recipe", "faults"},
    {"errors"},
]
WITHOUT_TENSORFLOW = [
    "recipe",
    "settings",
    "command_settings",
    "fields",
    "flagfiles",
    "resolve",
    "text",
    "commandline",
    "errors",
    "faults",
    "scaling",
    "simulator",
    "run",
    "data/order",
    "data/shards",
    "data/folders",
    "data/datasets",
    "data/images",
    "data/progress",
    "data/sources/archives",
    "data/sources/conversion",
    "data/sources/image_files",
    "data/sources/writing",
    "data/array_records",
    "data/kinds",
    "training/agreement",
    "data/tfds",
    "data/classes",
    "model/tensors",
    "cluster/control",
    "cluster/guard",
    "cluster/machine",
    "cluster/placement",
    "cluster/seats",
    "cluster/allocation",
    "cluster/streams",
    "cluster/launchers",
    "cluster/start",
    "cluster/tuning",
    "diagnosis/checks",
    "diagnosis/facts",
    "diagnosis/examination",
    "report/tables",
    "report/plan_table",
    "training/opening",
    "training/ensemble",
    "plan",
    "launch",
    "simulate",
    "tables",
    "doctor",
]


def modules():
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: pathlib.Path, top_level_only: bool = False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level_of(name):
    room = name.split("/")[0]
    return next(number for number, rooms in enumerate(LEVELS) if room in rooms)


def violations(name, imported):
    """Return what of `imported` the module `name` must not import: a room above its own, or another door."""
    found = []
    for target in (i.split(".")[1] for i in imported if i.startswith("resnet_cpu.")):
        same_room = target == name.split("/")[0]
        if level_of(target) < level_of(name) or (target in DOORS and not same_room):
            found.append(target)
    return found


def test_no_circle_of_imports_between_modules():
    names = set(modules())
    graph = {}
    for name, path in modules().items():
        found = {
            i.replace("resnet_cpu.", "", 1).replace(".", "/") for i in imports(path) if i.startswith("resnet_cpu.")
        }
        graph[name] = {one for i in found for one in (i, i.rpartition("/")[0]) if one in names and one != name}
    done, active = set(), []

    def visit(name):
        assert name not in active, f"circle: {' -> '.join([*active[active.index(name) :], name])}"
        if name in done:
            return
        active.append(name)
        for other in sorted(graph[name]):
            visit(other)
        active.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__init__")])
def test_imports_point_one_way(name):
    assert not violations(name, imports(modules()[name]))


def test_negative_control_a_wrong_import_is_seen():
    assert violations("recipe/phases", ["resnet_cpu.training.loop"])
    assert violations("data/shards", ["resnet_cpu.report.tables"])
    assert violations("train", ["resnet_cpu.evaluate"])
    assert violations("training/loop", ["resnet_cpu.train"])
    assert not violations("training/loop", ["resnet_cpu.data.order", "resnet_cpu.errors"])


def test_only_one_module_imports_horovod_and_one_mpi4py():
    def importers(package):
        return {name for name, path in modules().items() if any(i.split(".")[0] == package for i in imports(path))}

    assert importers("horovod") == {"cluster/horovod"}
    assert importers("mpi4py") == {"cluster/control"}


def test_the_early_part_loads_without_tensorflow():
    for name, path in modules().items():
        if any(name == early or name.startswith(early + "/") for early in WITHOUT_TENSORFLOW):
            assert not [i for i in imports(path) if i.split(".")[0] in ("tensorflow", "horovod")], name


def test_packages_are_empty_and_there_is_no_room_for_odds_and_ends():
    for name, path in modules().items():
        if name.endswith("__init__"):
            assert path.read_text() == "", name
        assert path.stem not in ("utils", "helpers", "common", "misc"), name


def too_long(name, text):
    """Return what of a module is longer than a reader takes in: the module itself, a door, or a function."""
    lines = len(text.splitlines())
    found = [f"{name}: {lines} lines"] if lines > MOST_LINES["door" if name in DOORS else "module"] else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (name, node.name) != THE_LOOP:
            length = node.end_lineno - node.lineno + 1
            if length > MOST_LINES["function"]:
                found.append(f"{name}: {node.name}: {length} lines")
    return found


def test_doors_functions_and_modules_are_short():
    assert not [one for name, path in modules().items() for one in too_long(name, path.read_text())]


def test_negative_control_what_is_too_long_is_seen():
    assert too_long("recipe/phases", "x = 1\n" * 401)
    assert too_long("train", "x = 1\n" * 51)
    assert too_long("recipe/phases", "def f():\n" + "    x = 1\n" * 80)
    assert not too_long("training/loop", "def train():\n" + "    x = 1\n" * 100)


def test_no_mode_is_a_branch_in_the_loop_or_the_step():
    for name in ("training/loop", "training/step"):
        text = modules()[name].read_text()
        assert "experiment" not in text and "is_rank0" not in text and "rank == 0" not in text, name


def test_every_experiment_parses_and_plans():
    from resnet_cpu import commandline, plan

    shared = {
        "base.flags",
        "authors.flags",
        "small.flags",
        "small_full.flags",
        "intel.flags",
        "mlperf_lars.flags",
    }  # hold no phase
    files = [file for file in sorted((ROOT / "experiments").rglob("*.flags")) if file.name not in shared]
    assert len(files) >= 30
    for file in files:
        assert commandline.parse([f"--flagfile={file}"]).recipe.phases, file
        plan.main([f"--flagfile={file}", "--ranks=2"])

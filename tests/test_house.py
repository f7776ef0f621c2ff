"""The house: who may import whom, who may import what, and no reading of global flags below the entry points."""

import ast
import pathlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "resnet_cpu"
ENTRY_POINTS = {"train", "evaluate", "benchmark", "plan", "prepare", "tables", "launch", "simulate"}
# room -> rooms it may import from besides itself, errors and settings.
ALLOWED = {
    "recipe": set(),
    "data": {"recipe"},
    "model": {"recipe"},
    "optim": {"recipe"},
    "cluster": {"recipe"},
    "scaling": {"recipe"},
    "report": {"recipe", "data", "cluster", "scaling"},
    "training": {"recipe", "data", "model", "optim", "cluster", "report", "scaling"},
    "flags": {"recipe", "data", "scaling"},
    "settings": {"recipe"},
    "errors": set(),
}
WITHOUT_TENSORFLOW = [
    "recipe",
    "flags",
    "settings",
    "errors",
    "data/order",
    "data/shards",
    "data/layouts",
    "data/datasets",
    "scaling",
    "launch",
    "simulate",
    "cluster/control",
    "cluster/guard",
    "cluster/topology",
    "cluster/layout",
    "cluster/launchers",
    "cluster/tuning",
    "report/provenance",
    "training/job",
    "training/checkpoint",
    "training/ensemble",
    "training/past_run",
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


def violations(name, imported):
    """Return what of `imported` the module `name` must not import."""
    room = name.split("/")[0]
    if room in ENTRY_POINTS:
        return [i for i in imported if i.startswith("resnet_cpu.") and i.split(".")[1] in ENTRY_POINTS]
    allowed = ALLOWED[room] | {room, "errors", "settings"}
    return [i for i in imported if i.startswith("resnet_cpu.") and i.split(".")[1] not in allowed]


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__init__")])
def test_imports_point_one_way(name):
    assert not violations(name, imports(modules()[name]))


def test_negative_control_a_wrong_import_is_seen():
    assert violations("recipe/phases", ["resnet_cpu.training.loop"])
    assert violations("data/shards", ["resnet_cpu.report.runlog"])
    assert violations("train", ["resnet_cpu.evaluate"])


def test_only_one_module_imports_horovod_and_one_mpi4py():
    def importers(package):
        return {name for name, path in modules().items() if any(i.split(".")[0] == package for i in imports(path))}

    assert importers("horovod") == {"cluster/horovod"}
    assert importers("mpi4py") == {"cluster/control"}


def test_the_early_part_loads_without_tensorflow():
    for name, path in modules().items():
        if any(name == early or name.startswith(early + "/") for early in WITHOUT_TENSORFLOW):
            assert not [i for i in imports(path) if i.split(".")[0] in ("tensorflow", "horovod")], name


def test_nothing_is_unpickled_and_horovods_launcher_is_never_used():
    for name, path in modules().items():
        found = set(imports(path))
        assert not {i for i in found if i.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve", "marshal")}, name
        assert not {i for i in found if i.startswith(("horovod.run", "horovod.spark", "horovod.ray"))}, name
        text = path.read_text()
        for word in (
            "broadcast_object",
            "allgather_object",
            "allow_pickle=True",
            "load_model",
            "shell=True",
            "elastic.",
        ):
            assert word not in text, (name, word)


def test_packages_are_empty_and_there_is_no_room_for_odds_and_ends():
    for name, path in modules().items():
        if name.endswith("__init__"):
            assert path.read_text() == "", name
        assert path.stem not in ("utils", "helpers", "common", "misc"), name


def test_every_experiment_parses_and_plans():
    from resnet_cpu import flags, plan

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
        assert flags.parse([f"--flagfile={file}"]).recipe.phases, file
        plan.main([f"--flagfile={file}", "--ranks=2"])

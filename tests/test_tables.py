"""Tables: from run folders and published figures to documents, and whether the committed tables are up to date."""

import csv
import json
import os
import re
import statistics

import numpy as np
import pytest
from conftest import ROOT

from resnet_cpu import commandline, tables
from resnet_cpu.errors import DataError
from resnet_cpu.report import accuracy, border_runs, efficiency, studies
from resnet_cpu.report import tables as report
from resnet_cpu.resolve import resolve_recipe
from resnet_cpu.run import signature
from resnet_cpu.run.folder import RunFolder
from resnet_cpu.scaling import steptimes
from resnet_cpu.training import ensemble

EXPERIMENTS = ROOT / "experiments"
BORDER = EXPERIMENTS / "collapsed_ensemble" / "border"
SPEC_COLUMNS = "table,label,runs,what,flagfile,published\n"


@pytest.fixture
def committed(monkeypatch):
    """The tables that `make tables` would write from the committed CSV files."""
    monkeypatch.chdir(ROOT)
    return studies.read().tables


def test_documents_hold_what_make_tables_writes(committed):
    texts = {name: (ROOT / name).read_text() for name in report.DOCUMENTS if (ROOT / name).exists()}
    marked = {name for name, text in texts.items() if "<!-- table: " in text}
    assert marked >= {"docs/results.md", "docs/scaling.md"}
    for name in marked:
        assert report.fill(texts[name], committed) == texts[name], name
    # Negative control: a figure that was edited by hand is found.
    text = texts["docs/results.md"]
    changed = re.sub(r"(<!-- table: ensemble -->\n.*?)\d\d\.\d\d", r"\g<1>99.99", text, count=1, flags=re.S)
    assert changed != text and report.fill(changed, committed) == text


_TABLE = re.compile(r"<!-- table: .*?<!-- end of table -->", re.S)
_FIGURE = re.compile(r"(?<![\d.,])[+-]\d+\.\d\d(?!\d)")
# Texts that argue with the figures of the tables.
ARGUED = ("README.md", "CHANGELOG.md", "docs/results.md", "docs/ensemble.md")
EARLIER = {"-0.57"}  # the first version of the predictions: commit aeed050


def not_in_a_table(texts):
    """Return the differences (signed, two decimals) that the texts state and none of their tables has."""
    held = {figure for text in texts for table in _TABLE.findall(text) for figure in _FIGURE.findall(table)}
    return {figure for text in texts for figure in _FIGURE.findall(_TABLE.sub("", text))} - held - EARLIER


def test_differences_in_texts_are_those_of_the_tables():
    texts = [(ROOT / name).read_text() for name in ARGUED]
    assert len(_FIGURE.findall(_TABLE.sub("", texts[2]))) > 20
    assert not_in_a_table(texts) == set()
    # Negative control: a text that was not brought up to date after new runs.
    assert not_in_a_table([*texts, "the ensemble is 123.45 points ahead (+99.12 ... +0.40)"]) == {"+99.12"}


def test_committed_csv_and_latex_are_what_make_tables_writes(committed, tmp_path):
    assert len(committed) >= 9
    for name, table in committed.items():
        report.write_csv(str(tmp_path / "table.csv"), table.rows, table.csv_columns)
        assert (tmp_path / "table.csv").read_text() == (EXPERIMENTS / "results" / f"{name}.csv").read_text(), name
        assert report.latex(table) == (EXPERIMENTS / "results" / f"{name}.tex").read_text(), name


def test_every_measured_figure_is_the_mean_of_its_runs(committed):
    rows = list(csv.DictReader((EXPERIMENTS / "results" / "runs.csv").open()))
    mine = [100 * float(r["top1"]) for r in rows if r["run"].startswith("ensemble/cycles/") and r["what"] == "ensemble"]
    assert len(mine) >= 3 and len({r["seed"] for r in rows if r["run"].startswith("ensemble/cycles/")}) >= 3
    columns = dict(committed["ensemble"].columns)
    shown = columns["top-1, %"][columns["what"].index("**ensemble of all three**")]
    assert shown == f"{statistics.mean(mine):.2f} ± {statistics.stdev(mine):.2f}"


def test_every_published_figure_has_a_source_and_every_flagfile_exists():
    published = report.read_csv(str(EXPERIMENTS / "published.csv"))
    assert len({row["id"] for row in published}) == len(published)
    for row in published:
        assert row["source"] and row["value"] and row["kind"] in ("read", "derived"), row
    for row in report.read_csv(str(EXPERIMENTS / "tables.csv")):
        assert (EXPERIMENTS / row["flagfile"]).is_file(), row


def test_every_row_of_the_index_names_files_that_exist_and_lists_all_flagfiles():
    text = (EXPERIMENTS / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(linked) > 40
    for path in linked:
        assert (EXPERIMENTS / path).exists(), path
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| experiment", "| flagfile"))
    ]
    assert all(".flags](" in row for row in rows)
    files = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.flags")}
    assert files <= set(linked), files - set(linked)


def test_flagfiles_are_short_and_name_their_source():
    for path in EXPERIMENTS.rglob("*.flags"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# "), path
        assert sum(line.startswith("--") for line in lines) <= 17, path
        if path.parent != EXPERIMENTS and any(line.startswith("--run_dir") for line in lines):
            head = "\n".join(line for line in lines if line.startswith("#"))
            assert "Command" in head and "xpected" in head, path


# Of each data set of the committed runs: training images, mean and deviation of their pixels, digest of the classes.
DATA = {
    "fashion_mnist": (60000, ((72.9404,) * 3, (90.0212,) * 3), None),
    "cifar10": (
        50000,
        ((125.5384, 123.3055, 113.99), (62.6079, 61.9863, 66.5736)),
        "fcdc2e1a755ed3463be7e0a84987dac8d36a8636d40302c9b309ab53f8679071",
    ),
    "half_tiny_imagenet": (
        45000,
        ((123.9004, 115.7658, 102.3676), (66.0973, 64.196, 67.8652)),
        "6042040903a31d77fc112b5a7d76b1532d3cdedeb3bca23f0d78a835dcf1d3ea",
    ),
    "tiny_imagenet": (
        100000,
        ((121.8716, 113.5472, 100.8325), (70.2899, 68.2186, 71.4118)),
        "fc4944cf9a7ee2a6d4d6804005b2ffa90100e3dba5090d8f56b9d8c4b660540a",
    ),
}


def recipe_of(*flags):
    """Return the digest of the recipe that a run with these flags records, on the data set that they name."""
    settings = commandline.parse([*flags, "--seed=5"])
    whole, pixels, classes = DATA[os.path.basename(settings.data.data_dir or settings.data.dataset)]
    examples = settings.data.train_examples or whole
    recorded = signature.of(settings, resolve_recipe(settings, 1, examples), examples, pixels, classes=classes)
    return accuracy.recipe_digest(recorded)


def test_flagfiles_read_the_data_set_that_their_command_prepares():
    seen = 0
    for path in EXPERIMENTS.rglob("*.flags"):
        text = path.read_text()
        for prepared in re.findall(r"resnet_cpu\.prepare (\w+)", text):
            assert f"--dataset={prepared}\n" in text, path
            seen += 1
    assert seen >= 2


def test_committed_runs_have_the_recipes_of_their_flagfiles(monkeypatch):
    """A new run of a flagfile can be averaged with the committed ones: the code has not orphaned them."""
    monkeypatch.chdir(ROOT)
    runs = report.read_results(accuracy.RUNS)
    lines = [
        line
        for line in report.read_csv("experiments/tables.csv")
        if line["flagfile"].endswith(".flags") and not line["table"].startswith("search_")  # these change the recipe
    ]
    recipes = {
        (line["table"], line["flagfile"], run["recipe"], run["global_batch_size"])
        for line in lines
        for run in report.find_runs(line, runs)
    }
    assert len(recipes) >= 17
    for table, flagfile, recipe, batch in recipes:
        flags = [f"--flagfile=experiments/{flagfile}"]
        if "ladder" in table:
            flags += [f"--global_batch_size={batch}"]
        if table == "ladder_cifar_20":  # as reproduce.sh
            flags += re.findall(
                "^--phase=.*", (EXPERIMENTS / flagfile).read_text().replace("epochs=10,", "epochs=20,"), re.M
            )
        assert recipe_of(*flags) == recipe, (table, flagfile)


def test_committed_runs_of_the_border_experiment_have_the_recipes_of_their_flagfiles(monkeypatch):
    monkeypatch.chdir(ROOT)
    arms = border_runs.by_place(report.read_results(accuracy.RUNS))
    decays = {(row["setting"], row["arm"]): float(row["decay"]) for row in report.read_csv(str(BORDER / "decays.csv"))}
    checked = 0
    for place, seeds in arms.items():
        flagfile = f"experiments/collapsed_ensemble/border/{place.arm}.flags"
        if place.setting not in ("tiny", "tuned") or not os.path.exists(flagfile):
            continue
        flags = [f"--flagfile={flagfile}", f"--train_examples={place.images}"]
        own = decays.get((border_runs.name_of(*place[:2]), place.arm))
        assert own or place.setting == "tiny"
        if own:  # as with_decay of experiments/reproduce.sh
            decay = own / 2e-3
            text = (ROOT / flagfile).read_text()
            text = re.sub(r"wd=([\de.-]+)", lambda found: f"wd={float(found[1]) * decay:.6g}", text)  # noqa: B023
            flags += re.findall(r"^--phase=.*", text, flags=re.M)
        for rows in seeds.values():
            assert {row["recipe"] for row in rows.values()} == {recipe_of(*flags)}, place
            checked += 1
    assert checked >= 9


def not_the_best(decays, runs):
    """Return the rows of decays.csv that are not the best of three or more in their search.

    `half` stands for single models, except in the repetition, where `one` and `third` have a search with all of the
    budget, and on CIFAR-10, where `one` does. Tiny-ImageNet with 45,000 images has the values of CIFAR-10 with 50,000.
    """
    found = []
    for row in decays:
        search, arm = row["setting"].replace("tuned", "tiny").replace("again", "tiny"), row["arm"]
        search = search.replace("tiny-45000", "cifar-50000")
        if row["setting"] == "again-5000" and arm in ("one", "third"):
            search = "whole-5000"
        elif search.startswith("cifar"):
            search, arm = f"whole-{search}", "one" if arm in border_runs.SINGLES else arm
        elif arm in border_runs.SINGLES:
            arm = "half"
        name = re.compile(rf"search_border/{search}/{arm}-([\de-]+)/seed-9")
        found_scores = [(name.fullmatch(run["run"]), float(run["top1"])) for run in runs if run["what"] == "ensemble"]
        scores = {match[1]: top1 for match, top1 in found_scores if match}
        if len(scores) < 3 or max(scores, key=scores.get) != row["decay"]:
            found.append(row)
    return found


def test_the_weight_decays_of_tuned_settings_are_the_best_of_their_search():
    decays, runs = (
        report.read_csv(str(BORDER / "decays.csv")),
        report.read_csv(str(EXPERIMENTS / "results" / "runs.csv")),
    )
    decays = [row for row in decays if row["setting"] != "heavier-10000"]  # a harder opponent, without a search
    assert decays and not not_the_best(decays, runs)
    # Negative controls: another decay, and a search that is not finished.
    other = [{**row, "decay": "1e-9"} for row in decays]
    assert not_the_best(other, runs) == other
    assert not_the_best(decays, [run for run in runs if "half-8e-3" not in run["run"]]) != []


TREE = [
    "--dataset=digits",
    "--model=resnet18",
    "--batch_size=12",
    "--experiment=collapsed_ensemble",
    "--phase=main:steps=4,lr=0.05",
    "--phase=tail:steps=2,lr=0.02,branch=1,member=1",
    "--phase=cycle:steps=4,lr=0.04",
    "--phase=collapse:steps=2,lr=0.01,branch=1,member=1",
]
ENDS = {"main": 4, "tail": 6, "cycle": 10, "collapse": 12}


def record_of(settings, ranks=1, code="c"):
    recorded = signature.of(settings, resolve_recipe(settings, ranks, 50), 50, None)
    per_rank = [{"cpu": "a processor", "host": "h"}] * ranks
    return {"per_rank": per_rank, "versions": {"tensorflow": "2.15.1"}, "code": code, "signature": recorded}


def write_run(path, seed=0, complete=True, **recorded):
    """Write what a run of TREE leaves; `recorded` replaces entries of run.json. Return its result."""
    settings = commandline.parse([*TREE, f"--run_dir={path}", f"--seed={seed}"])
    generator = np.random.default_rng(seed)
    labels = np.arange(20) % 10
    scores = {name: generator.random([20, 10]) + 0.4 * np.eye(10)[labels] for name in ("tail", "collapse")}
    members = {
        name: ensemble.Predictions(np.arange(20), labels, (rows / rows.sum(1, keepdims=True)).astype(np.float32))
        for name, rows in scores.items()
    }
    result = {
        **{"experiment": "collapsed_ensemble", "examples": 20, "steps": 12, "epochs": 2.88, "ranks": 1, "seed": seed},
        **{"global_batch_size": 12, "images_per_second": 50.0, "images_per_second_per_core": 50.0},
        **{"top1": 0.5 + seed / 100, "top5": 0.9, "loss": 1.5, "wall_seconds": 12.5, "complete": complete},
        **(ensemble.report(members) if complete else {}),
    }
    folder = RunFolder(str(path))
    for phase, end in ENDS.items():
        row = {"step": end - 1, "epoch": end * 12 / 50, "phase": phase, "end_of": phase, "wall_seconds": 1.0 * end}
        folder.append("eval.jsonl", {**row, "top1": end / 100, "top5": 0.9, "loss": 1.5, "attempt": 1})
    folder.write_json("run.json", {**record_of(settings), **recorded})
    folder.write_json("result.json", result)
    folder.close()
    return result


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with experiments/, whose tables the test writes; the runs are in another one."""
    place = tmp_path / "place"
    (place / "experiments" / "results").mkdir(parents=True)
    (place / "experiments" / "published.csv").write_bytes((EXPERIMENTS / "published.csv").read_bytes())
    monkeypatch.chdir(place)
    return place


def results_of(place):
    return {path.name: path.read_bytes() for path in (place / "experiments" / "results").glob("*.csv")}


def test_run_folders_become_tables_and_collecting_them_again_changes_nothing(place, tmp_path, capsys):
    runs = tmp_path / "runs"
    scored = [write_run(runs / "mine" / f"seed-{seed}", seed) for seed in (0, 1)]
    write_run(runs / "cut", complete=False)
    (place / "experiments" / "tables.csv").write_text(
        SPEC_COLUMNS + "t,the ensemble,mine/seed-*,ensemble,x.flags,b_top1\nt,never run,nowhere,last,y.flags,\n"
    )
    document = place / "README.md"
    document.write_text("before\n<!-- table: t -->\nold\n<!-- end of table -->\nafter\n")
    (place / "docs").mkdir()
    (place / "docs" / "scaling.md").write_text("no marks\n")
    tables.main([f"--runs={runs}"])
    assert "cut: skipped, because this run has not finished" in capsys.readouterr().err
    values = [100 * result["ensemble"]["top1"] for result in scored]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert sorted(os.listdir(place)) == ["README.md", "docs", "experiments"]  # other documents are not created
    assert os.listdir(place / "docs") == ["scaling.md"] and (place / "docs/scaling.md").read_text() == "no marks\n"
    rows = {row["what"]: row for row in report.read_results("runs.csv") if row["seed"] == "0"}
    assert list(rows) == [
        *("last", "end_of:main", "end_of:tail", "end_of:cycle", "end_of:collapse", "member:tail", "member:collapse"),
        *("ensemble", "best_member", "best_subset", "prefix:1", "prefix:2", "last_m:1", "last_m:2"),
    ]
    assert rows["ensemble"]["steps"] == "12" and rows["member:tail"]["steps"] == ""
    assert rows["end_of:tail"]["steps"] == "6" and rows["end_of:tail"]["wall_seconds"] == "6"
    assert rows["last"]["cores"] == "1" and rows["last"]["cpu"] == "a processor"
    assert f"| the ensemble | 76.278 % | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} | 2 |" in text
    assert "| never run |  | not run | 0 |" in text and "sara-nl/caffe" in text
    assert r"76.278 \% & " in (place / "experiments" / "results" / "t.tex").read_text()
    assert len(report.read_results("curves.csv")) == 8
    first = results_of(place)
    tables.main([f"--runs={runs}"])
    tables.main([])
    assert first == results_of(place)


def test_a_run_whose_loss_was_not_finite_is_counted_and_in_no_mean(place, tmp_path):
    spec = "t,all,mine/*,last,x.flags,\n"
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS + spec)
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "mine" / f"seed-{seed}", seed)
    failed = write_run(tmp_path / "runs" / "mine" / "seed-2", 2, complete=False)
    os.remove(tmp_path / "runs" / "mine" / "seed-2" / "result.json")
    folder = RunFolder(str(tmp_path / "runs" / "mine" / "seed-2"))
    facts = {key: failed[key] for key in ("seed", "epochs", "ranks", "experiment")}
    folder.write_json("not_finite.json", {**facts, "steps": 7, "cores": 1})
    folder.close()
    folder = RunFolder(str(tmp_path / "runs" / "ladder"))  # has no accuracy
    folder.write_json("run.json", record_of(commandline.parse(TREE)))
    folder.write_json("not_finite.json", {**facts, "steps": 7, "experiment": "scaling"})
    folder.close()
    tables.main([f"--runs={tmp_path / 'runs'}"])
    (row,) = report.read_csv(str(place / "experiments" / "results" / "t.csv"))
    assert (row["n"], row["not_finite"], row["top1_mean"]) == ("2", "1", "0.505")
    (row,) = [row for row in report.read_results("runs.csv") if row["what"] == "not_finite"]
    assert (row["run"], row["seed"], row["steps"], row["top1"]) == ("mine/seed-2", "2", "7", "")
    table = studies.read().tables["t"]
    assert dict(table.columns)["not finite"] == ["1"] and "ended with code 77" in table.note
    assert table.note.count("a processor") == 1
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS + spec.replace("mine/*", "mine/seed-2"))
    assert dict(studies.read().tables["t"].columns)["top-1, %"] == ["not finite"]
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS + spec)
    write_run(tmp_path / "runs" / "mine" / "seed-2", 2)  # trained again, to its end
    tables.main([f"--runs={tmp_path / 'runs'}"])
    table = studies.read().tables["t"]
    assert "not finite" not in dict(table.columns) and "code 77" not in table.note


@pytest.mark.parametrize(
    "content, part",
    [
        (b"\xff\xfe", "not a CSV file in UTF-8"),
        (b'run,what\n"a', "not a CSV file in UTF-8"),
        (b"", "has no column run"),
        (b"run,seed\na,1\n", "has no column what"),
        (b"run,what,seed\na,last\n", "line 2: not as many cells as columns"),
        (b"run,what,seed\na,last,1,2\n", "line 2: not as many cells as columns"),
        (b"run,what,seed\na,last,1\nb,last,many\n", "line 3: seed is 'many', not a whole number"),
        (b"run,what,loss\na,last,nan\n", "line 2: loss is 'nan', not a number"),
        (b"run,what,steps\na,last,1.5\n", "line 2: steps is '1.5', not a whole number"),
    ],
)
def test_a_damaged_table_of_runs_is_named_with_its_line(place, content, part):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS)
    path = place / "experiments" / "results" / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        tables.main([])
    assert f"runs.csv: {part}" in str(caught.value)


@pytest.mark.parametrize("name", ["tables.csv", "published.csv"])
def test_a_table_of_another_kind_is_named_with_the_column_that_it_lacks(place, name):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS)
    (place / "experiments" / name).write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=f"{name}: has no column"):
        studies.read()


def test_a_table_of_runs_of_an_earlier_version_is_read(place, tmp_path):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS)
    write_run(tmp_path / "runs" / "mine")
    tables.main([f"--runs={tmp_path / 'runs'}"])
    rows = [dict(row) for row in report.read_results("runs.csv")]
    for row in rows:
        del row["temperature"], row["loss_scaled"], row["ece_scaled"], row["disagreement"]
    report.write_csv(str(place / "experiments" / "results" / "runs.csv"), rows, list(rows[0]))
    assert {row["disagreement"] for row in accuracy.read_runs()} == {""}


def test_an_unknown_table_in_a_document_changes_no_file(place, tmp_path):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS + "t,mine,mine,last,x.flags,\n")
    write_run(tmp_path / "runs" / "mine")
    tables.main([f"--runs={tmp_path / 'runs'}"])
    before = results_of(place)
    (place / "README.md").write_text("<!-- table: t -->\nold\n<!-- end of table -->\n")
    (place / "docs").mkdir()
    (place / "docs" / "results.md").write_text("<!-- table: tea -->\n<!-- end of table -->\n")
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS + "t,yours,mine,last,x.flags,\n")
    with pytest.raises(DataError, match="tea -->: table not found"):
        tables.main([])
    assert results_of(place) == before and "old" in (place / "README.md").read_text()


def test_a_run_itself_is_not_a_folder_of_runs(place, tmp_path):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS)
    write_run(tmp_path / "runs" / "mine")
    with pytest.raises(DataError, match="mine: is itself a run; name the folder above it"):
        tables.main([f"--runs={tmp_path / 'runs' / 'mine'}"])


def test_a_run_that_is_collected_again_replaces_its_rows_only(place, tmp_path):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS)
    write_run(tmp_path / "one" / "a")
    write_run(tmp_path / "one" / "b", code="first")
    tables.main([f"--runs={tmp_path / 'one'}"])
    write_run(tmp_path / "two" / "b", code="second")
    tables.main([f"--runs={tmp_path / 'two'}"])
    rows = report.read_results("runs.csv")
    assert {(row["run"], row["code"]) for row in rows} == {("a", "c"), ("b", "second")} and len(rows) == 28


def test_a_run_of_version_0_1_has_the_same_recipe_as_one_of_today(place, tmp_path):
    """Version 0.1 recorded every setting, today's code those that are not at their default."""
    today = record_of(commandline.parse([*TREE, "--seed=7"]))["signature"]
    phase = {"decay": "poly", "power": 1.0, "decay_from": "warmup_end", "boundary_steps": [], "gamma": 0.1}
    phase.update({"end_lr": 0.0, "warmup_steps": 0, "warmup_lr": 0.0, "wd": 1e-4, "momentum": 0.9, "augment": "full"})
    phase.update({"branch": False, "parent": None, "velocity": "keep", "member": False})
    old = {
        "model": {**today["model"], "width": 1.0, "stem": "imagenet", "bn_stats_batch": None},
        "data": {
            **today["data"],
            "resize": "bilinear",
            "crop": ["inception", 0.08, 1.0, 0.75, 1.3333],
            "order_block": 1,
        },
        "optimizer": ["sgd", 0.001],
        "seed": 3,
        "phases": {name: {**phase, **values} for name, values in today["phases"].items()},
        **{key: today[key] for key in ("global_batch_size", "order_of_phases")},
    }
    write_run(tmp_path / "today", 0)
    write_run(tmp_path / "old", 1, signature=old)
    write_run(tmp_path / "other", 2, signature={**old, "global_batch_size": 24})
    runs, _ = accuracy.collect(str(tmp_path))
    recipes = {row["run"]: row["recipe"] for row in runs}
    assert recipes["old"] == recipes["today"] != recipes["other"]


def row_of(run, seed="0", recipe="same"):
    return {
        **{"run": run, "what": "last", "seed": seed, "recipe": recipe, "top1": "0.5"},
        **{"cpu": "p", "ranks": "1", "cores": "1", "tensorflow": "2", "code": "c"},
    }


def test_a_line_never_averages_different_recipes_or_counts_a_seed_twice(capsys):
    spec = [{"table": "t", "label": "x", "runs": "a/*", "what": "last", "flagfile": "f", "published": ""}]
    alike = [row_of("a/0"), row_of("a/1", "1"), row_of("b/0", "0", "other")]
    assert accuracy.tables(spec, [], alike)["t"].rows[0]["n"] == "2"
    report.warn_of_unused("runs.csv", alike, spec)
    assert "no table has these runs of experiments/results/runs.csv: b/0; add a line" in capsys.readouterr().err
    with pytest.raises(DataError, match="a/0, a/2 have different recipes"):
        accuracy.tables(spec, [], [row_of("a/0"), row_of("a/2", "2", "other")])
    with pytest.raises(DataError, match="a/0, a/again have a seed in common"):
        accuracy.tables(spec, [], [row_of("a/0"), row_of("a/again")])


@pytest.mark.parametrize("kind", [accuracy, efficiency])
def test_an_unknown_published_figure_is_refused(kind):
    what = "efficiency" if kind is efficiency else "last"
    spec = [{"table": "t", "label": "x", "runs": "", "what": what, "flagfile": "f", "published": "nothing"}]
    with pytest.raises(DataError, match="published id nothing is not in published.csv"):
        kind.tables(spec, [], [])


def test_a_folder_without_experiments_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="experiments/tables.csv: .*root folder"):
        tables.main([])


def test_a_folder_without_runs_is_refused(place, tmp_path):
    (place / "experiments" / "tables.csv").write_text(SPEC_COLUMNS)
    with pytest.raises(DataError, match="contains no finished run"):
        tables.main([f"--runs={tmp_path}/missing"])


def test_a_line_is_compared_with_its_reference_seed_by_seed():
    spec = [
        dict(table="t", label="arm", runs="arm/*", what="ensemble", flagfile="f", published="", reference="base/*"),
        dict(table="t", label="**base**", runs="base/*", what="last", flagfile="f", published="", reference=""),
    ]
    columns = dict.fromkeys(accuracy.RUN_COLUMNS, "")
    top1 = {"arm": ("ensemble", [0.52, 0.54, 0.55]), "base": ("last", [0.51, 0.52, 0.54, 0.9])}
    runs = [
        {**columns, "run": f"{arm}/{seed}", "seed": str(seed), "what": what, "top1": str(value)}
        for arm, (what, values) in top1.items()
        for seed, value in enumerate(values)
    ]
    table = accuracy.tables(spec, [], runs)["t"]
    # 1, 2 and 1 points; half of the interval is 4.303 standard errors of 1/3.
    assert table.rows[0]["difference_mean"] == "1.33333" and table.rows[1]["difference_mean"] == ""
    assert "| 53.67 ± 1.53 | +1.33 (-0.10 ... +2.77) | 3 |" in report.markdown(table)
    assert 'Difference: top-1 minus that of "base" for equal seeds, in points.' in table.note


def test_a_score_that_the_runs_do_not_have_is_reported(capsys):
    """Fault: a misspelt score was "not run" without a word."""
    columns = dict.fromkeys(accuracy.RUN_COLUMNS, "")
    runs = [{**columns, "run": "a/0", "seed": "0", "what": what, "top1": "0.5"} for what in ("last", "ensemble")]
    line = dict(table="t", label="arm", runs="a/*", flagfile="f", published="", reference="")
    accuracy.tables([{**line, "what": "esemble"}], [], runs)
    expected = "tables.csv: arm: the runs a/* have no score 'esemble', only ensemble, last"
    assert expected in capsys.readouterr().err
    accuracy.tables([{**line, "what": "ensemble"}, {**line, "runs": "b/*", "what": "last"}], [], runs)
    assert not capsys.readouterr().err  # negative control, with a run that has not been made


def test_times_are_compared_only_where_runs_were_made_side_by_side():
    spec = [
        dict(table="t", label="a", runs="a/*", what="last", flagfile="f", published="", reference="b/*", timed="yes"),
        dict(table="t", label="b", runs="b/*", what="last", flagfile="f", published="", reference="", timed="yes"),
    ]
    columns = dict.fromkeys(accuracy.RUN_COLUMNS, "")
    runs = [
        {**columns, "run": f"{arm}/{seed}", "seed": str(seed), "what": "last", "top1": "0.5", "wall_seconds": str(time)}
        for arm, times in {"a": [60, 66, 120], "b": [100, 100, 200]}.items()
        for seed, time in enumerate(times)
    ]
    table = accuracy.tables(spec, [], runs)["t"]
    # Ratios of equal seeds: 0.6, 0.66, 0.6, so half of the interval is 4.303 times 0.02.
    assert [float(table.rows[0][f"time_{key}"]) for key in ("mean", "low", "high")] == pytest.approx(
        [0.62, 0.62 - 4.303 * 0.02, 0.62 + 4.303 * 0.02], rel=1e-3
    )
    assert "| 82 ± 33 | 0.62 (0.53 ... 0.71) |" in report.markdown(table) and "whole run" in table.note
    untimed = accuracy.tables([{**line, "timed": ""} for line in spec], [], runs)["t"]
    assert untimed.rows[0]["time_mean"] == untimed.rows[0]["seconds_mean"] == ""
    assert "0.62" not in report.markdown(untimed) and "whole run" not in untimed.note


def test_an_unknown_table_in_a_document_is_refused():
    with pytest.raises(DataError, match="nothing"):
        report.fill("<!-- table: nothing -->\n<!-- end of table -->", {})


def test_published_curves_are_complete():
    rows = report.read_csv(report.PUBLISHED_CURVES)
    last = {row["name"]: row for row in rows}
    assert {int(row["global_batch_size"]): float(row["top1_percent"]) for row in last.values()} == {
        2048: pytest.approx(76.05, abs=0.5),
        4096: pytest.approx(76.148, abs=0.001),
    }
    assert len(rows) == 166


def write_scaling_run(path, ranks, step_s, *, images=32, code="c", width=0.5):
    """Write what a run of --experiment=scaling leaves whose steps all took `step_s`, with `images` per rank."""
    settings = commandline.parse([*TREE, f"--width={width}", f"--seed={ranks}", f"--run_dir={path}"])
    times, hosts = np.full([ranks, 20, 4], step_s / 4), ["h"] * ranks
    timing = steptimes.summary(times, images * ranks, hosts)
    rate = timing["images_per_second"]
    result = {"experiment": "scaling", "ranks": ranks, "global_batch_size": images * ranks, "complete": False}
    result.update(images_per_second=rate, images_per_second_per_core=rate / ranks, scaling=timing)
    folder = RunFolder(str(path))
    folder.write_text("resolved.flags", settings.resolved_flags)
    folder.write_json("run.json", record_of(settings, ranks, code))
    folder.write_json("scaling.json", {**timing, **steptimes.per_rank(times, hosts)})
    folder.write_json("result.json", result)
    folder.close()


@pytest.fixture
def ladder_place(place, tmp_path):
    (place / "experiments" / "tables.csv").write_text(
        SPEC_COLUMNS + "l,mine,weak/*,efficiency,x.flags,\n"
        "l,never,strong/*,efficiency,y.flags,\n"
        "p,recipe B,,efficiency,z.flags,b_speed\n"
        "p,over one node,,efficiency,z.flags,intel_64_nodes\n"
    )
    for batch, slower in (("a", 1.0), ("b", 2.0)):
        for ranks, step_s in ((1, 0.5), (2, 0.625)):
            write_scaling_run(tmp_path / "runs" / "weak" / batch / f"ranks-{ranks}", ranks, slower * step_s)
    return place / "experiments" / "results"


def test_ladders_become_tables_of_efficiency_separate_from_published_figures(ladder_place, tmp_path, capsys):
    tables.main([f"--runs={tmp_path}/runs"])
    assert "in any table" not in capsys.readouterr().err
    rows = report.read_csv(str(ladder_place / "l.csv"))
    assert [(row["what"], row["ranks"], row["runs"], row["efficiency"]) for row in rows] == [
        ("mine", "1", "2", "1"),
        ("mine", "2", "2", "0.8"),  # relative to the base of each batch, though one ran on a machine half as fast
        ("never", "", "", ""),
    ]
    assert (rows[1]["scaling"], rows[1]["efficiency_low"], rows[1]["times_base"]) == ("weak", "0.8", "1.6")
    published = report.read_csv(str(ladder_place / "p.csv"))
    assert [(row["nodes"], row["efficiency"]) for row in published] == [("64", ""), ("64", "0.945312")]
    assert (ladder_place / "l.png").exists() and not (ladder_place / "p.png").exists()
    assert r"80.0 (80.0 ... 80.0)" in (ladder_place / "l.tex").read_text()
    kept = report.read_csv(str(ladder_place / "scaling_runs.csv"))
    assert len(kept) == 4 and {row["cores_per_rank"] for row in kept} == {"1"}
    assert report.read_results("runs.csv") == []
    write_scaling_run(tmp_path / "runs" / "scaling-17" / "ranks-1", 1, 0.5)  # where launch/scaling.sbatch puts it
    tables.main([f"--runs={tmp_path}/runs"])
    assert "scaling_runs.csv: scaling-17/ranks-1; add a line" in capsys.readouterr().err


def test_a_measurement_belongs_to_the_attempt_and_the_ranks_that_made_it(tmp_path):
    run = tmp_path / "runs" / "ranks-2"
    write_scaling_run(run, 2, 0.5, code="of the second attempt")
    record, timing = (json.loads((run / name).read_text()) for name in ("run.json", "scaling.json"))
    first = {"attempt": 1, "code": "of the first", "cpus": ["another"], "versions": {"tensorflow": "2.14.0"}}
    (run / "run.json").write_text(json.dumps({**record, "attempt": 2, "earlier_attempts": [first]}))

    conditions = {}

    def found(**changed):
        (run / "scaling.json").write_text(json.dumps({**timing, **changed}))
        rows = efficiency.collect(str(tmp_path / "runs"))
        conditions.update(rows[0] if rows else {})
        return [(row["code"], row["cpu"], row["tensorflow"]) for row in rows]

    assert found(attempt=1) == [("of the first", "another", "2.14.0")]
    assert found(attempt=2) == found() == [("of the second attempt", "a processor", "2.15.1")]
    assert found(ranks=timing["ranks"][:1]) == []
    # Fault: flags and cores were those of the last attempt, whichever was timed.
    last = conditions["flags"], conditions["cores_per_rank"]
    settings = commandline.parse([*TREE, "--width=0.25"])
    found(attempt=1, cores=8, flags=[line for line in settings.resolved_flags.splitlines() if line.startswith("--")])
    assert conditions["flags"] != last[0] and (last[1], conditions["cores_per_rank"]) == ("1", "4")
    found(flags=[line for line in (run / "resolved.flags").read_text().splitlines() if line.startswith("--")])
    assert (conditions["flags"], conditions["cores_per_rank"]) == last


@pytest.mark.parametrize(
    "unlike, part",
    [
        ({"code": "other"}, "tables.csv: mine: the runs of a ladder differ in code"),
        ({"width": 0.25}, "differ in flags"),
        ({"images": 16}, "neither the same images per rank"),
    ],
)
def test_different_runs_do_not_make_a_ladder(ladder_place, tmp_path, unlike, part):
    write_scaling_run(tmp_path / "runs" / "weak" / "a" / "ranks-4", 4, 0.5, **unlike)
    with pytest.raises(DataError, match=part):
        tables.main([f"--runs={tmp_path}/runs"])


def test_a_scaling_run_without_its_flags_is_refused(ladder_place, tmp_path):
    path = tmp_path / "runs" / "weak" / "a" / "ranks-1" / "resolved.flags"
    path.unlink()
    with pytest.raises(DataError, match="restore it or remove the run"):
        tables.main([f"--runs={tmp_path}/runs"])

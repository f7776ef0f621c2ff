"""Tables: from run folders and published figures to documents, and the committed ones against what makes them."""

import csv
import json
import pathlib
import re
import shutil
import statistics

import numpy as np
import pytest
import whole_runs as runs
from conftest import ROOT

from resnet_cpu import tables
from resnet_cpu.cluster.control import World
from resnet_cpu.errors import DataError
from resnet_cpu.report import efficiency
from resnet_cpu.report import tables as results
from resnet_cpu.scaling import steptimes as throughput

EXPERIMENTS = ROOT / "experiments"


def committed():
    return results.lines(
        results.read_csv(str(EXPERIMENTS / "tables.csv")),
        results.read_csv(str(EXPERIMENTS / "published.csv")),
        results.read_csv(str(EXPERIMENTS / "results" / "runs.csv")),
    )


def committed_ladders():
    runs_of = EXPERIMENTS / "results" / "scaling_runs.csv"
    return efficiency.tables(
        results.read_csv(str(EXPERIMENTS / "tables.csv")),
        results.read_csv(str(EXPERIMENTS / "published.csv")),
        results.read_csv(str(runs_of)) if runs_of.exists() else [],
    )


@pytest.mark.parametrize("document", ["README.md", "docs/results.md", "docs/scaling.md"])
def test_documents_hold_what_make_tables_writes(document):
    text = (ROOT / document).read_text()
    texts = {name: results.markdown(table) for name, table in committed().items()}
    texts.update({name: efficiency.markdown(table) for name, table in committed_ladders().items()})
    assert "<!-- table: " in text and results.fill(text, texts) == text
    # Negative control: a figure that somebody touched by hand is seen.
    changed = re.sub(r"(<!-- table: ensemble -->\n.*?)\d\d\.\d\d", r"\g<1>99.99", text, count=1, flags=re.S)
    assert changed == text or results.fill(changed, texts) != changed


def test_committed_csv_and_latex_are_what_make_tables_writes(tmp_path):
    for name, table in committed().items():
        results.write_csv(str(tmp_path / "table.csv"), *results.table_csv(table))
        assert (tmp_path / "table.csv").read_text() == (EXPERIMENTS / "results" / f"{name}.csv").read_text(), name
        assert results.latex(table) == (EXPERIMENTS / "results" / f"{name}.tex").read_text(), name
    for name, table in committed_ladders().items():
        results.write_csv(str(tmp_path / "table.csv"), *efficiency.table_csv(table))
        assert (tmp_path / "table.csv").read_text() == (EXPERIMENTS / "results" / f"{name}.csv").read_text(), name
        assert efficiency.latex(table) == (EXPERIMENTS / "results" / f"{name}.tex").read_text(), name


def test_every_measured_figure_is_the_mean_of_its_runs():
    rows = list(csv.DictReader((EXPERIMENTS / "results" / "runs.csv").open()))
    mine = [100 * float(r["top1"]) for r in rows if r["run"].startswith("ensemble/cycles/") and r["what"] == "ensemble"]
    assert len(mine) >= 3 and len({r["seed"] for r in rows if r["run"].startswith("ensemble/cycles/")}) >= 3
    line = next(line for line in committed()["ensemble"] if "ensemble of all" in line.label)
    assert line.spread("top1", 100, 2) == f"{statistics.mean(mine):.2f} ± {statistics.stdev(mine):.2f}"


def test_every_published_figure_has_a_source_and_every_flagfile_is_there():
    published = results.read_csv(str(EXPERIMENTS / "published.csv"))
    assert len({row["id"] for row in published}) == len(published)
    for row in published:
        assert row["source"] and row["value"] and row["kind"] in ("read", "derived"), row
    for row in results.read_csv(str(EXPERIMENTS / "tables.csv")):
        assert (EXPERIMENTS / row["flagfile"]).is_file(), row


def test_every_row_of_the_index_names_files_that_exist_and_none_is_left_out():
    text = (EXPERIMENTS / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(linked) > 40
    for path in linked:
        assert (EXPERIMENTS / path).exists(), path
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| table", "| flagfile"))
    ]
    assert all(".flags](" in row for row in rows)
    files = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.flags")}
    assert files <= set(linked), files - set(linked)


def test_flagfiles_are_short_and_say_where_they_come_from():
    for path in EXPERIMENTS.rglob("*.flags"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# "), path
        assert sum(line.startswith("--") for line in lines) <= 17, path
        if path.parent != EXPERIMENTS and any(line.startswith("--run_dir") for line in lines):
            head = "\n".join(line for line in lines if line.startswith("#"))
            assert "Command" in head and "xpected" in head, path


@pytest.fixture(scope="module")
def folder_of_runs(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    short = [flag.replace("steps=6", "steps=2").replace("steps=3", "steps=1") for flag in runs.TREE]
    short = [flag.replace("warmup_steps=2", "warmup_steps=1") for flag in short]
    for seed in (0, 1):
        runs.train(World(1, 0), tiny_data, str(folder / "mine" / f"seed-{seed}"), *short, f"--seed={seed}")
    runs.train(World(1, 0), tiny_data, str(folder / "cut"), "--max_steps=1")
    return folder


def test_a_folder_of_runs_becomes_tables_and_collecting_again_changes_nothing(folder_of_runs, tmp_path, capsys):
    place = tmp_path / "experiments"
    (place / "results").mkdir(parents=True)
    shutil.copy(EXPERIMENTS / "published.csv", place)
    (place / "tables.csv").write_text(
        "table,label,runs,what,flagfile,published\n"
        "t,the ensemble,mine/seed-*,ensemble,x.flags,b_top1\n"
        "t,never run,nowhere,last,y.flags,\n"
    )
    document = tmp_path / "text.md"
    document.write_text("before\n<!-- table: t -->\nold\n<!-- end of table -->\nafter\n")
    arguments = [f"--experiments={place}", f"--documents={document}"]
    tables.main([f"--runs={folder_of_runs}", *arguments])
    assert "cut: has not finished; left out" in capsys.readouterr().err
    scored = [json.loads((folder_of_runs / "mine" / f"seed-{s}" / "result.json").read_text()) for s in (0, 1)]
    values = [100 * result["ensemble"]["top1"] for result in scored]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    rows = {row["what"]: row for row in results.read_csv(str(place / "results" / "runs.csv"))}
    assert rows["ensemble"]["steps"] == str(scored[0]["steps"]) and rows["member:tail"]["steps"] == ""
    assert rows["end_of:tail"]["steps"] == str(scored[0]["steps"] // 2) and rows["last"]["cores"] == "1"
    assert f"| the ensemble | 76.278 % | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} | 2 |" in text
    assert "| never run |  | not run | 0 |" in text and "sara-nl/caffe" in text
    assert r"76.278 \% & " in (place / "results" / "t.tex").read_text()
    first = {path.name: path.read_bytes() for path in (place / "results").glob("*.csv")}
    tables.main([f"--runs={folder_of_runs}", *arguments])
    assert first == {path.name: path.read_bytes() for path in (place / "results").glob("*.csv")}


def row_of(run, seed="0", recipe="same"):
    return {"run": run, "what": "last", "seed": seed, "recipe": recipe, "top1": "0.5"}


def test_a_line_never_mixes_recipes_or_counts_a_seed_twice():
    spec = [{"table": "t", "label": "x", "runs": "a/*", "what": "last", "flagfile": "f", "published": ""}]
    alike = [row_of("a/0"), row_of("a/1", "1"), row_of("b/0", "0", "other")]
    assert len(results.lines(spec, [], alike)["t"][0].measured) == 2
    assert results.unplaced(spec, alike) == ["b/0"]
    with pytest.raises(DataError, match="a/0, a/2 have different recipes"):
        results.lines(spec, [], [row_of("a/0"), row_of("a/2", "2", "other")])
    with pytest.raises(DataError, match="a/0, a/again have a seed in common"):
        results.lines(spec, [], [row_of("a/0"), row_of("a/again")])


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--experiments=/no/such"], "/no/such"),
        (["--runs=/no/such"], "no finished run"),
    ],
)
def test_what_is_not_there_is_told(arguments, part, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(DataError, match=part):
        tables.main(arguments)


def test_an_unknown_table_in_a_document_is_told():
    with pytest.raises(DataError, match="nothing"):
        results.fill("<!-- table: nothing -->\n<!-- end of table -->", {"t": ""})


def test_published_curves_are_whole():
    rows = results.read_csv(results.PUBLISHED_CURVES)
    last = {row["name"]: row for row in rows}
    assert {int(row["global_batch_size"]): float(row["top1_percent"]) for row in last.values()} == {
        2048: pytest.approx(76.05, abs=0.5),
        4096: pytest.approx(76.148, abs=0.001),
    }
    assert pathlib.Path(results.PUBLISHED_CURVES).is_file() and len(rows) == 166


def write_scaling_run(folder, ranks, step_s, *, batch_size=32, code="c", flags="--batch_size=32\n"):
    """Leave what a run of --experiment=scaling leaves, of steps that all took `step_s`."""
    folder.mkdir(parents=True)
    times = np.full([ranks, 20, 4], step_s / 4)
    found = throughput.summary(times, batch_size * ranks, ["h"] * ranks)
    rate = found["images_per_second"]
    result = {"experiment": "scaling", "ranks": ranks, "global_batch_size": batch_size * ranks, "complete": False}
    result.update(images_per_second=rate, images_per_second_per_core=rate / ranks)
    record = {"per_rank": [{"cpu": "a processor"}] * ranks, "versions": {"tensorflow": "2.15.1"}, "code": code}
    for name, content in (("scaling.json", found), ("result.json", result), ("run.json", record)):
        (folder / name).write_text(json.dumps(content))
    (folder / "resolved.flags").write_text(f"# what is run\n--seed={ranks}\n--run_dir={folder}\n{flags}")


@pytest.fixture
def ladder_place(tmp_path):
    place = tmp_path / "experiments"
    (place / "results").mkdir(parents=True)
    shutil.copy(EXPERIMENTS / "published.csv", place)
    (place / "results" / "runs.csv").write_text(",".join(results.RUN_COLUMNS) + "\n")
    (place / "tables.csv").write_text(
        "table,label,runs,what,flagfile,published\n"
        "l,mine,weak/*,efficiency,x.flags,\n"
        "l,never,strong/*,efficiency,y.flags,\n"
        "p,recipe B,,efficiency,z.flags,b_speed\n"
        "p,over one node,,efficiency,z.flags,intel_64_nodes\n"
    )
    (place / "results" / "curves.csv").write_text(",".join(results.CURVE_COLUMNS) + "\n")
    for batch, slower in (("a", 1.0), ("b", 2.0)):
        for ranks, step_s in ((1, 0.5), (2, 0.625)):
            write_scaling_run(tmp_path / "runs" / "weak" / batch / f"ranks-{ranks}", ranks, slower * step_s)
    return place


def test_ladders_become_tables_of_efficiency_with_published_figures_apart(ladder_place, tmp_path, capsys):
    tables.main([f"--runs={tmp_path}/runs", f"--experiments={ladder_place}"])
    assert "in no table" not in capsys.readouterr().err
    rows = results.read_csv(str(ladder_place / "results" / "l.csv"))
    assert [(row["what"], row["ranks"], row["runs"], row["efficiency"]) for row in rows] == [
        ("mine", "1", "2", "1"),
        ("mine", "2", "2", "0.8"),  # of each batch's own base, though one batch ran on a machine half as fast
        ("never", "", "", ""),
    ]
    assert (rows[1]["scaling"], rows[1]["efficiency_low"], rows[1]["times_base"]) == ("weak", "0.8", "1.6")
    published = results.read_csv(str(ladder_place / "results" / "p.csv"))
    assert [(row["nodes"], row["efficiency"]) for row in published] == [("64", ""), ("64", "0.945312")]
    assert (ladder_place / "results" / "l.png").exists() and not (ladder_place / "results" / "p.png").exists()
    assert r"80.0 (80.0 ... 80.0)" in (ladder_place / "results" / "l.tex").read_text()
    kept = results.read_csv(str(ladder_place / "results" / "scaling_runs.csv"))
    assert len(kept) == 4 and {row["cores_per_rank"] for row in kept} == {"1"}
    assert results.read_csv(str(ladder_place / "results" / "runs.csv")) == []
    write_scaling_run(tmp_path / "runs" / "scaling-17" / "ranks-1", 1, 0.5)  # where launch/scaling.sbatch puts it
    tables.main([f"--runs={tmp_path}/runs", f"--experiments={ladder_place}"])
    assert "scaling_runs.csv but in no table: scaling-17/ranks-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "unlike, part",
    [
        ({"code": "other"}, "tables.csv: mine: the runs of a ladder differ in code"),
        ({"flags": "--width=2\n"}, "differ in flags"),
        ({"batch_size": 16}, "neither images a rank"),
    ],
)
def test_unlike_runs_make_no_ladder(ladder_place, tmp_path, unlike, part):
    write_scaling_run(tmp_path / "runs" / "weak" / "a" / "ranks-4", 4, 0.5, **unlike)
    with pytest.raises(DataError, match=part):
        tables.main([f"--runs={tmp_path}/runs", f"--experiments={ladder_place}"])

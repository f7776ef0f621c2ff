"""Where ensembles begin to pay: G, D and differences with known answers, intervals, and predictions."""

import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT

from resnet_cpu.errors import DataError
from resnet_cpu.report import border, border_prediction, gains, intervals
from resnet_cpu.report.tables import markdown

TOP1 = {  # by arm: (members, whole) of three seeds
    "half": [((0.19,), 0.19), ((0.20,), 0.20), ((0.21,), 0.21)],
    "one": [((0.22,), 0.22), ((0.22,), 0.22), ((0.24,), 0.24)],
    "one_collapse": [((0.20,), 0.20), ((0.21,), 0.21), ((0.22,), 0.22)],
    "late_36": [((0.20, 0.22), 0.23), ((0.21, 0.23), 0.24), ((0.22, 0.24), 0.25)],
}


PREDICTIONS = [
    {"setting": "tiny-10000", "arm": "late_36", "doublings": "0.2", "G": "1.5", "D": "0.75", "difference": "0.75"}
]


def runs_of(arms=TOP1, setting="tiny-10000"):
    rows = []
    for arm, seeds in arms.items():
        for seed, (members, whole) in enumerate(seeds):
            common = {"run": f"border/{setting}/{arm}/seed-{seed}", "loss": "1", "ece": "0.1", "ece_scaled": "0.02"}
            common.update(cpu="a processor", ranks="1", cores="1", tensorflow="2.15.1", code="c")
            for number, top1 in enumerate(members):
                rows.append({**common, "what": f"member:m{number}", "top1": str(top1), "loss_scaled": "3"})
            scaled = "2.9" if arm.startswith("late") else "3.0"
            rows.append(
                {**common, "what": "ensemble", "top1": str(whole), "loss_scaled": scaled, "disagreement": "0.4"}
            )
            rows.append({**common, "what": "last", "top1": str(whole), "loss_scaled": ""})
    return rows


def test_figures_with_known_answers():
    table = border.tables(runs_of(), PREDICTIONS)["border"]
    (row,) = table.rows
    wanted = {"n": 3, "members": 22, "ensemble": 24, "one": 22.6667, "G": 2, "D": 0.666667}
    assert {key: float(row[key]) for key in wanted} == pytest.approx(wanted, rel=1e-4)
    assert row["single"] == "one" and float(row["predicted"]) == 0.75
    # Differences of the seeds: 1, 2, 1. Student's t with two degrees of freedom, 95 %: 4.303 standard errors.
    assert (float(row["difference"]), float(row["low"]), float(row["high"])) == pytest.approx(
        (4 / 3, 4 / 3 - 4.303 / 3, 4 / 3 + 4.303 / 3), rel=1e-3
    )
    assert float(row["loss_difference"]) == pytest.approx(-0.1)
    # The better model of the whole budget is `one`, which is the best of the three as well.
    assert [row[key] for key in ("whole", "whole_low", "whole_high")] == [
        row[key] for key in ("difference", "low", "high")
    ]
    assert "| +1.33 (-0.10 ... +2.77) |" in markdown(table)


def test_a_model_of_the_whole_budget_without_a_seed_in_common_is_left_out():
    """As when tables are made while runs are in progress, or a loss was not finite."""
    rows = [row for row in runs_of() if ("/one/" in row["run"]) == row["run"].endswith("seed-1")]
    rows = [row for row in rows if "/one_collapse/" not in row["run"]]
    (row,) = border.tables(rows, [])["border"].rows
    assert (row["single"], row["n"], row["whole"]) == ("half", "2", "")


def test_gains_of_all_studies_with_known_answers():
    """Ensembles of 0.85 and 0.87 over members of 0.83 and 0.85 on average, and one model of 0.86 and 0.87."""
    runs = []
    for seed, (members, whole, one) in enumerate([((0.82, 0.84), 0.85, 0.86), ((0.84, 0.86), 0.87, 0.87)]):
        common = {"seed": str(seed)}
        cycles = {"run": f"ensemble/cycles/seed-{seed}", **common}
        runs += [{**cycles, "what": f"member:{number}", "top1": str(top1)} for number, top1 in enumerate(members)]
        runs.append({**cycles, "what": "ensemble", "top1": str(whole)})
        single = {"run": f"ensemble/one_model/seed-{seed}", **common, "top1": str(one)}
        runs += [{**single, "what": what} for what in ("last", "ensemble", "member:only")]
    runs.append({"run": "ensemble/one_model/seed-2", "seed": "2", "what": "last", "top1": "0.5"})  # no ensemble
    (row, late) = gains.tables(runs, border.tables(runs_of(), [])["border"].rows)["gains"].rows
    assert row["setting"].startswith("Fashion-MNIST") and row["n"] == "2"
    assert [float(row[key]) for key in ("G", "D", "difference")] == pytest.approx([2, 2.5, -0.5])
    assert late["arm"] == "late_36" and float(late["difference"]) == pytest.approx(4 / 3, rel=1e-5)
    assert gains.tables([], []) == {}


def test_predictions_stand_beside_what_was_found():
    waiting = {**PREDICTIONS[0], "setting": "tiny-20000"}
    table = border.tables(runs_of(), [*PREDICTIONS, waiting])["border_predicted"]
    done, open_ = table.rows
    assert [float(done[key]) for key in ("G_predicted", "G", "D_predicted", "D")] == pytest.approx(
        [1.5, 2, 0.75, 2 / 3], rel=1e-5
    )
    assert open_["images"] == "20000" and open_["G"] == open_["low"] == ""
    assert "| +0.75 | +1.33 (-0.10 ... +2.77) |" in markdown(table)
    assert "| +1.50 | not run | +0.75 | not run | +0.75 | not run |" in markdown(table)


def test_single_models_and_their_gain_by_a_doubling():
    """One minus half for the seeds 0, 1, 2: 3, 2 and 3 points. A setting without one of them has no row."""
    runs = [*runs_of(), *runs_of({"one": TOP1["one"]}, "tiny-5000")]
    table = border.tables(runs, [])["border_singles"]
    (row,) = table.rows
    assert [float(row[key]) for key in ("half", "one", "one_collapse", "one_collapse_sd")] == pytest.approx(
        [20, 68 / 3, 21, 1], rel=1e-5
    )
    assert [float(row[key]) for key in ("slope", "slope_low", "slope_high")] == pytest.approx(
        [8 / 3, 8 / 3 - 4.303 / 3, 8 / 3 + 4.303 / 3], rel=1e-3
    )
    assert "| 20.00 ± 1.00 | 22.67 ± 1.15 | 21.00 ± 1.00 | +2.67 (+1.23 ... +4.10) |" in markdown(table)
    more = {**TOP1, "one": [*TOP1["one"], ((0.5,), 0.5)]}  # a seed that the model of half of the budget does not have
    assert border.tables(runs_of(more), [])["border_singles"].rows == table.rows


def test_parts_of_ensembles_with_known_answers():
    runs = runs_of()
    parts = [("late_36", "last_m:1", "0.22"), ("average_late_36", "last", "0.25")]
    base = {"cpu": "a processor", "ranks": "1", "cores": "1", "tensorflow": "2.15.1", "code": "c"}
    for arm, what, top1 in parts:
        runs += [{**base, "run": f"border/tiny-10000/{arm}/seed-{seed}", "what": what, "top1": top1} for seed in (0, 1)]
    table = border.tables(runs, [])["border_members"]
    rows = {row["arm"]: row for row in table.rows}
    assert list(rows) == ["half", "late_36", "one", "one_collapse"]
    late = rows["late_36"]
    assert [float(late[key]) for key in ("last", "all", "averaged", "loss")] == pytest.approx([22, 24, 25, 1])
    assert late["n"] == "3" and "| 22.00 ± 0.00 (n = 2) |" in markdown(table)
    assert float(late["all_sd"]) == pytest.approx(1) and late["last_2"] == ""
    # Errors of the members: 0.79, 0.78, 0.77 on average in the three seeds.
    assert float(late["disagreement_over_error"]) == pytest.approx(0.4 * (1 / 0.79 + 1 / 0.78 + 1 / 0.77) / 3, rel=1e-5)
    one = rows["one"]
    assert one["last"] == one["disagreement_over_error"] == "" and float(one["all"]) == pytest.approx(22.6667)
    assert border.tables([], []) == {}


@pytest.mark.parametrize("arm", ["one_collapse", "half"])
def test_the_single_model_to_beat_is_the_best_one(arm):
    better = {**TOP1, arm: [((0.25,), 0.25)] * 3}
    (row,) = border.tables(runs_of(better), [])["border"].rows
    assert row["single"] == arm and float(row["difference"]) == pytest.approx(-1)
    assert float(row["whole"]) == pytest.approx(4 / 3 if arm == "half" else -1, rel=1e-5)


def test_only_seeds_that_both_have_are_compared():
    fewer = {**TOP1, "one": TOP1["one"][:2], "one_collapse": []}
    (row,) = border.tables(runs_of(fewer), [])["border"].rows
    assert row["n"] == "2" and float(row["difference"]) == pytest.approx(1.5)
    assert list(border.tables(runs_of({"late_36": TOP1["late_36"]}), [])) == ["border_members"]
    alone = {**TOP1, "one": TOP1["one"][:1], "one_collapse": []}
    (row,) = border.tables(runs_of(alone), [])["border"].rows
    assert row["n"] == "1" and row["low"] == ""  # one seed has no interval


PILOT = [
    {"arm": "late_36", "images": "1000", "members": "10/20", "ensemble": "18", "one": "16", "half": "15"},
    {"arm": "late_36", "images": "100000", "members": "30/30", "ensemble": "31", "one": "34", "half": "30"},
]
DOUBLINGS = {"late_36": 0.5, "late_100": 0.25, "published": 1.0}


def test_a_prediction_is_interpolated_over_the_logarithm_of_the_images():
    """G: 3 and 1, so 2 in the middle. What the cycles lose: 1 - 0.5 * 1 and 4 - 0.5 * 4, so 1.25."""
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    row = border_prediction.predict("tiny-10000", "late_36", DOUBLINGS, runs_of(singles), PILOT)
    assert {key: float(row[key]) for key in ("G", "cycles", "slope")} == pytest.approx(
        {"G": 2, "cycles": 1.25, "slope": 2.66667}, rel=1e-4
    )
    assert float(row["D"]) == pytest.approx(2.66667 * 0.5 + 1.25, rel=1e-4)
    assert float(row["difference"]) == pytest.approx(float(row["G"]) - float(row["D"]), rel=1e-4)
    assert "pilot at 1,000 and pilot at 100,000" in row["from"]


def test_a_better_model_with_a_collapse_is_what_a_prediction_compares_with():
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    better = {**singles, "one_collapse": [((0.25,), 0.25)] * 3}
    plain, better = (
        border_prediction.predict("tiny-10000", "late_36", DOUBLINGS, runs_of(chosen), PILOT)
        for chosen in (singles, better)
    )
    assert float(plain["single"]) == 0
    without = {arm: singles[arm] for arm in ("half", "one")}
    assert border_prediction.predict("tiny-10000", "late_36", DOUBLINGS, runs_of(without), PILOT) == plain
    assert float(better["single"]) == pytest.approx(100 * (0.25 - 0.68 / 3), abs=1e-3)
    assert float(better["D"]) - float(plain["D"]) == pytest.approx(float(better["single"]), abs=1e-3)


def test_what_the_cycles_lose_is_relative_to_the_plain_model_also_where_a_collapse_was_better():
    """In tiny-10000, D is 0.66667 against `one`, with 2.66667 points per doubling: -0.66667 at half a doubling."""
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    for finished in (TOP1, {**TOP1, "one_collapse": [((0.25,), 0.25)] * 3}):
        runs = [*runs_of(finished, "tiny-10000"), *runs_of(singles, "tiny-5000")]
        row = border_prediction.predict("tiny-5000", "late_36", DOUBLINGS, runs, [])
        assert float(row["cycles"]) == pytest.approx(-2 / 3, rel=1e-4)


def test_a_prediction_prefers_what_was_run_and_borrows_from_a_like_arm():
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    runs = [*runs_of(TOP1, "tiny-10000"), *runs_of(singles, "tiny-20000"), *runs_of(TOP1, "cifar-20000")]
    row = border_prediction.predict("tiny-20000", "late_100", DOUBLINGS, runs, PILOT)
    assert row["from"].startswith("G: tiny-10000 at 10,000 and pilot at 100,000")
    share = 0.30103  # log 2 / log 10
    assert float(row["G"]) == pytest.approx((1 - share) * 2 + share * 1, rel=1e-4)


def test_the_pilot_counts_for_other_data_only_while_nothing_of_theirs_was_run():
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    sizes = [runs_of(setting="cifar-5000"), runs_of(singles, setting="cifar-90000")]
    row = border_prediction.predict("cifar-90000", "late_36", DOUBLINGS, sizes[1], PILOT)
    assert "pilot at 100,000" in row["from"]
    row = border_prediction.predict("cifar-90000", "late_36", DOUBLINGS, [*sizes[0], *sizes[1]], PILOT)
    assert "pilot" not in row["from"] and "cifar-5000 at 5,000" in row["from"]


def test_a_tuned_setting_is_predicted_from_the_same_data_and_then_from_its_own_runs():
    """With the runs of tiny-10000, G is 2; with an ensemble of three points over its members in tuned-10000, 3."""
    singles = runs_of({arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}, "tuned-5000")
    row = border_prediction.predict("tuned-5000", "late_36", DOUBLINGS, [*runs_of(), *singles], PILOT)
    assert float(row["G"]) < 3 and "tiny-10000 at 10,000" in row["from"]
    better = {**TOP1, "late_36": [((0.20, 0.22), 0.24)] * 3}
    both = [*runs_of(), *runs_of(better, "tuned-10000"), *singles]
    row = border_prediction.predict("tuned-5000", "late_36", DOUBLINGS, both, [])
    assert float(row["G"]) == pytest.approx(3) and "tuned-10000 at 10,000" in row["from"]


@pytest.mark.parametrize("name, base", [("tuned", "tiny"), ("heavier", "wide")])
def test_an_arm_whose_tuned_weight_decay_is_its_own_is_the_same_run(name, base):
    singles = {arm: [((0.25,), 0.25)] * 3 for arm in ("half", "one", "one_collapse")}
    runs = [*runs_of(setting=f"{base}-10000"), *runs_of(singles, f"{name}-10000")]
    decays = [{"setting": f"{name}-10000", "arm": arm, "decay": "4e-3"} for arm in singles]
    decays.append({"setting": f"{name}-10000", "arm": "late_36", "decay": "2e-3"})
    rows = {row["setting"]: row for row in border.tables(runs, [], decays)["border"].rows}
    assert rows[name]["ensemble"] == rows[base]["ensemble"] == "24"
    assert float(rows[name]["difference"]) == pytest.approx(-1) and float(rows[base]["difference"]) > 1
    with pytest.raises(DataError, match=f"{name}-10000/late_36 has been run"):
        border_prediction.predict(f"{name}-10000", "late_36", DOUBLINGS, runs, PILOT, decays)
    decays[-1]["decay"] = "4e-3"
    assert {row["setting"] for row in border.tables(runs, [], decays)["border"].rows} == {base}


def test_a_repetition_with_other_seeds_is_predicted_to_find_the_same():
    runs = runs_of(setting="tuned-10000")
    (found,) = border.tables(runs, [])["border"].rows
    row = border_prediction.predict("again-10000", "late_36", DOUBLINGS, runs, PILOT)
    assert [row[key] for key in ("G", "D", "difference")] == [found[key] for key in ("G", "D", "difference")]
    # D is made of what the table of singles shows: the slope, the loss of the cycles, and the lead of the best.
    parts = float(row["slope"]) * DOUBLINGS["late_36"] + float(row["cycles"]) + float(row["single"])
    assert parts == pytest.approx(float(row["D"]), abs=1e-4)
    with pytest.raises(DataError, match="again-5000 repeats tuned-5000: needs finished runs of half, one and late_36"):
        border_prediction.predict("again-5000", "late_36", DOUBLINGS, runs, PILOT)


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(DataError, match="has been run; predict it before"):
        border_prediction.predict("tiny-10000", "late_36", DOUBLINGS, runs_of(), PILOT)
    with pytest.raises(DataError, match="needs finished runs of half and one"):
        border_prediction.predict("tiny-5000", "late_36", DOUBLINGS, runs_of(), PILOT)
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    with pytest.raises(DataError, match="nothing is known of late_36"):
        border_prediction.predict("tiny-10000", "late_36", DOUBLINGS, runs_of(singles), [])


SCRIPT = ROOT / "experiments" / "collapsed_ensemble" / "border" / "predict.py"


def test_the_script_names_what_it_needs_and_predicts_nothing_twice(tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    done = subprocess.run([sys.executable, SCRIPT, "tiny-7"], cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 65 and "needs finished runs of half and one" in done.stderr
    for words, part in ((["tiny"], "write it as tiny-10000"), (["tiny-7", "early_36"], "early_36: not an ensemble")):
        done = subprocess.run(
            [sys.executable, SCRIPT, *words], cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True
        )
        assert done.returncode == 64 and part in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "experiments").unlink()
    place = tmp_path / "experiments" / "collapsed_ensemble" / "border"
    place.mkdir(parents=True)
    (place / "predictions.csv").write_text(f"{','.join(border_prediction.PREDICTED)}\ntiny-7,late_36{',1' * 10}\n")
    done = subprocess.run([sys.executable, SCRIPT, "tiny-7"], cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 65 and "has predictions of late_36 in tiny-7; none is made twice" in done.stderr


def test_the_data_are_only_made_from_the_whole_set_and_in_a_new_folder(tmp_path):
    script = SCRIPT.parent / "make_data.py"
    for raw, part in ((tmp_path / "none", "has no train"), (tmp_path, "exists already and is not empty")):
        for name in ("train", "val"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "val" / "val_annotations.txt").touch()
        done = subprocess.run(
            [sys.executable, script, raw, tmp_path], env=OUTSIDE, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 65 and part in done.stderr and "Traceback" not in done.stderr


def test_predictions_add_up(monkeypatch):
    """The rows that are committed, and one that is made here."""
    monkeypatch.chdir(ROOT)
    singles = {arm: TOP1[arm] for arm in ("half", "one", "one_collapse")}
    made = border_prediction.predict("tiny-10000", "late_36", DOUBLINGS, runs_of(singles), PILOT)
    for row in [made, *border_prediction.read()[0]]:
        figures = {key: float(row[key]) for key in ("slope", "doublings", "cycles", "single", "G", "D", "difference")}
        lost = figures["cycles"] + figures["single"]
        assert figures["D"] == pytest.approx(figures["slope"] * figures["doublings"] + lost, abs=1e-3)
        assert figures["difference"] == pytest.approx(figures["G"] - figures["D"], abs=1e-3)


def test_runs_outside_of_the_study_are_left_alone():
    odd = [{**row, "run": row["run"].replace("tiny-10000", name)} for row in runs_of() for name in ("foo", "mine-7")]
    (row,) = border.tables(odd, [])["border"].rows
    assert (row["setting"], row["images"]) == ("mine", "7")


def test_the_note_names_the_machines_of_the_settings_shown():
    """Single models whose ensembles have not been run have no row in `border`, but one in `border_members`."""
    waiting = runs_of({"one": TOP1["one"]}, setting="tiny-5000")
    made = border.tables([*runs_of(), *({**row, "cpu": "another"} for row in waiting)], [])
    assert "another" not in made["border"].note and "a processor" in made["border"].note
    assert "another" in made["border_members"].note


def test_a_rounded_zero_has_no_minus():
    assert intervals.fixed(-0.004, 2) == "+0.00" and intervals.fixed(-0.006, 2) == "-0.01"
    assert intervals.interval([-0.001, 0.001]).bounded(1) == "+0.0 (+0.0 ... +0.0)"


def test_a_huge_mean_is_written_in_powers_of_ten():
    assert intervals.interval([1.0, 2.0]).spread(2) == "1.50 ± 0.71"
    assert intervals.interval([1e11, 2e11]).spread(2) == "1.5e+11 ± 7.1e+10"  # the loss of a training that failed

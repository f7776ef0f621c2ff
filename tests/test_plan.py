"""`plan`: the table, the CSV and the plot of what a flagfile would do."""

import csv
import io
import json
import math
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, last_line

from resnet_cpu import commandline, plan
from resnet_cpu.errors import FlagError, UserError
from resnet_cpu.resolve import resolve_recipe
from resnet_cpu.run import signature

RECIPE = [
    "--phase=main:steps=20,lr=0.2,warmup_steps=4,wd=5e-5",
    "--phase=tail:epochs=0.01,lr=0.02,decay=cosine,augment=light,image_size=160",
]


def rows(capsys, *arguments):
    plan.main([*arguments, "--format=csv"])
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_csv_has_one_row_per_step_and_floats_that_read_back(capsys):
    found = rows(capsys, *RECIPE, "--ranks=4", "--batch_size=64", "--train_examples=100000")
    assert ",".join(found[0]) == "step,phase,step_in_phase,epoch,lr,weight_decay,momentum,augment,image_size"
    assert [row["step"] for row in found] == [str(t) for t in range(24)]  # 0.01 * 100000 / 256 = 3.9 -> 4
    assert float(found[3]["lr"]) == (3 * 0.2 + 1 * 0.0) / 4
    assert float(found[12]["lr"]) == 0.2 * (1 - 8 / 16)
    assert float(found[22]["lr"]) == pytest.approx(0.02 * (1 + math.cos(math.pi / 2)) / 2, rel=1e-12)
    assert float(found[23]["epoch"]) == 23 * 256 / 100000
    assert (found[0]["weight_decay"], found[0]["augment"], found[0]["image_size"]) == ("5e-05", "full", "224")
    assert (found[23]["phase"], found[23]["step_in_phase"], found[23]["augment"], found[23]["image_size"]) == (
        "tail",
        "3",
        "light",
        "160",
    )


def test_a_single_step_is_one_step(capsys):
    plan.main(["--phase=a:steps=1,lr=1", "--batch_size=1"])
    assert "\n1 step, 0.00 epochs, 1 image\n" in capsys.readouterr().out


def test_branches_are_planned_in_their_place(capsys):
    found = rows(capsys, "--phase=a:steps=2,lr=1", "--phase=b:steps=1,lr=1,branch=1,member=1", "--phase=c:steps=1,lr=1")
    assert [row["phase"] for row in found] == ["a", "a", "b", "c"]


def test_table_shows_phases_and_sums(capsys):
    plan.main([*RECIPE, "--global_batch_size=256", "--ranks=8"])
    text = capsys.readouterr().out
    assert "main" in text and "poly^1" in text and "cosine" in text and "160" in text
    assert "70 steps" in text  # 20 + round(0.01 * 1281167 / 256)
    assert last_line(text) == "global batch 256 = 8 ranks x 32; 1,281,167 training examples = 5,004.56 steps per epoch"


ASKED = [*RECIPE, "--global_batch_size=256", "--ranks=8"]


def write_run(folder, *arguments):
    """Write what `plan` reads of a past run at 0.32 images/s per rank."""
    settings = commandline.parse([*ASKED, *arguments])
    record = {"signature": signature.of(settings, resolve_recipe(settings, 8, 1281167), 1281167, None)}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "result.json").write_text('{"images_per_second": 0.64, "ranks": 2}')


def times(text, *names):
    """Return the last cell of the rows of these phases."""
    return [next(line for line in text.splitlines() if line.startswith(name)).split()[-1] for name in names]


def test_table_shows_images_and_time_of_every_phase(capsys):
    plan.main([*ASKED, "--speed=2.56"])
    text = capsys.readouterr().out
    assert " 5,120 " in text and " 12,800 " in text
    assert times(text, "main", "tail") == ["33m20s", "42m31s"]  # 20 steps of 256; 50 of them, at (160 / 224)^2 pixels
    assert "1h15m at 2.6 images/s of all ranks at 224x224 pixels" in text and "evaluations" in text
    plan.main(ASKED)
    assert "time" not in capsys.readouterr().out


def test_the_speed_of_a_past_run_is_that_of_all_its_phases(tmp_path, capsys):
    write_run(tmp_path)
    plan.main([*ASKED, f"--speed={tmp_path}"])
    text = capsys.readouterr().out
    assert "1h56m at 2.6 images/s of all ranks, " in text  # 17,920 images at 0.32 images/s per rank, eight ranks
    assert times(text, "main", "tail") == ["51m16s", "1h05m"]


def test_the_speed_of_a_past_run_is_only_taken_for_the_same_network(tmp_path, capsys):
    write_run(tmp_path)
    plan.main([*ASKED, f"--speed={tmp_path}", "--padding=caffe", "--seed=3"])  # both take no time
    with pytest.raises(UserError, match="another network .*model.width: 1.0 recorded, 0.5 now") as caught:
        plan.main([*ASKED, f"--speed={tmp_path}", "--width=0.5"])
    assert caught.value.exit_code == 66
    with pytest.raises(UserError, match=r"another network .*pixels: \[160, 224\] recorded, \[160, 192\] now"):
        plan.main([*ASKED, f"--speed={tmp_path}", "--image_size=192"])


def test_a_run_of_version_0_1_gives_its_speed_as_well(tmp_path, capsys):
    """Its signature holds every setting of the network, also those at their defaults."""
    write_run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    model = {"model": "resnet50", "width": 1.0, "stem": "imagenet", "stride_in": "3x3", "precision": "float32"}
    recorded = {"model": {**model, "bn_stats_batch": None}, "phases": record["signature"]["phases"], "data": {}}
    recorded.update(optimizer=["sgd", 0.001], global_batch_size=256, order_of_phases=["main", "tail"])
    (tmp_path / "run.json").write_text(json.dumps({"signature": recorded}))
    plan.main([*ASKED, f"--speed={tmp_path}"])
    assert "at 2.6 images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "speed, part, code",
    [
        ("{}", "no result.json with a speed", 66),
        ("0", "--speed=0: must be above 0", 64),
        ("-3", "must be above 0", 64),
        ("inf", "must be above 0", 64),
        ("6,303", "--speed=6,303: neither a number, as in 6303.5, nor an existing run folder", 64),
        ("{}/none", "no result.json with a speed", 66),
    ],
)
def test_a_useless_speed_is_refused(tmp_path, speed, part, code):
    with pytest.raises(UserError, match=part) as caught:
        plan.main([*RECIPE, f"--speed={speed.format(tmp_path)}"])
    assert caught.value.exit_code == code


def test_a_run_folder_without_a_network_is_refused(tmp_path):
    (tmp_path / "result.json").write_text('{"images_per_second": 0.64, "ranks": 2}')
    with pytest.raises(UserError, match="run.json does not describe the network"):
        plan.main([*ASKED, f"--speed={tmp_path}"])


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("result.json", {"images_per_second": [100, 200], "ranks": 2}, "no result.json with a speed in it"),
        ("result.json", {"images_per_second": -100, "ranks": 2}, "no result.json with a speed in it"),
        ("result.json", {"images_per_second": 9, "ranks": "2"}, "no result.json with a speed in it"),
        ("run.json", {"signature": {"model": "resnet50"}}, "run.json does not describe the network"),
        ("run.json", {"signature": []}, "run.json does not describe the network"),
    ],
)
def test_a_damaged_run_folder_is_refused(name, content, part, tmp_path):
    """Fault: a traceback, or a plan with a negative time."""
    write_run(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=part) as caught:
        plan.main([*ASKED, f"--speed={tmp_path}"])
    assert caught.value.exit_code == 66


def test_table_shows_branches_members_and_accumulation(capsys):
    tree = ["--phase=a:steps=2,lr=1", "--phase=b:steps=1,lr=1,branch=1,member=1", "--phase=c:steps=1,lr=1"]
    plan.main([*tree, "--global_batch_size=256", "--batch_size=8", "--accumulate_steps=0", "--ranks=4"])
    text = capsys.readouterr().out
    assert any(line.split()[:5] == ["b", "a", "branch", "member", "1"] for line in text.splitlines())
    assert (
        "global batch 256 = 4 ranks x 8 x 8 accumulated" in text
        and "note: batch norm uses statistics of 8 images" in text
    )


def test_members_are_placed_in_the_budget(capsys):
    """7,800 + 3,750 + 1,560 of 25,730 steps for the first member of the ensemble of recipe B."""
    plan.main(["--flagfile=experiments/collapsed_ensemble/ce_of_b.flags", "--ranks=128"])
    text = capsys.readouterr().out
    assert "member one: 41.91 epochs of training, 51.0 % of the budget, 0.97 doublings behind" in text
    assert "member three: 72.29 epochs of training, 87.9 % of the budget, 0.19 doublings behind" in text
    assert "members on average: 0.56 doublings behind" in text
    plan.main([*ASKED, "--phase=main:steps=3,lr=1,member=1"])
    assert "doublings" not in capsys.readouterr().out  # a single member does not make an ensemble


def test_corrected_momentum_is_in_the_csv(capsys):
    found = rows(capsys, "--phase=m:steps=3,lr=0.4,warmup_steps=2,warmup_lr=0.1", "--momentum_correction")
    assert [float(row["momentum"]) for row in found] == pytest.approx([0.9, 0.9 * 0.25 / 0.1, 0.9 * 0.4 / 0.25])


def test_size_of_a_prepared_data_set_comes_from_its_facts_or_the_flag(capsys):
    found = rows(capsys, "--dataset=fashion_mnist", "--phase=a:epochs=1,lr=1", "--batch_size=600")
    assert len(found) == 100


def test_png_is_drawn_into_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan.main([*RECIPE, "--format=png"])
    assert last_line(capsys.readouterr().out) == "plan.png"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FlagError, match="matplotlib is not installed"):
        plan.main([*RECIPE, "--format=png"])


def test_a_reader_that_closes_the_pipe_is_not_an_error():
    long = "--phase=main:steps=200000,lr=1"
    command = (
        f"{shlex.quote(sys.executable)} -m resnet_cpu.plan {long} --format=csv | head -n 2; exit ${{PIPESTATUS[0]}}"
    )
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == "" and process.stdout.count("\n") == 2


def test_a_full_disk_is_74():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "resnet_cpu.plan", *RECIPE], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 74 and "No space left" in process.stderr and "Traceback" not in process.stderr


def test_plan_and_help_load_neither_tensorflow_nor_horovod_nor_mpi():
    code = (
        "import sys; from resnet_cpu import plan, train, evaluate, prepare; plan.main(sys.argv[1:]);"
        "loaded = {'tensorflow', 'horovod', 'mpi4py', 'matplotlib'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code, *RECIPE], cwd=ROOT, check=True, capture_output=True)

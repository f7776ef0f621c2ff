"""The command line: what is refused and how, and that a recorded flagfile gives the same settings again."""

import dataclasses
import json

import pytest
from conftest import ROOT

from resnet_cpu import commandline, settings
from resnet_cpu.data import datasets
from resnet_cpu.errors import CheckpointError, FlagError

PHASE = "--phase=main:steps=1,lr=1"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--batchsize=3"], ["--batchsize=3: unknown", "--batch_size"]),
        (["--width 0.25"], ["--width 0.25: unknown", "--name=value"]),
        (["--run_dir=a  # mine"], ["--run_dir=a  # mine", "starts with #"]),
        (["--width=0.25  # narrow"], ["width", "starts with #"]),
        (["--no_such_thing"], ["--no_such_thing", "--help"]),
        (["--batch_size=0"], ["--batch_size=0: must be a whole number from 1 to 65536"]),
        (["--batch_size=x"], ["--batch_size=x: must be a whole number from 1"]),
        (["--batch_size=2.5"], ["--batch_size=2.5: must be a whole number from 1"]),
        (["--momentum_correction=maybe"], ["write --momentum_correction or --nomomentum_correction"]),
        (["--model=vgg16"], ["--model=vgg16: must be one of ", "resnet50"]),
        (["--seed=-1"], ["seed", "-1"]),
        (["stray"], ["'stray'", "--name=value"]),
        (["--batch_size=3", "--global_batch_size=8"], ["--batch_size=3", "--global_batch_size=8", "remove"]),
        (["--dataset=synthetic", "--data_dir=x"], ["--data_dir=x", "synthetic", "remove one"]),
        (["--run_dir=a\nb"], ["run_dir", "newline"]),
        (["--phase=main:steps=1\n,lr=1"], ["phase", "newline"]),
        (["--run_dir=a\x1b[2J"], ["--run_dir='a\\x1b[2J'", "control character"]),
        (["--phase=main:steps=1"], ["main", "lr"]),
        (["--flagfile=/no/such.flags"], ["/no/such.flags"]),
        (["--keep_checkpoints=1"], ["keep_checkpoints", "1"]),
        (["--width=nan"], ["--width=nan", "finite"]),
        (["--eval_every_epochs=inf"], ["--eval_every_epochs=inf", "finite"]),
        (["--crop=inception:0.5"], ["--crop=inception:0.5", "inception:0.25,1"]),
        (["--crop=inception:0.5,1.5"], ["--crop=inception:0.5,1.5", "up to 1"]),
        (["--crop=inception:1,0.5"], ["--crop=inception:1,0.5", "inception:0.25,1"]),
        (["--crop=other"], ["--crop=other", "inception or authors"]),
        (["--profile_steps=-1,2"], ["--profile_steps=-1,2", "counted from 0"]),
        (["--profile_steps=a,b"], ["--profile_steps=a,b", "first and the last"]),
        (["--export=x"], ["--export=x", "resnet_cpu.evaluate"]),
        (["--format=csv"], ["--format=csv", "resnet_cpu.plan and resnet_cpu.simulate"]),
        (["--network=omnipath"], ["--network=omnipath", "resnet_cpu.simulate"]),
        (["--mpi=srun"], ["--mpi=srun", "resnet_cpu.launch"]),
        (["--undefok=seeed", "--seeed=3"], ["--undefok=seeed", "every flag must be known"]),
        (["--undefok", "seeed"], ["--undefok", "every flag must be known"]),
        *(
            ([f"--{name}=999999999999"], [name, "999999999999"])
            for name in ("batch_size", "global_batch_size", "eval_batch_size", "threads", "data_threads", "image_size")
        ),
        (["--num_classes=1000000000"], ["num_classes", "1000000000"]),
        (["--train_examples=1000000000000"], ["train_examples", "1000000000000"]),
        (["--stall_timeout=1e300"], ["--stall_timeout=1e300: must be a finite number from 1 to 1000000"]),
    ],
)
def test_bad_flags_give_one_line_with_the_remedy(arguments, parts):
    with pytest.raises(FlagError) as caught:
        commandline.parse(arguments)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_defaults_follow_the_data_set():
    small, large = commandline.parse(["--dataset=fashion_mnist"]), commandline.parse([])
    assert (small.data.image_size, small.data.eval_crop, small.model.num_classes) == (32, 1.0, 10)
    assert (large.data.image_size, large.data.eval_crop, large.model.num_classes) == (224, 0.875, 1000)
    assert commandline.parse(["--dataset=fashion_mnist", "--image_size=64"]).data.image_size == 64


def test_a_value_for_the_negative_form_of_a_switch_is_refused():
    with pytest.raises(FlagError, match="--noquick=1 does not take an argument"):
        commandline.parse(["--noquick=1"], "doctor")


def test_flagfiles_nest_later_flags_win_and_lines_may_be_indented(tmp_path):
    (tmp_path / "base.flags").write_text("# a comment\n--seed=1\n--batch_size=4\n")
    (tmp_path / "top.flags").write_text(f"--flagfile={tmp_path}/base.flags\n  --seed=2\n  # indented\n\t--width=2\n")
    parsed = commandline.parse([f"--flagfile={tmp_path}/top.flags", "--batch_size=8"])
    assert (parsed.recipe.seed, parsed.recipe.batch_size, parsed.model.width) == (2, 8, 2.0)
    (tmp_path / "bad.flags").write_text("--seed=1  # behind a value\n")
    with pytest.raises(FlagError, match="starts with #"):
        commandline.parse([f"--flagfile={tmp_path}/bad.flags"])


@pytest.mark.parametrize("flag", ["export", "checkpoint"])
def test_an_empty_path_of_a_command_is_refused(flag):
    """As after --export="$OUT" with an empty OUT; a flag of a run may be empty, to override a flagfile."""
    with pytest.raises(FlagError, match=f"--{flag}=: the value is empty"):
        commandline.parse([f"--{flag}="], "evaluate")
    assert commandline.parse(["--data_dir=", "--init_from="]).run.init_from is None


@pytest.mark.parametrize(
    "line, begins",
    [
        ("--batch_sise=3", "--batch_sise=3: unknown flag"),
        ("--batch_size=x", "--batch_size=x: must be a whole number"),
        ("--phase=main:stepz=3", "--phase=main: unknown key"),
        ("--nodes=3", "--nodes=3: belongs to"),
        ("--flagfile=none.flags", "--flagfile=none.flags: No such file"),
        ("two words", "'two words' is not a flag"),
        ("--flagfile=$NONE/x", "--flagfile=$NONE/x: $NONE is not defined"),
        ("-batch_size=x", "--batch_size=x: must be a whole number"),
        ("--model=a: b", "--model=a: b: must be one of"),
        ("--dry_run", "--dry_run=True: belongs to"),
    ],
)
def test_an_error_in_a_flagfile_names_the_file_and_the_line(line, begins, tmp_path):
    (tmp_path / "top.flags").write_text(f"# A comment.\n--flagfile={tmp_path}/base.flags\n")
    (tmp_path / "base.flags").write_text(f"--seed=1\n\n{line}\n")
    with pytest.raises(FlagError) as caught:
        commandline.parse([f"--flagfile={tmp_path}/top.flags"])
    assert str(caught.value).startswith(begins) and str(caught.value).endswith(f" ({tmp_path}/base.flags, line 3)")
    with pytest.raises(FlagError) as caught:  # negative control: on the command line
        commandline.parse(line.split(" ", 0))
    assert "line 3" not in str(caught.value)


def test_a_phase_that_replaces_another_is_not_blamed_on_the_flagfile(tmp_path):
    (tmp_path / "F").write_text("--phase=main:steps=3,lr=1\n")
    with pytest.raises(FlagError) as caught:
        commandline.parse([f"--flagfile={tmp_path}/F", "--phase=main:stepz=3,lr=1"])
    assert str(caught.value).endswith("did you mean steps?")


def test_an_empty_number_of_a_run_overrides_that_of_a_flagfile(tmp_path):
    (tmp_path / "F").write_text("--batch_size=8\n--image_size=64\n--eval_crop=0.5\n")
    found = commandline.parse(
        [f"--flagfile={tmp_path}/F", "--batch_size=", "--image_size=", "--ranks=", "--eval_crop="]
    )
    assert (found.recipe.batch_size, found.data.image_size, found.system.ranks) == (None, 224, None)
    assert "batch_size" not in found.resolved_flags and found.data.eval_crop == 0.875
    for command, flag in (("prepare", "short_side"), ("train", "log_every_steps")):
        with pytest.raises(FlagError, match=f"--{flag}=: "):
            commandline.parse([f"--{flag}="], command)


def test_resolved_flags_are_a_fixed_point(tmp_path):
    given = ["--dataset=fashion_mnist", "--data_dir=d", PHASE, "--phase=b:epochs=1,lr_per_256=0.1,wd=0", "--conv1_bias"]
    first = commandline.parse([*given, "--nowd_on_bn", "--run_dir=a folder", "--bn_epsilon=1.001e-5"])
    (tmp_path / "resolved.flags").write_text(first.resolved_flags)
    second = commandline.parse([f"--flagfile={tmp_path}/resolved.flags"])
    assert second == first
    assert second.resolved_flags == first.resolved_flags


def test_help_shows_the_flags_of_its_command_and_no_others():
    every = commandline.all_flags()
    assert {flag.name for flag in every} == set(CHANGES) | set(OF_OTHER_COMMANDS)
    for command in (*settings.OF_A_RUN, "launch", "prepare", "tables", "doctor"):
        shown = {
            line.split()[0].split("=")[0] for line in commandline.help_text(command).splitlines() if "  --" in line
        }
        assert shown == {f"--{flag.name}" for flag in every if command in flag.commands}, command


def test_help_is_wrapped():
    assert max(map(len, commandline.help_text("train").splitlines())) <= 120


@pytest.mark.parametrize("argument", ["--help", "-h", "--helpfull"])
def test_help_exits_0(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        commandline.parse([argument])
    assert caught.value.code == 0
    assert "--batch_size" in capsys.readouterr().out


def test_the_reference_is_that_of_the_code():
    """`make docs` writes it."""
    written = (ROOT / "docs" / "flags.md").read_text()
    assert written == commandline.reference()
    for flag in commandline.all_flags():
        assert f"| `--{flag.name}` |" in written, flag.name


# A value for every flag of a run that differs from its default and changes the settings.
CHANGES = {
    "experiment": "scaling",
    "bad_records": "skip",
    "max_bad": "5",
    "accumulate_steps": "2",
    "optimizer": "lars",
    "momentum_correction": "true",
    "label_smoothing": "0.1",
    "nesterov": "true",
    "exchange": "bfloat16",
    "bn_stats_batch": "4",
    "phase": "x:steps=2,lr=1",
    "batch_size": "5",
    "global_batch_size": "10",
    "lr_scaling": "sqrt",
    "wd_on_bn": "true",
    "seed": "4",
    "dataset": "digits",
    "data_dir": "d",
    "eval_split": "test",
    "train_examples": "9",
    "num_classes": "3",
    "image_size": "64",
    "resize": "bicubic",
    "normalization": "tf",
    "crop": "authors:0.2,0.9",
    "precision": "bfloat16",
    "init_from": "runs/other",
    "profile_steps": "5,7",
    "eval_crop": "0.5",
    "data_threads": "3",
    "model": "resnet18",
    "width": "2",
    "stem": "small",
    "stride_in": "1x1",
    "padding": "same",
    "zero_gamma": "none",
    "bn_momentum": "0.5",
    "bn_epsilon": "0.1",
    "conv1_bias": "true",
    "run_dir": "r",
    "resume": "must",
    "max_steps": "3",
    "eval_every_epochs": "2",
    "eval_batch_size": "7",
    "checkpoint_every_steps": "3",
    "keep_checkpoints": "5",
    "log_every_steps": "2",
    "ranks": "2",
    "threads": "2",
    "fused_kernels": "no",
    "stall_timeout": "9",
}


OF_OTHER_COMMANDS = {
    "short_side": "prepare",
    "jpeg_quality": "prepare",
    "validation_share": "prepare",
    "allow_incomplete": "prepare",
    "checkpoint": "evaluate",
    "export": "evaluate",
    "ensemble": "evaluate",
    "members": "evaluate",
    "benchmark": "benchmark",
    "warmup_steps": "benchmark",
    "timed_steps": "benchmark",
    "format": "plan",
    "speed": "plan",
    "nodes": "simulate",
    "network": "simulate",
    "ranks_per_node": "launch",
    "hosts": "launch",
    "mpi": "launch",
    "interface": "launch",
    "dry_run": "launch",
    "tune": "launch",
    "raw_dir": "prepare",
    "runs": "tables",
    "quick": "doctor",
    "json": "doctor",
}


def of_a_run():
    return [flag for flag in commandline.all_flags() if flag.of_a_run]


def test_every_flag_of_a_run_changes_the_settings():
    assert {flag.name for flag in of_a_run()} == set(CHANGES)
    before = commandline.parse([])
    for name, value in CHANGES.items():
        after = commandline.parse([f"--{name}={value}"])
        assert dataclasses.replace(after, resolved_flags="") != dataclasses.replace(before, resolved_flags=""), name
        assert after.given == {name}


@pytest.mark.parametrize("name", commandline.REMOVED)
def test_a_removed_flag_is_refused_with_its_replacement(name):
    for argument in (f"--{name}=1", f"--no{name}"):
        with pytest.raises(FlagError) as caught:
            commandline.parse([argument])
        assert commandline.REMOVED[name] in str(caught.value)


def test_paths_expand_the_home_folder_and_variables(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("HOME", "/home/me")
    found = commandline.parse(["--run_dir=$SCRATCH/run", "--data_dir=~/data", "--init_from=${SCRATCH}/w.npz"])
    assert (found.run.run_dir, found.data.data_dir, found.run.init_from) == (
        "/scratch/run",
        "/home/me/data",
        "/scratch/w.npz",
    )
    assert "--run_dir=/scratch/run" in found.resolved_flags


@pytest.mark.parametrize(
    "path, part",
    [
        ("$NOT_DEFINED/run", "$NOT_DEFINED is not defined"),
        ("${NOT_DEFINED}/run", "${NOT_DEFINED} is not defined"),
        ("runs/$NOT_DEFINED", "$NOT_DEFINED is not defined"),
        ("${NOT_DEFINED:-runs}/a", "${NOT_DEFINED:-runs} is not defined"),
        ("$EMPTY/run", "$EMPTY is empty"),  # would be /run
        ("~no_such_user/run", "~no_such_user is not known"),
        ('"runs/a"', "quotes"),
        ("'runs/a'", "quotes"),
        ('"$HOME"/runs', "quotes"),
        ('runs/"a b"', "quotes"),
        (" runs/a", "begins or ends with a space"),
        ("runs/a\udcf6", "not UTF-8"),  # as Python gives a name in Latin-1
    ],
)
@pytest.mark.parametrize("command, flag", [("train", "run_dir"), ("evaluate", "checkpoint"), ("plan", "flagfile")])
def test_paths_that_a_shell_would_have_to_read_are_refused(path, part, command, flag, monkeypatch):
    """Fault: folders named ~, $SCRATCH and "runs were made in the current folder."""
    monkeypatch.delenv("NOT_DEFINED", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(FlagError) as caught:
        commandline.parse([f"--{flag}={path}"], command)
    assert part in str(caught.value) and f"--{flag}" in str(caught.value), caught.value


@pytest.mark.parametrize(
    "path", ["runs/a~", "runs/~/a", "bob's/runs", "a$", "$", "$(date)", "`date`", "runs/$FULL$EMPTY", "läufe/a b"]
)
def test_negative_control_other_paths_stay(path, monkeypatch):
    monkeypatch.setenv("FULL", "$x")  # a value is not expanded again
    monkeypatch.setenv("EMPTY", "")
    assert commandline.parse([f"--run_dir={path}"]).run.run_dir == path.replace("$FULL$EMPTY", "$x")


def test_every_flag_that_names_a_path_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    named = {
        "data_dir",
        "run_dir",
        "init_from",
        "checkpoint",
        "export",
        "members",
        "speed",
        "network",
        "raw_dir",
        "runs",
    }
    every = [flag for flag in commandline.all_flags() if flag.field.metadata["path"]]
    assert {flag.name for flag in every} == named
    for flag in every:
        found = commandline.parse([f"--{flag.name}=~/x"], flag.commands[0])
        value = getattr(getattr(found, flag.group), flag.field.name)
        assert value in ("/home/me/x", ("/home/me/x",)), flag.name


@pytest.mark.parametrize(
    "argument", ['--dataset="imagenet"', "--phase='main:steps=1,lr=1'", '--phase="a:steps=1,lr=1"']
)
def test_quotes_around_a_value_are_refused(argument, tmp_path):
    (tmp_path / "f.flags").write_text(f"{argument}\n")
    with pytest.raises(FlagError, match="quotes, which belong to the shell"):
        commandline.parse([f"--flagfile={tmp_path}/f.flags"])


def test_flags_that_version_0_1_recorded_are_understood(tmp_path):
    (tmp_path / "resolved.flags").write_text(
        "# data\n--dataset=digits\n--crop=inception\n--crop_area=0.25,1\n--crop_aspect=0.75,1.3333\n--order_block=1\n"
        "--lars_eta=0.001\n--untimed_steps=10\n--seed=3\n"
    )
    found = commandline.parse(["--seed=4"], "evaluate", recorded=str(tmp_path))
    assert (found.data.crop, found.data.crop_area, found.recipe.seed) == ("inception", (0.25, 1.0), 4)
    assert found.run.run_dir == str(tmp_path)


def test_a_removed_flag_that_a_run_recorded_does_not_keep_it_from_being_evaluated(tmp_path):
    (tmp_path / "resolved.flags").write_text("--dataset=digits\n--order_block=8\n--crop_aspect=0.75,1.333\n--seed=3\n")
    assert commandline.parse([], "evaluate", recorded=str(tmp_path)).recipe.seed == 3
    with pytest.raises(FlagError, match="--order_block=8"):  # negative control: on the command line it is refused
        commandline.parse(["--order_block=8"], "evaluate", recorded=str(tmp_path))


def test_flagfiles_are_utf_8_with_or_without_a_byte_order_mark(tmp_path, monkeypatch):
    """Held against version 0.1, to which a byte order mark was a riddle and Latin-1 a traceback."""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    (tmp_path / "with.flags").write_bytes("--run_dir=läufe\n--seed=1\n".encode("utf-8-sig"))
    for name in (f"{tmp_path}/with.flags", "$FOLDER/with.flags"):
        found = commandline.parse([f"--flagfile={name}"])
        assert (found.run.run_dir, found.recipe.seed) == ("läufe", 1)
    (tmp_path / "windows.flags").write_bytes("--run_dir=läufe\r\n\r\n# Größe\r\n--seed=1".encode())
    assert commandline.parse([f"--flagfile={tmp_path}/windows.flags"]).run.run_dir == "läufe"
    for encoding in ("latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037"):
        (tmp_path / "other.flags").write_bytes("--run_dir=läufe\n".encode(encoding))
        with pytest.raises(FlagError, match="other.flags: not UTF-8.*; save the file as UTF-8"):
            commandline.parse([f"--flagfile={tmp_path}/other.flags"])


@pytest.mark.parametrize("path, part", [("no.flags", "No such file"), (".", "Is a directory"), ("", "No such file")])
def test_a_flagfile_that_cannot_be_read_is_refused(path, part):
    with pytest.raises(FlagError) as caught:
        commandline.parse([f"--flagfile={path}"])
    assert part in str(caught.value) and f"--flagfile={path}" in str(caught.value)
    with pytest.raises(FlagError, match="--flagfile="):
        commandline.parse(["--flagfile"])


def test_a_flagfile_that_includes_itself_is_refused(tmp_path):
    (tmp_path / "a.flags").write_text(f"--seed=1\n--flagfile={tmp_path}/a.flags\n")
    with pytest.raises(FlagError, match="includes itself"):
        commandline.parse([f"--flagfile={tmp_path}/a.flags"])


def test_flagfiles_nest_up_to_a_depth(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.flags").write_text(f"--flagfile={tmp_path}/{number + 1}.flags\n")
    (tmp_path / "60.flags").write_text("--seed=5\n")
    assert commandline.parse([f"--flagfile={tmp_path}/11.flags"]).recipe.seed == 5
    with pytest.raises(FlagError, match="more than 50 flagfiles within each other"):
        commandline.parse([f"--flagfile={tmp_path}/10.flags"])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="resolved.flags"):
        commandline.parse([], "evaluate", recorded=str(tmp_path))


def test_flags_over_a_recorded_run_need_not_be_whole(tmp_path):
    run_dir = recorded_run(tmp_path / "run", ["--dataset=tfds:cats", "--num_classes=3"])
    more = ["--dataset=tfds:dogs"]
    assert commandline.parse(more, "evaluate").given == {"dataset"}
    assert commandline.parse(more, "evaluate", recorded=run_dir).model.num_classes == 3
    assert commandline.parse(["verify", *more], "prepare").data.dataset == "tfds:dogs"
    with pytest.raises(FlagError, match="num_classes"):  # negative control
        commandline.parse(more, "train")


def recorded_run(folder, flags, pixels=None):
    folder.mkdir()
    (folder / "resolved.flags").write_text("\n".join(flags) + "\n")
    (folder / "run.json").write_text(json.dumps({"signature": {**SIGNATURE, "data": {"pixels": pixels}}}))
    return str(folder)


SIGNATURE = {"model": {}, "recipe": {}, "phases": {}}
PIXELS = {"mean": [1, 2, 3], "std": [1, 1, 1]}


@pytest.mark.parametrize(
    "flags, pixels, asked, view",
    [
        (["--dataset=imagenet"], None, ["--dataset=tfds:imagenet_v2"], ("authors", 224, 0.875, 1000)),
        (["--dataset=tiny_imagenet"], PIXELS, ["--dataset=imagenet"], ("dataset", 64, 1.0, 200)),
        (["--dataset=tiny_imagenet"], None, ["--dataset=imagenet"], ("tf", 64, 1.0, 200)),
        (["--dataset=imagenet", "--image_size=96"], None, ["--dataset=folder"], ("authors", 96, 0.875, 1000)),
        (["--dataset=imagenet"], None, ["--dataset=folder", "--eval_crop=1"], ("authors", 224, 1.0, 1000)),
        (["--dataset=imagenet"], None, ["--data_dir=elsewhere"], ("auto", 224, 0.875, 1000)),
    ],
)
def test_another_data_set_is_seen_as_the_one_of_training(tmp_path, flags, pixels, asked, view):
    run_dir = recorded_run(tmp_path / "run", flags, pixels)
    found = commandline.parse(asked, "evaluate", recorded=run_dir)
    data = found.data
    assert (data.normalization, data.image_size, data.eval_crop, found.model.num_classes) == view


def test_what_a_run_saw_is_not_guessed(tmp_path):
    run_dir = recorded_run(tmp_path / "run", ["--dataset=imagenet"])
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(CheckpointError, match="run.json is missing or damaged.* evaluate on that data set"):
        commandline.parse(["--dataset=folder", "--num_classes=1000"], "evaluate", recorded=run_dir)
    assert commandline.parse([], "evaluate", recorded=run_dir).data.dataset == "imagenet"


def test_a_part_of_imagenet_has_its_own_number_of_examples(tmp_path):
    splits = {"train": [{"examples": 700}], "validation": [{"examples": 50}]}
    (tmp_path / "manifest.json").write_text(json.dumps({"num_classes": 100, "splits": splits}))
    facts = datasets.facts_of("imagenet", str(tmp_path))
    assert (facts.train_examples, facts.validation_examples, facts.num_classes) == (700, 50, 1000)
    assert datasets.facts_of("imagenet").train_examples == 1_281_167

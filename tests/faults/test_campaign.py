"""Short campaigns of faults, and the proof that a campaign notices when a promise is broken."""

import os
import shutil

import attempts
import campaign
import damage
import pytest

from resnet_cpu.run import checkpoint

SEED = 14


@pytest.fixture
def table(tmp_path):
    return campaign.Table(str(tmp_path / "campaign.csv"), SEED)


def problems(table):
    return [row["problems"] for row in table.rows if row["problems"]]


@pytest.mark.mpi
def test_a_run_that_meets_many_faults_ends_with_the_bits_of_an_undisturbed_one(table, tmp_path):
    """The first five kinds: a kill, a full disk, NaN, a request to stop, a kill inside a save."""
    campaign.attack("mixed", 5, table, str(tmp_path))
    assert not problems(table)
    assert [row["finished"] for row in table.rows][-1] == "same bits"
    assert {"137", "74", "77", "75"} <= {row["code"] for row in table.rows}, table.summary()


@pytest.mark.training
def test_nothing_durable_is_lost_when_a_save_is_killed_at_any_stage(table, tmp_path):
    campaign.attack_writer(20, table, str(tmp_path))
    assert not problems(table) and len(table.rows) == 20


@pytest.mark.training
@pytest.mark.parametrize(
    "wrong, found", [("before_manifest", "not a checkpoint"), ("after_removing", "durable"), ("early", "durable")]
)
def test_negative_control_a_wrong_order_of_saving_is_noticed(table, tmp_path, wrong, found):
    campaign.attack_writer(12, table, str(tmp_path), wrong)
    assert any(found in problem for problem in problems(table))


@pytest.mark.training
def test_no_damaged_checkpoint_is_accepted_or_misdiagnosed(table, tmp_path):
    campaign.attack_checkpoints(400, table, str(tmp_path))
    assert len(table.rows) == 400 and not problems(table)
    assert {row["asked"].partition(":")[0] for row in table.rows} == set(damage.FILES)


def test_negative_control_without_checksums_damage_is_accepted(table, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    campaign.attack_checkpoints(60, table, str(tmp_path))
    assert any("accepted" in problem for problem in problems(table))


def test_a_checkpoint_from_before_manifests_had_a_checksum_is_accepted(tmp_path):
    path = damage.make(str(tmp_path))
    manifest = checkpoint.read_manifest(path)
    with open(os.path.join(path, checkpoint.MANIFEST), "w") as file:
        file.write(campaign.json.dumps(manifest, indent=1) + "\n")
    assert checkpoint.newest(str(tmp_path)) == (path, manifest)


def test_negative_control_processes_that_are_left_are_counted_and_ended():
    ended = attempts.run(["bash", "-c", "echo fault: now >&2; sleep 600 & exit 0"], "0:step:kill", within=1.0)
    assert ended.code == 0 and ended.reached and ended.left == 1


@pytest.mark.parametrize("looks, expected", [([[], [7]], [7]), ([[], []], []), ([[7]], [7])])
def test_a_process_that_is_starting_a_program_is_not_taken_for_gone(looks, expected, monkeypatch):
    looks = iter(looks)
    monkeypatch.setattr(attempts, "_look", lambda token: next(looks))
    assert attempts.processes("token") == expected


def test_negative_control_other_ends_than_promised_are_noticed(tmp_path):
    damage.make(str(tmp_path))
    kill = campaign.FAULTS["kill"]

    def found(code, left=0, err="", before=2):
        ended = attempts.Ended(code, True, 1.0, left, "", err)
        return " ".join(campaign.judge(kill, ended, str(tmp_path), before))

    assert not found(137)
    assert "exit code 1, not [137]" in found(1)
    assert "3 processes left" in found(137, left=3)
    assert "newest checkpoint after step 2, was 4" in found(137, before=4)
    assert "but stopped after 3" in found(137, err="stopped on request after step 3, checkpoint written")
    assert "traceback" in found(137, err="Traceback (most recent call last)")
    os.truncate(os.path.join(checkpoint.folder(str(tmp_path), 1), "weights.npz"), 9)
    assert "weights.npz: damaged" in found(137)


def test_negative_control_a_changed_bit_changes_the_fingerprint(tmp_path):
    path = damage.make(str(tmp_path / "one"))
    one = campaign.fingerprint(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    assert campaign.fingerprint(str(tmp_path / "other")) == one
    arrays = {group: checkpoint.load(path, group) for group in ("weights", "optimizer")}
    arrays["optimizer"]["conv0/kernel:0"][0, 0, 0] *= 1 + 2**-23
    checkpoint.save(checkpoint.folder(str(tmp_path / "other"), 2), arrays, checkpoint.read_manifest(path))
    assert campaign.fingerprint(str(tmp_path / "other"))["state"] != one["state"]


def test_a_campaign_continues_after_its_last_row(tmp_path, capsys):
    arguments = ["--seed=1", "--faults=writer,checkpoints", f"--out={tmp_path}/out.csv"]
    assert campaign.main([*arguments, "--n=2"]) == 0
    with open(f"{tmp_path}/out.csv") as file:
        first = file.read()
    assert campaign.main([*arguments, "--n=4"]) == 0
    with open(f"{tmp_path}/out.csv") as file:
        assert file.read().startswith(first)
    assert "| writer | 4 | -9 |" in capsys.readouterr().out

"""benchmarks/replay_fit.py: fits to made-up replays, predictions, reduced files, the figures in docs/simulate.md."""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
from conftest import ROOT

from resnet_cpu import commandline
from resnet_cpu.errors import DataError
from resnet_cpu.model import tensors
from resnet_cpu.simulator import cluster
from resnet_cpu.simulator.network import Network

sys.path.insert(0, str(ROOT / "benchmarks"))
import replay_fit

RESULTS = ROOT / "benchmarks" / "results" / "replay.csv"
COLUMNS = "round,hosts,ranks,mbit,model,width,image_size,compute_s,forward_share,bytes,tensors,fusion_bytes,cycle_ms"
TRUE = Network("replay", 2e-4, 100e9 / 8, 2e-4, reduce_s_per_byte=3e-9)
FREE = Network("free", 0.0, 1.0, 0.0, math.inf, 0.0)
MESSAGE = replay_fit.Setting(2, 2, 1000, "message", 1.0, 224, 0.0, 1 / 3, 10**8, 0, 0.0)


def write_steps(path, noise=0.0):
    """Write single steps of two and of four hosts that behave exactly as in the model, except for `noise`."""
    generator, lines = np.random.Generator(np.random.Philox(5)), [f"{COLUMNS},step,step_s,lateness_s"]
    kinds = [("resnet18", 0.5, 0.0), ("resnet18", 1.0, 0.0), ("resnet50", 0.5, 0.5), ("message", 1.0, 0.0)]
    for hosts, mbit, (model, width, compute_s) in itertools.product((2, 4), (500, 1000, 2500, 10000), kinds):
        size = 4096 if model == "message" else sum(t.bytes for t in tensors.gradients(model, width, image_size=96))
        fusion = 0 if model == "message" else 2**24
        setting = replay_fit.Setting(hosts, hosts, mbit, model, width, 96, compute_s, 0.333333, size, fusion, 1.0)
        for number in range(3):
            seconds = replay_fit.predict(setting, TRUE) * (1 + noise * generator.standard_normal())
            cells = [1, hosts, hosts, mbit, model, width, 96, compute_s, 0.333333, size, 1, fusion, 1.0, number]
            lines.append(",".join(str(cell) for cell in [*cells, seconds, 0.0]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_constants_of_a_replay_are_found_again_and_the_rest_is_held_out(tmp_path):
    found = replay_fit.validate(replay_fit.read_replay(write_steps(tmp_path / "replay.csv")))
    for hosts in (2, 4):
        assert found.networks[hosts].latency_s == pytest.approx(TRUE.latency_s, rel=1e-3)
        assert found.networks[hosts].reduce_s_per_byte == pytest.approx(TRUE.reduce_s_per_byte, rel=1e-3)
    assert len(found.rows) == 32
    fitted = {(setting.model, setting.mbit) for setting, point in found.rows if point.fitted}
    assert fitted == {("resnet18", 500), ("resnet18", 10000), ("message", 500), ("message", 10000)}
    assert all(setting.width == 0.5 for setting, point in found.rows if point.fitted and setting.model == "resnet18")
    assert max(found.errors()["models, held out"]) < 0.01


def test_the_script_prints_errors_and_constants_that_simulate_takes(tmp_path, capsys):
    noisy = write_steps(tmp_path / "noisy.csv", noise=0.02)
    replay_fit.main([noisy, f"--plot={tmp_path}/plot.png"])
    printed = capsys.readouterr().out.splitlines()
    errors = replay_fit.validate(replay_fit.read_replay(noisy)).errors()["models, held out"]
    assert 0 < max(errors) < 0.1
    assert sum(line.startswith("models, held out, ") and " of 10 within 5 %" in line for line in printed) == 2
    assert f"models, held out: {len(errors)} settings" in "\n".join(printed)
    assert f"median error {100 * np.median(errors):.1f} %, largest {100 * max(errors):.1f} %" in "\n".join(printed)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    constants = json.loads(printed[-1])["2"]
    assert "bandwidth" not in constants  # it was that of the links, not of the network to predict
    (tmp_path / "network.json").write_text(json.dumps({**constants, "bandwidth": 1.25e9}))
    settings = commandline.parse([f"--network={tmp_path}/network.json"], "simulate")
    assert cluster.from_settings(settings).network.latency_s == constants["latency_s"]


def test_a_reduced_file_gives_the_same_fit_as_the_steps(tmp_path):
    steps = write_steps(tmp_path / "steps.csv", noise=0.02)
    replay_fit.main([steps, f"--reduce={tmp_path}/reduced.csv"])
    measured, reduced = (replay_fit.read_replay(path) for path in (steps, f"{tmp_path}/reduced.csv"))
    assert list(measured) == list(reduced)
    assert all(found.n == 3 and found.p10_s < found.step_s < found.p90_s for found in reduced.values())
    assert len((tmp_path / "reduced.csv").read_text().splitlines()) == 1 + 32
    assert replay_fit.lines(replay_fit.validate(measured)) == replay_fit.lines(replay_fit.validate(reduced))


def test_docs_state_the_figures_of_the_committed_replay():
    """docs/simulate.md: a row `| hosts | held out | within 5 % | median | largest | ...` for each number of hosts."""
    rows = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8").splitlines()
    found = replay_fit.validate(replay_fit.read_replay(str(RESULTS)))
    for hosts in (2, 3, 4):
        errors = found.errors_of_models(hosts)
        near = sum(error <= replay_fit.AIM for error in errors)
        figures = f"| {hosts} | {len(errors)} | {near} | {100 * np.median(errors):.1f} % | {100 * max(errors):.1f} % |"
        assert any(row.startswith(figures) for row in rows), figures


def test_the_bandwidth_is_the_speed_of_the_links_less_headers():
    assert replay_fit.predict(MESSAGE, FREE) == pytest.approx(10**8 * 8 / 1e9 * 1514 / 1448)
    # Rabenseifner on three hosts, the choice of Open MPI, against a ring.
    three = dataclasses.replace(MESSAGE, hosts=3, ranks=3)
    ring = dataclasses.replace(three, allreduce="ring")
    assert replay_fit.predict(three, FREE) / replay_fit.predict(ring, FREE) == pytest.approx(3 / (4 / 3))
    model = dataclasses.replace(MESSAGE, model="resnet18", compute_s=1.0, fusion_bytes=2**20, cycle_ms=1.0)
    kernels_last = dataclasses.replace(model, inter_op_threads=1)
    assert 1 < replay_fit.predict(model, FREE) < replay_fit.predict(kernels_last, FREE)


def test_gradients_that_were_released_late_are_predicted_late(tmp_path):
    path = tmp_path / "replay.csv"
    write_steps(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line[: line.rindex(",")] + ",0.5" if ",500," in line else line for line in lines))
    measured = replay_fit.read_replay(str(path))
    setting = next(one for one in measured if one.mbit == 500 and one.model == "resnet50")
    assert measured[setting].late_s == 0.5
    later = replay_fit.predict(setting, TRUE, measured[setting].late_s)
    slower = dataclasses.replace(setting, compute_s=setting.compute_s + 0.5)
    assert later == replay_fit.predict(slower, TRUE) > replay_fit.predict(setting, TRUE)


def test_the_burst_of_the_shaper_and_the_cycle_of_horovod_count():
    small = dataclasses.replace(MESSAGE, bytes=4096)
    assert replay_fit.predict(small, FREE) == 0  # a few bytes never wait for the link
    horovod = dataclasses.replace(small, model="horovod_message", fusion_bytes=2**27, cycle_ms=1.0)
    assert replay_fit.predict(horovod, FREE) == pytest.approx(1.05e-3)
    # Longer than a cycle: the wait for the next check, less the burst that the link accumulates meanwhile.
    link = replay_fit.PAYLOAD * 1e9 / 8
    alone = 10**7 / link + 24 / link
    for mbit, saved in ((1000, 1.05e-3), (10000, replay_fit.BURST / link / 10)):
        long = dataclasses.replace(horovod, bytes=10**7, mbit=mbit)
        assert replay_fit.predict(long, FREE) == pytest.approx(alone * 1000 / mbit + 1.05e-3 - saved, rel=1e-3)


def test_bad_files(tmp_path):
    write_steps(tmp_path / "good.csv")
    good = (tmp_path / "good.csv").read_text().splitlines()
    for text, message in (
        ("", "no rows"),
        ("a,b\n1,2\n", "column 'hosts' is missing"),
        ("\n".join([good[0], good[1].replace("1,2,2,", "1,two,2,", 1)]), "line 2 cannot be read"),
        ("\n".join([good[0], good[1].replace("1,2,2,", "1,2,3,", 1)]), "line 2 has impossible times or ranks"),
        ("\n".join([good[0], *(line for line in good[1:] if ",message," in line)]), "has only messages"),
        ("\n".join([good[0], *(line for line in good if ",500,resnet18,0.5" in line)]), "1 points"),
        ("\n".join([f"{good[0]},allreduce", good[1] + ",star"]), "allreduce star is not known"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            replay_fit.validate(replay_fit.read_replay(str(tmp_path / "bad.csv")))
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        replay_fit.read_replay(str(tmp_path / "bad.csv"))

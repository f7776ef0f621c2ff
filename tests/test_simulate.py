"""The command `python -m resnet_cpu.simulate`: its output, and flags that contradict each other."""

import subprocess
import sys

import pytest
from conftest import OUTSIDE

from resnet_cpu import simulate
from resnet_cpu.errors import CheckpointError, FlagError


def test_it_prints_the_answer(capsys):
    simulate.main(["--nodes=4", "--batch_size=32", "--format=csv"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("4,8,256,")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--network=carrier_pigeon"], "neither a file nor one of omnipath"),
        (["--ranks_per_node=two"], "--ranks_per_node=two"),
        (["--ranks=3"], "--ranks=3: contradicts 1536 nodes of 2"),
        (["--model=resnet101"], "is not known; give --speed"),
        (["--ranks_per_node=4"], "--ranks_per_node=4: the fitted speed is that of nodes of 2 ranks; give --speed"),
        (["--image_size=32"], "is not known; give --speed"),
        (["--speed=0"], "--speed=0: must be above 0"),
        (["--speed=nan"], "--speed=nan: must be above 0"),
        (["--nodes=7", "--global_batch_size=15"], "not divisible by 14 ranks"),
        (["--nodes=7", "--raw_dir=y"], "resnet_cpu.prepare"),
        (["--validate=x.csv"], "benchmarks/replay_fit.py"),
        (["--images_per_second=3"], "--speed="),
        (["--past_run=a"], "--speed="),
        (["--format=png", "--output=x.png"], "simulate.png"),
        (["--exchange=bfloat16"], "only messages in float32 are simulated"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(FlagError, match=message):
        simulate.main(arguments)


def test_a_missing_run_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="--speed=no/such/run"):
        simulate.main(["--speed=no/such/run"])


def test_the_command_needs_no_tensorflow():
    program = (
        "import sys; from resnet_cpu import simulate; simulate.main(['--nodes=4']); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=OUTSIDE, check=True)
    assert done.stdout.splitlines()[-1] == "False"

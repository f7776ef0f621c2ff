"""Compare gradients sent as float32 and as bfloat16: training steps on two hosts of the network lab, in turns.

    python benchmarks/exchange.py --mbit 1000 --rounds 7 --out benchmarks/results/exchange.csv

As root, on an idle machine; docs/network_lab.md describes the lab. Images/s of both, their ratio, and the bytes that a
host sends in a step, from the counters of its interface.
"""

import os
import subprocess
import sys
from typing import Callable, Dict, List

import paired

LAB = paired.ROOT / "launch" / "network-lab"
NAME, HOSTS = "exchange", ("exchange1", "exchange2")
WARMUP = 3  # steps that are not timed
ENVIRONMENT = {
    "RESNET_CPU_LAB": NAME,
    "RESNET_CPU_LAUNCH_AGENT": str(LAB / "agent"),
    "PATH": f"{LAB}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
}


def lab(*arguments: str) -> str:
    """Run a command of the lab; return what it prints."""
    done = subprocess.run(
        ["lab", *arguments], env={**os.environ, **ENVIRONMENT}, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def bytes_sent() -> int:
    """Return the bytes that the first host has sent to the others."""
    return int(lab("run", HOSTS[0], "cat", "/sys/class/net/lan0/statistics/tx_bytes"))


def side(exchange: str, flags: List[str], steps: int, sent: Dict[str, List[float]]) -> Callable[[], float]:
    """Return a function that measures images/s; it adds the megabytes of a step to `sent`."""
    launch = ["lab", "run", HOSTS[0], sys.executable, "-m", "resnet_cpu.launch", f"--hosts={','.join(HOSTS)}"]
    benchmark = ["python", "-m", "resnet_cpu.benchmark", "--dataset=synthetic", f"--exchange={exchange}", *flags]

    def measure() -> float:
        before = bytes_sent()
        rate = paired.rate_of_benchmark(
            paired.start([*launch, "--ranks_per_node=1", "--threads=1", "--", *benchmark], **ENVIRONMENT)
        )
        sent.setdefault(exchange, []).append((bytes_sent() - before) / (steps + WARMUP) / 1e6)
        return rate

    return measure


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--mbit", type=int, default=1000, help="speed of the links, Mbit/s")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64, help="images per rank")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    flags = [f"--image_size={arguments.image_size}", f"--batch_size={arguments.batch_size}"]
    flags += [f"--timed_steps={arguments.steps}", f"--warmup_steps={WARMUP}"]
    sent: Dict[str, List[float]] = {}
    lab("up", "2", "--mbit", str(arguments.mbit))
    try:
        sides = {name: side(name, flags, arguments.steps, sent) for name in ("float32", "bfloat16")}
        paired.compare(sides, [("bfloat16", "float32")], arguments.rounds, arguments.out)
    finally:
        lab("down")
    for name, values in sent.items():
        print(f"{name}: a host sends {min(values):.1f} ... {max(values):.1f} MB in a step, start included")


if __name__ == "__main__":
    main()

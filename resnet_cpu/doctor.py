"""Say what is wrong with this machine and what to do about it: `python -m resnet_cpu.doctor [--run_dir=D]`."""

import sys
from typing import List

from resnet_cpu.diagnosis import examination
from resnet_cpu.diagnosis.examination import Asked


def main(argv: List[str]) -> int:
    """Print one line per check; with --json the last line has all of them. Return 1 if there is a problem."""
    from resnet_cpu import commandline  # needs absl, see below

    settings = commandline.parse(argv, "doctor")
    asked = Asked(settings.run.run_dir, settings.data.data_dir, settings.doctor.quick)
    return examination.report(asked, settings.doctor.json)


if __name__ == "__main__":
    if not examination.can_start():  # without absl or NumPy flags cannot be read: check what needs none
        sys.exit(examination.report(Asked(quick=True), "--json" in sys.argv))
    from resnet_cpu.cluster import guard

    guard.run(main, reader_may_leave=True)

"""Start a command as MPI ranks: `python -m resnet_cpu.launch -- python -m resnet_cpu.train --flagfile=F`."""

from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, launching, tuning


def main(argv: List[str]) -> None:
    """Report where the ranks go and why (standard error), then become the launcher.

    With --dry_run the launcher's command line is printed (standard output) and not started; with --tune the fastest
    number of ranks per host is timed, remembered and printed.
    """
    own, command = launching.split(argv)
    settings = commandline.parse(own, "launch")
    flags = settings.launch
    if flags.tune:
        tuning.tune(flags.mpi, command, settings.given)
        return
    launching.launch(
        command,
        ranks=settings.system.ranks,
        ranks_per_node=flags.ranks_per_node,
        threads=settings.system.threads,
        hosts=flags.hosts,
        mpi=flags.mpi,
        interface=flags.interface,
        dry_run=flags.dry_run,
    )


if __name__ == "__main__":
    guard.run(main)

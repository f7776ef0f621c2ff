"""Check what the ranks of a job must have in common: flags, code, packages, kept variables; with LARS, the threads."""

import dataclasses
import hashlib
import itertools
import re
import socket
import sys
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.cluster import environment, seats
from resnet_cpu.cluster.control import World
from resnet_cpu.cluster.machine import spans
from resnet_cpu.errors import FlagError
from resnet_cpu.run import provenance
from resnet_cpu.settings import Settings

_MAX_SHOWN = 4  # groups of ranks in a message


def check_same_everywhere(settings: Settings, world: World) -> None:
    """Raise FlagError that names the first rank which was started with something else than rank 0.

    Compared are flags, code, packages and the variables that RESNET_CPU_KEEP keeps although they change what is
    computed; `environment.settle` has removed all others of that kind.
    """
    # Each host may have its data elsewhere, as in $TMPDIR; `opening.open_data` compares what lies there.
    # Rank 0 alone writes what --export names, but all take part.
    of_command = {**dataclasses.asdict(settings.benchmark), **dataclasses.asdict(settings.evaluate)}
    if settings.evaluate.export is not None:
        of_command["export"] = "..."
    flags = [line for line in settings.resolved_flags.splitlines() if re.match("--(?!data_dir=)", line)]
    flags += [f"--{name}={value}" for name, value in of_command.items() if value is not None]
    kept = [f"{name}={value}" for name, value in environment.kept_arithmetic().items()]
    facts = {
        "flags": hashlib.sha256("\n".join(flags).encode()).hexdigest()[:12],
        "Python": sys.version.split()[0],
        "code": provenance.code_digest(),
        environment.KEEP: ", ".join(kept) or "unset",
        **provenance.versions(),
    }
    rows = world.gather({"host": socket.gethostname(), **facts})
    for rank, row in enumerate(rows):
        if row["flags"] != rows[0]["flags"]:
            _refuse_other_flags(world.gather(flags), rank, row["host"], rows[0]["host"])
        for key in facts:
            if row[key] != rows[0][key]:
                raise FlagError(
                    f"rank {rank} on {row['host']} runs with other {key} ({row[key]}) than rank 0 on "
                    f"{rows[0]['host']} ({rows[0][key]}); start all ranks from the same environment",
                    collective=True,
                )


def _refuse_other_flags(flags: Sequence[Sequence[str]], rank: int, host: str, host_of_first: str) -> None:
    """Raise FlagError that names the flags in which `rank` differs from rank 0."""
    own, first = flags[rank], flags[0]
    here, there = (sorted(set(one) - set(other)) for one, other in ((own, first), (first, own)))
    if not here and not there:  # such as two phases in another order
        pairs = itertools.zip_longest(own, first, fillvalue="none")
        here, there = ([text] for text in next(pair for pair in pairs if pair[0] != pair[1]))
    raise FlagError(
        f"rank {rank} on {host} runs with other flags than rank 0 on {host_of_first}: {', '.join(here) or 'none'} "
        f"instead of {', '.join(there) or 'none'}; give all ranks the same flags",
        collective=True,
    )


def _threads_of(place: Mapping[str, Any]) -> Tuple[int, Optional[int]]:
    """Return the threads of TensorFlow and of OpenMP on a rank; None where OMP_NUM_THREADS is not a number."""
    openmp = place["environment"].get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list: by level of nesting
    return int(place["environment"]["TF_NUM_INTRAOP_THREADS"]), int(openmp) if openmp.isdigit() else None


def check_threads(settings: Settings, places: Sequence[Mapping[str, Any]]) -> None:
    """Raise FlagError if ranks would compute other norms of the same weights.

    The order in which a norm is summed depends on the number of threads. With LARS the norms decide the update, so
    ranks with other numbers of threads would drift apart.
    """
    groups: Dict[Tuple[str, Tuple[int, Optional[int]]], List[int]] = {}
    for rank, place in enumerate(places):
        groups.setdefault((place["host"], _threads_of(place)), []).append(rank)
    different = {threads for _, threads in groups}
    if settings.recipe.optimizer != "lars" or len(different) == 1:
        return
    texts = []
    for (host, (threads, openmp)), ranks in groups.items():
        kernels = f" (OMP_NUM_THREADS={openmp})" if openmp not in (None, threads) else ""
        texts.append(f"rank{'s' * (len(ranks) > 1)} {spans(ranks)} on {host}: {threads}{kernels}")
    more = f" and {len(texts) - _MAX_SHOWN} more groups" if len(texts) > _MAX_SHOWN else ""
    raise FlagError(
        f"--optimizer=lars: needs the same number of threads on all ranks, since the norms of the layers depend on it "
        f"in their last bits; found {'; '.join(texts[:_MAX_SHOWN])}{more}. Give all ranks the same number: "
        f"--threads={min(threads for threads, _ in different)}"
    )


def print_places(places: Sequence[Mapping[str, Any]]) -> None:
    """Print on standard error where every rank sits, and warnings."""
    rows = []
    for place in places:
        threads, openmp = _threads_of(place)
        row = {"host": place["host"], "cpus": place["cores"], "cores": place["own_cores"], "threads": threads}
        rows.append({**row, **({} if openmp is None else {"omp": openmp}), "host_cpus": place["host_cores"]})
    for line in [*seats.describe(rows), *(f"warning: {problem}" for problem in seats.warnings(rows))]:
        print(line, file=sys.stderr, flush=True)

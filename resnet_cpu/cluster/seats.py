"""Describe where the ranks of a running job sit, and warn about seats that make it slow."""

import collections
from typing import Any, Dict, List, Mapping, Sequence

from resnet_cpu.cluster.machine import spans

_MAX_KINDS = 4  # lines of `describe`
_MAX_RANKS = 8  # ranks that one line names


def describe(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return lines that say where all ranks sit; hosts with equal seats share one line.

    `rows` has one row per rank, in the order of the ranks: `host`, `cpus` (the affinity mask), `cores`, `threads`.
    """
    hosts_by_seats: Dict[Any, List[str]] = {}
    for host, ranks in _by_host(rows).items():
        hosts_by_seats.setdefault(tuple((tuple(r["cpus"]), r["cores"], r["threads"]) for r in ranks), []).append(host)
    lines = []
    kinds = sorted(hosts_by_seats.items(), key=lambda kind: -len(kind[1]))
    for seats, hosts in kinds[:_MAX_KINDS]:
        ranks_text = f"{len(seats)} rank{'s' * (len(seats) != 1)}"
        where = f"host {hosts[0]}, {ranks_text}" if len(hosts) == 1 else f"{len(hosts)} hosts x {ranks_text}"
        sizes = " or ".join(
            f"{cores} core{'s' * (cores != 1)} and {threads} thread{'s' * (threads != 1)}"
            for cores, threads in sorted({(cores, threads) for _, cores, threads in seats})
        )
        lines.append(f"{where}, {sizes} each: {_cpus_of_ranks([cpus for cpus, _, _ in seats], len(hosts) > 1)}")
    rest = sum(len(hosts) for _, hosts in kinds[_MAX_KINDS:])
    if rest:
        lines.append(f"and {rest} more hosts, in {len(kinds) - _MAX_KINDS} other ways")
    return lines


def _cpus(cpus: str) -> str:
    return f"CPU {cpus}" if cpus.isdigit() else f"CPUs {cpus}"


def _cpus_of_ranks(masks: Sequence[Sequence[int]], several_hosts: bool) -> str:
    texts = [spans(cpus) for cpus in masks]
    if len(set(texts)) == 1 and len(texts) > 1:
        return f"all on {_cpus(texts[0])}, unbound"
    shown = list(enumerate(texts))
    if len(shown) > _MAX_RANKS:
        shown = [*shown[: _MAX_RANKS - 1], shown[-1]]
    named = [f"rank {i} on {_cpus(text)}" for i, text in shown]
    if len(texts) > _MAX_RANKS:
        named.insert(-1, "...")
    if several_hosts:
        named[0] = named[0].replace("rank 0 on", "rank 0 of a host on")
    return ", ".join(named)


def warnings(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return one line, with the remedy, for each problem with where ranks sit; `rows` as for `describe`.

    If rows have `host_cpus` (online logical CPUs of the host), CPUs that no rank may use are reported too; if they
    have `omp` (the rank's OMP_NUM_THREADS), kernels whose number of threads is not TensorFlow's.
    """
    hosts = _by_host(rows)
    affected: Dict[str, List[str]] = collections.defaultdict(list)  # problem -> hosts
    for host, ranks in hosts.items():
        for problem in _problems_of_host(ranks):
            affected[problem].append(host)
    lines = [f"{_named(names)}: {problem}" for problem, names in affected.items()]
    counts = collections.Counter(len(ranks) for ranks in hosts.values())
    if len(counts) > 1:
        each = ", ".join(f"{ranks} on {n} host{'s' * (n != 1)}" for ranks, n in sorted(counts.items()))
        lines.append(
            f"hosts have unequal numbers of ranks ({each}): all wait for the fullest host. Start the same number on "
            "each host"
        )
    speeds = sorted({min(row["threads"], row["cores"]) for row in rows})
    if len(speeds) > 1:
        lines.append(
            f"ranks compute with {speeds[0]} to {speeds[-1]} threads: all wait for the slowest. Give each the same "
            "number of cores"
        )
    return lines


def _problems_of_host(ranks: Sequence[Mapping[str, Any]]) -> List[str]:
    problems = []
    used = set().union(*(rank["cpus"] for rank in ranks))
    threads = sum(rank["threads"] for rank in ranks)
    cores = min(sum(rank["cores"] for rank in ranks), len(used))
    narrow = [rank["threads"] for rank in ranks if rank["threads"] > 1 and len(rank["cpus"]) == 1]
    if narrow:
        problems.append(
            f"{len(narrow)} of {len(ranks)} ranks are bound to one CPU and compute with {max(narrow)} threads: let the "
            "launcher bind each rank to as many cores as it has threads (python -m resnet_cpu.launch does)"
        )
    elif threads > cores:
        problems.append(
            f"{len(ranks)} rank{'s' * (len(ranks) != 1)} with {threads} threads on {cores} cores: they take turns, and "
            "all wait for the slowest. Start fewer ranks, or leave --threads out"
        )
    unequal = [rank for rank in ranks if rank.get("omp", rank["threads"]) != rank["threads"]]
    if unequal:
        problems.append(
            f"OMP_NUM_THREADS={unequal[0]['omp']}, TF_NUM_INTRAOP_THREADS={unequal[0]['threads']}: the Intel "
            "extension's kernels use the former, TensorFlow's the latter. Unset the one that you export, or give "
            "--threads"
        )
    online = ranks[0].get("host_cpus")
    if online and 2 * len(used) < online and not narrow:
        problems.append(
            f"ranks may use {len(used)} of {online} CPUs: correct if the host is shared; otherwise the launcher binds "
            "each rank to too few cores"
        )
    return problems


def _by_host(rows: Sequence[Mapping[str, Any]]) -> Dict[str, List[Mapping[str, Any]]]:
    hosts: Dict[str, List[Mapping[str, Any]]] = {}
    for row in rows:
        hosts.setdefault(row["host"], []).append(row)
    return hosts


def _named(hosts: Sequence[str]) -> str:
    return hosts[0] if len(hosts) == 1 else f"{hosts[0]} and {len(hosts) - 1} more hosts"

"""What a collective costs: latency, bandwidth and adding up, on nodes whose ranks share one network interface.

The model is that of Thakur, Rabenseifner, Gropp (2005), "Optimization of collective communication operations in MPICH":
a message of n bytes takes latency + n / bandwidth, and adding n bytes up takes n * gamma. Ranks sit node by node.
"""

import dataclasses
import math
from typing import Callable, Dict, List

from resnet_cpu.errors import FlagError


@dataclasses.dataclass(frozen=True)
class World:
    """How many ranks there are and where; ranks of a node have neighbouring numbers."""

    nodes: int
    ranks_per_node: int = 1

    @property
    def ranks(self) -> int:
        """Return all ranks."""
        return self.nodes * self.ranks_per_node


@dataclasses.dataclass(frozen=True)
class Network:
    """What messages cost."""

    name: str
    latency_s: float  # of a message between nodes, software included
    bandwidth: float  # bytes/s of a node each way, shared by its ranks
    memory_latency_s: float = 1e-6  # of a message between ranks of a node
    memory_bandwidth: float = 5e9  # bytes/s of a copy by one rank
    reduce_s_per_byte: float = 1 / 5e9  # gamma: one rank adding a buffer to another
    algorithm: str = "best"


#: Link rates by name; what is beside them is assumed, and told by the command: measure and give a file instead.
NETWORKS: Dict[str, Network] = {
    network.name: network
    for network in (
        Network("omnipath", 2e-6, 100e9 / 8),
        Network("infiniband_hdr", 2e-6, 200e9 / 8),
        Network("ena25", 30e-6, 25e9 / 8),
        Network("ethernet25", 20e-6, 25e9 / 8),
        Network("ethernet10", 30e-6, 10e9 / 8),
        Network("ethernet1", 40e-6, 1e9 / 8),
    )
}


def message(size: float, network: Network, between_nodes: bool, senders: int = 1) -> float:
    """Return the seconds of a message of `size` bytes that each of `senders` ranks of a node sends at once."""
    if between_nodes:
        return network.latency_s + size * senders / network.bandwidth
    return network.memory_latency_s + size / network.memory_bandwidth


def ring(size: float, world: World, network: Network) -> float:
    """Return the seconds of a ring allreduce: 2 (p - 1) messages of n / p bytes, half of them added up.

    With one rank a node: 2 (p - 1) latency + 2 (p - 1) / p * n / bandwidth + (p - 1) / p * n * gamma. With several, a
    node sends one message over its interface at a time and the others through memory, at once.
    """
    ranks = world.ranks
    part = size / ranks
    hops = [message(part, network, True)] if world.nodes > 1 else []
    hops += [message(part, network, False)] if world.ranks_per_node > 1 else []
    return 2 * (ranks - 1) * max(hops, default=0.0) + (ranks - 1) * part * network.reduce_s_per_byte


def recursive_doubling(size: float, world: World, network: Network) -> float:
    """Return the seconds of log2(p) exchanges of all n bytes; ranks past a power of two cost two messages more."""
    total = _past_power_of_two(size, 2, size, world, network)
    for distance in _distances(world.ranks):
        total += _hop(size, distance, world, network) + size * network.reduce_s_per_byte
    return total


def rabenseifner(size: float, world: World, network: Network) -> float:
    """Return the seconds of a reduce-scatter by halving and an allgather by doubling.

    On 2^k ranks, one a node: 2 log2(p) latency + 2 (p - 1) / p * n / bandwidth + (p - 1) / p * n * gamma. Ranks past a
    power of two exchange halves with a neighbour, both add one up, and it is sent the other's sum.
    """
    total = _past_power_of_two(size, 3, size / 2, world, network)
    part = size
    for distance in _distances(world.ranks):
        part /= 2
        total += 2 * _hop(part, distance, world, network) + part * network.reduce_s_per_byte
    return total


def hierarchical(size: float, world: World, network: Network) -> float:
    """Return the seconds of a reduction within nodes, the best allreduce between their first ranks, and a broadcast."""
    rounds = math.ceil(math.log2(world.ranks_per_node))
    within = rounds * (2 * message(size, network, False) + size * network.reduce_s_per_byte)
    leaders = World(world.nodes)
    return within + min(one(size, leaders, network) for one in (ring, recursive_doubling, rabenseifner))


ALGORITHMS: Dict[str, Callable[[float, World, Network], float]] = {
    "ring": ring,
    "recursive_doubling": recursive_doubling,
    "rabenseifner": rabenseifner,
    "hierarchical": hierarchical,
}


# What Open MPI picks for operations that commute (coll_tuned_decision_fixed.c): ranks below, then bytes below and
# algorithm; past the last it is Rabenseifner. Its segmented ring counts as the ring, the reduction and broadcast that
# it has for smaller messages as recursive doubling, and so do rings of fewer elements than ranks.
_OPEN_MPI = (
    (4, ((4096, "recursive_doubling"), (8192, "ring"), (16384, "recursive_doubling"), (262144, "ring"))),
    (16, ((8192, "recursive_doubling"),)),
    (32, ((4096, "recursive_doubling"),)),
    (64, ((128, "recursive_doubling"),)),
    (256, ((262144, "recursive_doubling"),)),
    (512, ((4096, "recursive_doubling"),)),
    (2048, ((16384, "recursive_doubling"),)),
    (4096, ((2048, "recursive_doubling"), (4096, "ring"), (16384, "recursive_doubling"))),
    (math.inf, ((2048, "recursive_doubling"), (16384, "ring"), (32768, "recursive_doubling"))),
)


def open_mpi(size: float, world: World, network: Network) -> float:
    """Return the seconds of an allreduce by the algorithm that Open MPI picks where nothing else is said."""
    sizes = next(sizes for ranks, sizes in _OPEN_MPI if world.ranks < ranks)
    name = next((name for most, name in sizes if size < most), "rabenseifner")
    return ALGORITHMS[name](size, world, network)


def allreduce(size: float, world: World, network: Network) -> float:
    """Return the seconds of an allreduce of `size` bytes by the network's algorithm; `best` is the fastest of all."""
    if world.ranks == 1:
        return 0.0
    if network.algorithm == "openmpi":
        return open_mpi(size, world, network)
    if network.algorithm == "best":
        return min(one(size, world, network) for one in ALGORITHMS.values())
    return ALGORITHMS[network.algorithm](size, world, network)


def fused_allreduce(size: float, copied: bool, world: World, network: Network) -> float:
    """Return the seconds of an allreduce of a buffer; `copied`: tensors are copied into it, and out of it after."""
    copies = 2 * size / network.memory_bandwidth if copied else 0.0
    return allreduce(size, world, network) + copies


def check(network: Network) -> Network:
    """Return `network`; raise FlagError where a value cannot be."""
    for field in ("latency_s", "memory_latency_s", "reduce_s_per_byte"):
        if not 0 <= getattr(network, field) < math.inf:
            raise FlagError(f"--network={network.name}: {field}={getattr(network, field)} must be 0 or more seconds")
    for field in ("bandwidth", "memory_bandwidth"):
        if not getattr(network, field) > 0:
            raise FlagError(f"--network={network.name}: {field}={getattr(network, field)} must be above 0 bytes/s")
    if network.algorithm not in ("best", "openmpi", *ALGORITHMS):
        raise FlagError(
            f"--network={network.name}: algorithm={network.algorithm}: unknown; use best, openmpi, "
            f"{', '.join(ALGORITHMS)}"
        )
    return network


def _distances(ranks: int) -> List[int]:
    """Return 1, 2, 4, ... as far as the partners of a butterfly over the power of two within `ranks` sit apart."""
    return [2**step for step in range(ranks.bit_length() - 1)]


def _hop(size: float, distance: int, world: World, network: Network) -> float:
    """Return the seconds of an exchange with the rank `distance` away, by all ranks of a node at once."""
    between = world.nodes > 1 and distance >= world.ranks_per_node
    return message(size, network, between, world.ranks_per_node)


def _past_power_of_two(size: float, messages: int, added: float, world: World, network: Network) -> float:
    """Return the seconds that ranks past the power of two cost; nothing where there are none.

    They hand over all `size` bytes and in the end get as many back, in so many `messages`; `added` bytes are added up.
    """
    if world.ranks & (world.ranks - 1) == 0:
        return 0.0
    between = world.ranks_per_node == 1
    latency = message(0.0, network, between)
    moved = 2 * (message(size, network, between) - latency)
    return messages * latency + moved + added * network.reduce_s_per_byte

"""The cost of collective operations on nodes whose ranks share one network interface.

The model is that of Thakur, Rabenseifner and Gropp (2005), "Optimization of collective communication operations in
MPICH": a message of n bytes takes latency + n / bandwidth seconds, and adding n bytes to another buffer takes
n * gamma. Ranks are numbered node by node. Times are seconds, sizes bytes.
"""

import dataclasses
import math
from typing import Callable, Dict, List


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The nodes of a job and the ranks on each of them; ranks of one node have consecutive numbers."""

    nodes: int
    ranks_per_node: int = 1

    @property
    def ranks(self) -> int:
        """Return the number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node


@dataclasses.dataclass(frozen=True)
class Network:
    """The constants that decide what a message costs."""

    name: str
    latency_s: float  # of a message between nodes, software included
    bandwidth: float  # bytes/s of a node in each direction, shared by its ranks
    memory_latency_s: float = 1e-6  # of a message between ranks of one node
    memory_bandwidth: float = 5e9  # bytes/s of a copy by one rank
    reduce_s_per_byte: float = 1 / 5e9  # gamma: one rank adding a buffer to another
    algorithm: str = "best"


#: Networks by name. The bandwidth is the rate of the link; all other constants are assumed, and printed as such.
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
    """Return the seconds of a message of `size` bytes that `senders` ranks of a node send at the same time."""
    if between_nodes:
        return network.latency_s + size * senders / network.bandwidth
    return network.memory_latency_s + size / network.memory_bandwidth


def ring(size: float, allocation: Allocation, network: Network) -> float:
    """Return the seconds of a ring allreduce: 2 (p - 1) messages of n / p bytes; half of them are added up.

    With one rank per node: 2 (p - 1) latency + 2 (p - 1) / p * n / bandwidth + (p - 1) / p * n * gamma. With several,
    a node sends one message at a time over its interface, and the others through memory meanwhile.
    """
    ranks = allocation.ranks
    part = size / ranks
    hops = [message(part, network, True)] if allocation.nodes > 1 else []
    hops += [message(part, network, False)] if allocation.ranks_per_node > 1 else []
    return 2 * (ranks - 1) * max(hops, default=0.0) + (ranks - 1) * part * network.reduce_s_per_byte


def recursive_doubling(size: float, allocation: Allocation, network: Network) -> float:
    """Return the seconds of log2(p) exchanges of all n bytes; ranks past a power of two cost two more messages."""
    total = _past_power_of_two(size, 2, size, allocation, network)
    for distance in _distances(allocation.ranks):
        total += _hop(size, distance, allocation, network) + size * network.reduce_s_per_byte
    return total


def rabenseifner(size: float, allocation: Allocation, network: Network) -> float:
    """Return the seconds of a reduce-scatter by halving and an allgather by doubling.

    On 2^k ranks, one per node: 2 log2(p) latency + 2 (p - 1) / p * n / bandwidth + (p - 1) / p * n * gamma. Each rank
    past a power of two exchanges halves with a neighbour, both add one half up, and one sends its sum to the other.
    """
    total = _past_power_of_two(size, 3, size / 2, allocation, network)
    part = size
    for distance in _distances(allocation.ranks):
        part /= 2
        total += 2 * _hop(part, distance, allocation, network) + part * network.reduce_s_per_byte
    return total


def hierarchical(size: float, allocation: Allocation, network: Network) -> float:
    """Return the seconds of a reduction within nodes, the best allreduce between their first ranks, and a broadcast."""
    rounds = math.ceil(math.log2(allocation.ranks_per_node))
    within = rounds * (2 * message(size, network, False) + size * network.reduce_s_per_byte)
    leaders = Allocation(allocation.nodes)
    return within + min(cost(size, leaders, network) for cost in (ring, recursive_doubling, rabenseifner))


ALGORITHMS: Dict[str, Callable[[float, Allocation, Network], float]] = {
    "ring": ring,
    "recursive_doubling": recursive_doubling,
    "rabenseifner": rabenseifner,
    "hierarchical": hierarchical,
}
#: Values of `Network.algorithm`.
ALGORITHM_NAMES = ("best", "openmpi", *ALGORITHMS)


# The choice of Open MPI for commutative operations (coll_tuned_decision_fixed.c). Each row: fewer ranks than this, then
# pairs of (fewer bytes than this, algorithm); beyond the last pair it is Rabenseifner. The segmented ring of Open MPI
# counts as the ring. Its reduction with broadcast for small messages counts as recursive doubling, and so do rings of
# fewer elements than ranks.
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


def open_mpi(size: float, allocation: Allocation, network: Network) -> float:
    """Return the seconds of an allreduce by the algorithm that Open MPI chooses by default."""
    choices = next(choices for ranks, choices in _OPEN_MPI if allocation.ranks < ranks)
    name = next((name for limit, name in choices if size < limit), "rabenseifner")
    return ALGORITHMS[name](size, allocation, network)


def allreduce(size: float, allocation: Allocation, network: Network) -> float:
    """Return the seconds of an allreduce of `size` bytes by the network's algorithm; `best` is the fastest of all."""
    if allocation.ranks == 1:
        return 0.0
    if network.algorithm == "openmpi":
        return open_mpi(size, allocation, network)
    if network.algorithm == "best":
        return min(cost(size, allocation, network) for cost in ALGORITHMS.values())
    return ALGORITHMS[network.algorithm](size, allocation, network)


def fused_allreduce(size: float, copied: bool, allocation: Allocation, network: Network) -> float:
    """Return the seconds of an allreduce of a buffer.

    Args:
        size: bytes of the buffer.
        copied: whether tensors are copied into the buffer and the result out of it.
    """
    copies = 2 * size / network.memory_bandwidth if copied else 0.0
    return allreduce(size, allocation, network) + copies


def _distances(ranks: int) -> List[int]:
    """Return 1, 2, 4, ...: how far partners of a butterfly over the largest power of two within `ranks` are apart."""
    return [2**step for step in range(ranks.bit_length() - 1)]


def _hop(size: float, distance: int, allocation: Allocation, network: Network) -> float:
    """Return the seconds of an exchange with the rank `distance` away, by all ranks of a node at the same time."""
    between = allocation.nodes > 1 and distance >= allocation.ranks_per_node
    return message(size, network, between, allocation.ranks_per_node)


def _past_power_of_two(size: float, messages: int, added: float, allocation: Allocation, network: Network) -> float:
    """Return the additional seconds where the number of ranks is not a power of two, else 0.

    The ranks past it send all `size` bytes and finally receive as many, in `messages` messages; `added` bytes are added
    up.
    """
    if allocation.ranks & (allocation.ranks - 1) == 0:
        return 0.0
    between = allocation.ranks_per_node == 1
    latency = message(0.0, network, between)
    moved = 2 * (message(size, network, between) - latency)
    return messages * latency + moved + added * network.reduce_s_per_byte

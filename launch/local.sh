#!/usr/bin/env bash
# Runs a command as MPI ranks on this machine, each bound to its share of the cores.
#
#   launch/local.sh RANKS COMMAND [ARGUMENT ...]
#   launch/local.sh 2 python -m resnet_cpu.train --flagfile=experiments/quickstart.flags
set -euo pipefail
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh RANKS COMMAND [ARGUMENT ...]" >&2
  exit 64
fi
ranks=$1
shift

allowed=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # by affinity and cpuset
physical=$(lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)
cores=$((allowed < physical ? allowed : physical))
each=$((cores / ranks))

placement=(--map-by "slot:PE=$each" --bind-to core)
if ((each < 1)); then
  echo "local.sh: $ranks ranks on $cores cores: they will share, which is right for tests and slow for training" >&2
  placement=(--oversubscribe --bind-to none)
fi

# Open MPI waits by spinning, which takes the core from the compute threads that are to finish what it waits for: with
# two ranks on two cores that costs a third of the throughput. Yielding gives it back. Shared memory only: no network.
options=(--mca mpi_yield_when_idle 1 --mca btl self,vader --mca pml ob1)
(($(id -u) != 0)) || options+=(--allow-run-as-root)

# TensorFlow allocates and frees large buffers all the time, and glibc returns them to the kernel each time.
allocator=$(compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' | head -n 1 || true)
[[ -z $allocator ]] || options+=(-x "LD_PRELOAD=$allocator${LD_PRELOAD:+:$LD_PRELOAD}")

exec mpirun --quiet -np "$ranks" "${placement[@]}" "${options[@]}" "$@"

#!/usr/bin/env bash
# Run a command as MPI ranks on this machine, each bound to its share of the cores. More ranks than cores share the cores.
# Short for RESNET_CPU_OVERSUBSCRIBE=1 python -m resnet_cpu.launch --ranks=RANKS -- COMMAND; this process becomes mpirun.
#
#   launch/local.sh RANKS COMMAND [ARGUMENT ...]
#   launch/local.sh 2 python -m resnet_cpu.train --flagfile=experiments/quickstart.flags
set -euo pipefail
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "usage: launch/local.sh RANKS COMMAND [ARGUMENT ...]" >&2
  exit 64
fi
export RESNET_CPU_OVERSUBSCRIBE=1
exec python -m resnet_cpu.launch --ranks="$1" -- "${@:2}"

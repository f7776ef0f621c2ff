#!/usr/bin/env bash
# Runs a command as MPI ranks on this machine, each bound to its share of the cores; more ranks than cores share them.
# Short for python -m resnet_cpu.launch --ranks=RANKS -- COMMAND, whose pid becomes that of mpirun.
#
#   launch/local.sh RANKS COMMAND [ARGUMENT ...]
#   launch/local.sh 2 python -m resnet_cpu.train --flagfile=experiments/quickstart.flags
set -euo pipefail
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "usage: launch/local.sh RANKS COMMAND [ARGUMENT ...]" >&2
  exit 64
fi
exec python -m resnet_cpu.launch --ranks="$1" --oversubscribe -- "${@:2}"

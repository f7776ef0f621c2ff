# shellcheck shell=bash
# Everything specific to your site. You source it before submitting, for sbatch (`. launch/env.sh`), and every job sources
# it again for the variables below; those are not exported, so that a job always uses the current file.
# Variables that you export take precedence, as in: MAX_RESTARTS=0 sbatch launch/train.sbatch ...

# --- for sbatch, which reads these like --partition=... on its command line ---------------------------------------
# export SBATCH_PARTITION=normal
# export SBATCH_ACCOUNT=project
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=skylake
mkdir -p logs # Slurm writes there, but does not create folders

# --- for the job --------------------------------------------------------------------------------------------------
# module load gcc openmpi/4.1        # the MPI that Horovod was built against; check with: which mpirun mpicxx

# The environment that launch/install.sh made; without one, python from PATH or from a module is used.
# STACK=current chooses .venv-current, if both stacks are installed (docs/stacks.md); .venv is the one installed first.
VENV=${VENV:-} # another one, as in VENV=${VENV:-/shared/venvs/resnet_cpu}
venv=${VENV:-$PWD/.venv${STACK:+-$STACK}}
if [[ -x $venv/bin/python ]]; then
  export PATH=$venv/bin:$PATH
elif [[ $VENV ]]; then
  echo "launch/env.sh: VENV=$VENV: bin/python is missing; correct it, or unset it to use python from PATH" >&2
elif [[ ${STACK:-} ]]; then
  echo "launch/env.sh: STACK=$STACK: $venv is missing; install it (make setup STACK=$STACK), or unset STACK" >&2
fi

# The launcher: auto, openmpi, intel, mpich, ibrun or srun.
LAUNCHER=${LAUNCHER:-auto}
# More flags for python -m resnet_cpu.launch, such as "--interface=ib0".
LAUNCH_FLAGS=${LAUNCH_FLAGS:-}
# Words before the command of every rank, such as "apptainer exec /shared/resnet_cpu.sif" (docs/containers.md).
RANK_PREFIX=${RANK_PREFIX:-}

# The local disk of each node, for launch/stage.sbatch.
LOCAL_DISK=${LOCAL_DISK:-${TMPDIR:-/tmp}}

# Consecutive restarts allowed without a new checkpoint; restarts with a new checkpoint are not limited.
MAX_RESTARTS=${MAX_RESTARTS:-3}

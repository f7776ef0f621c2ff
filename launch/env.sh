# shellcheck shell=bash
# All that belongs to your site. It is read twice: by you before you submit, for what sbatch has to know (`. launch/env.sh`),
# and by every job, for what the job needs: that is not exported here, so that a job always sees the file as it is now.
# A variable that is exported already wins, as in: MAX_RESTARTS=0 sbatch launch/train.sbatch ...

# --- for sbatch: it reads these as if --partition=... were on its command line -----------------------------------
# export SBATCH_PARTITION=normal
# export SBATCH_ACCOUNT=project
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=skylake
mkdir -p logs # Slurm writes there, and makes no folder

# --- for the job --------------------------------------------------------------------------------------------------
# module load gcc openmpi/4.1        # the MPI that Horovod was built against: `which mpirun mpicxx` name one MPI

# The environment that launch/install.sh made; without one, `python` is what PATH and modules give.
VENV=${VENV:-$PWD/.venv}
if [[ -x $VENV/bin/python ]]; then export PATH=$VENV/bin:$PATH; fi

# How ranks are started: auto, openmpi, intel, mpich, ibrun or srun.
LAUNCHER=${LAUNCHER:-auto}
# Further flags of python -m resnet_cpu.launch, as in "--interface=ib0".
LAUNCH_FLAGS=${LAUNCH_FLAGS:-}
# Words before the command of every rank, as in "apptainer exec /shared/resnet_cpu.sif": docs/containers.md.
RANK_PREFIX=${RANK_PREFIX:-}

# Each node's own disk, for launch/stage.sbatch.
LOCAL_DISK=${LOCAL_DISK:-${TMPDIR:-/tmp}}

# Restarts in a row that may end without a new checkpoint; with one, a job goes on as often as it takes.
MAX_RESTARTS=${MAX_RESTARTS:-3}

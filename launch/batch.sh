# shellcheck shell=bash
# Shared by the batch files: starts ranks, forwards the batch system's signal to them, and decides what is submitted again.
# Sourced from the submit folder, the root of the repository. The job's name and flags are only data, never code.

say() { printf '[%(%FT%T)T job %s] %s\n' -1 "$job" "$*" >&2; }
refuse() { say "$*"; exit 64; }

# Elements of an array need ARRAY_ELEMENT: the job number alone may mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-none}}
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is a batch file: sbatch launch/NAME.sbatch FLAGS"
child="" signalled="" stop="" cancelled="" code=0 ranks="" run_dir="" step_before=0

forward() {
  signalled=yes
  [[ -z $child ]] || kill -s "$1" -- "$child" 2>/dev/null || true
}
trap 'stop=yes; say "USR1: time is nearly up; asking for a checkpoint"; forward USR1' USR1
trap 'cancelled=yes; forward TERM' TERM

# Of a job submitted with --export=NONE: srun, and mpirun through it, would start ranks without PATH and the variables of env.sh.
unset SLURM_EXPORT_ENV

set +eu # site modules do not expect these options
# shellcheck source=launch/env.sh
source launch/env.sh
set -eu
[[ $MAX_RESTARTS =~ ^[0-9]{1,4}$ ]] || refuse "MAX_RESTARTS=$MAX_RESTARTS: give a whole number; 0 never restarts"
MAX_RESTARTS=$((10#$MAX_RESTARTS)) # 08 would be an octal number
# own_python ARGUMENT...: python with the package of this repository before what PYTHONPATH names.
own_python() { PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} python "$@"; }
why=$(own_python -m resnet_cpu.plan --help 2>&1 >/dev/null) ||
  refuse "$(command -v python || echo python) cannot start resnet_cpu (${why##*$'\n'}): run make setup, or set VENV in launch/env.sh (docs/offline.md)"
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
counter=logs/.restarts-$job # consecutive attempts without a new checkpoint
((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f -- "$counter"

# setting NAME FLAGS...: prints the value of a training flag, or nothing if the flags are wrong: the command will say why.
setting() {
  own_python launch/setting.py "$@" 2>/dev/null || true
}

newest_step() {
  local folder newest=0
  for folder in "${run_dir:-/nowhere}"/checkpoints/step-*; do
    if [[ $folder =~ /step-([0-9]{1,12})$ ]]; then newest=$((10#${BASH_REMATCH[1]})); fi
  done
  printf '%s\n' "$newest"
}

# supervise COMMAND...: runs it to its end, forwards signals to it, and leaves its exit code in `code`.
supervise() {
  say "runs:$(printf ' %q' "$@")"
  if [[ -n $stop ]]; then code=75; return; fi
  "$@" &
  child=$!
  # A signal that arrived before the child existed was not forwarded.
  [[ -z $stop ]] || kill -s USR1 -- "$child" 2>/dev/null || true
  [[ -z $cancelled ]] || kill -s TERM -- "$child" 2>/dev/null || true
  while :; do # a signal interrupts `wait`
    signalled="" code=0
    wait "$child" || code=$?
    [[ -n $signalled ]] || break
  done
  child=""
}

# on_ranks COMMAND...: the same as MPI ranks, one per task of the job, or `ranks` of them.
on_ranks() {
  local flags prefix
  read -ra flags <<<"$LAUNCH_FLAGS"
  read -ra prefix <<<"$RANK_PREFIX"
  supervise python -m resnet_cpu.launch --mpi="$LAUNCHER" ${flags[@]+"${flags[@]}"} ${ranks:+--ranks="$ranks"} -- ${prefix[@]+"${prefix[@]}"} "$@"
}

# Ends the job with `code`, or submits it again if that may help.
conclude() {
  local step without=0 state
  if ((code == 0)); then
    rm -f -- "$counter"
    say "done"
    exit 0
  fi
  [[ -z $cancelled ]] || refuse_to_restart "cancelled, or the time limit was reached"
  case $code in
    74 | 75 | 76 | 137) ;; # I/O error, stopped cleanly, peer lost, killed
    138) [[ -n $stop ]] || refuse_to_restart "killed by a USR1 that this job did not send" ;; # USR1 while ranks started
    *) refuse_to_restart "another attempt would end the same way" ;;
  esac
  step=$(newest_step)
  if ((step <= step_before)); then
    if [[ -e $counter ]]; then read -r without <"$counter" || true; fi
    [[ $without =~ ^[0-9]{1,4}$ ]] || without=0
    without=$((without + 1))
    ((without <= MAX_RESTARTS)) || refuse_to_restart "no new checkpoint in $without attempts in a row"
  fi
  # Ask Slurm too: after scancel the ranks may end before the signal reaches this shell.
  state=$(squeue -h -j "$job" -o %T 2>/dev/null || true)
  [[ $state == RUNNING ]] || refuse_to_restart "the job is ${state:-gone}"
  printf '%s\n' "$without" >"$counter"
  say "ended with $code, newest checkpoint: step $step; submitting the job again"
  scontrol requeue "$job" || refuse_to_restart "Slurm refused to requeue it; submit the same command again to continue"
  exit "$code"
}

refuse_to_restart() {
  say "ended with $code, not submitted again: $*"
  rm -f -- "$counter"
  exit "$code"
}

# train FLAGS...: trains on the job's ranks, to the end of the recipe or until the time limit.
train() {
  run_dir=$(setting run_dir "$@")
  step_before=$(newest_step)
  ((step_before == 0)) || say "continues from step $step_before in $run_dir"
  on_ranks python -m resnet_cpu.train "$@"
  conclude
}

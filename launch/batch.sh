# shellcheck shell=bash
# What the batch files share: it runs ranks, hands the batch system's signal on to them, and decides what is submitted again.
# Read from the submit folder, which is the root of the repository. The job's name and flags are data here, never code.

say() { printf '[%(%FT%T)T job %s] %s\n' -1 "$job" "$*" >&2; }
refuse() { say "$*"; exit 64; }

# An element of an array is named as such: its number alone may mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-none}}
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is a batch file: sbatch launch/NAME.sbatch FLAGS"
child="" heard="" stop="" cancelled="" code=0 ranks="" run_dir="" step_before=0

hand_on() {
  heard=yes
  [[ -z $child ]] || kill -s "$1" -- "$child" 2>/dev/null || true
}
trap 'stop=yes; say "USR1: time is nearly up; asking for a checkpoint"; hand_on USR1' USR1
trap 'cancelled=yes; hand_on TERM' TERM

set +eu # the commands of `module` are not written for this
# shellcheck source=launch/env.sh
source launch/env.sh
set -eu
[[ $MAX_RESTARTS =~ ^[0-9]{1,4}$ ]] || refuse "MAX_RESTARTS=$MAX_RESTARTS: give a whole number, 0 to never start again"
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
counter=logs/.restarts-$job # how many attempts in a row brought no new checkpoint
((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f -- "$counter"

# flag NAME FLAGS...: prints the value of a flag; nothing where the flags are wrong, which the command itself tells better.
flag() {
  python -c 'import sys
from resnet_cpu import flags
print(flags.parse_values(sys.argv[2:], "train")[0][sys.argv[1]].value or "", end="")' "$@" 2>/dev/null || true
}

newest_step() {
  local folder newest=0
  for folder in "${run_dir:-/nowhere}"/checkpoints/step-*; do
    if [[ $folder =~ /step-([0-9]{1,12})$ ]]; then newest=$((10#${BASH_REMATCH[1]})); fi
  done
  printf '%s\n' "$newest"
}

# supervise COMMAND...: runs it to its end, handing signals on; leaves its exit code in `code`.
supervise() {
  say "runs:$(printf ' %q' "$@")"
  if [[ -n $stop ]]; then code=75; return; fi
  "$@" &
  child=$!
  # A signal that came in between found no child to hand it to.
  [[ -z $stop ]] || kill -s USR1 -- "$child" 2>/dev/null || true
  [[ -z $cancelled ]] || kill -s TERM -- "$child" 2>/dev/null || true
  while :; do # a signal ends `wait` before the child ends
    heard="" code=0
    wait "$child" || code=$?
    [[ -n $heard ]] || break
  done
  child=""
}

# on_ranks COMMAND...: the same, as MPI ranks: as many as the job has tasks, or as `ranks` says.
on_ranks() {
  local flags prefix
  read -ra flags <<<"$LAUNCH_FLAGS"
  read -ra prefix <<<"$RANK_PREFIX"
  supervise python -m resnet_cpu.launch --mpi="$LAUNCHER" ${flags[@]+"${flags[@]}"} ${ranks:+--ranks="$ranks"} -- ${prefix[@]+"${prefix[@]}"} "$@"
}

# Ends the job with `code`, or submits it again where that may help.
conclude() {
  local step without=0 state
  if ((code == 0)); then
    rm -f -- "$counter"
    say "done"
    exit 0
  fi
  [[ -z $cancelled ]] || refuse_to_restart "cancelled, or the time limit was reached"
  case $code in
    75 | 76 | 137) ;; # stopped, a peer lost, killed
    138) [[ -n $stop ]] || refuse_to_restart "ended by USR1 out of nowhere" ;; # it was still starting when USR1 came
    *) refuse_to_restart "another try would end the same" ;;
  esac
  step=$(newest_step)
  if ((step <= step_before)); then
    if [[ -e $counter ]]; then read -r without <"$counter" || true; fi
    [[ $without =~ ^[0-9]{1,4}$ ]] || without=0
    without=$((without + 1))
    ((without <= MAX_RESTARTS)) || refuse_to_restart "no new checkpoint in $without attempts in a row"
  fi
  # Asked of Slurm, too: on `scancel` the ranks may be gone before this shell hears of it.
  state=$(squeue -h -j "$job" -o %T 2>/dev/null || true)
  [[ $state == RUNNING ]] || refuse_to_restart "the job is ${state:-gone}"
  printf '%s\n' "$without" >"$counter"
  say "ended with $code, newest checkpoint: step $step; submitting the job again"
  scontrol requeue "$job" || refuse_to_restart "Slurm would not take it again: submit it anew, the same command goes on"
  exit "$code"
}

refuse_to_restart() {
  say "ended with $code, not submitted again: $*"
  rm -f -- "$counter"
  exit "$code"
}

# train FLAGS...: trains on the job's ranks, to the end of the recipe or as far as the time limit lets it.
train() {
  run_dir=$(flag run_dir "$@")
  step_before=$(newest_step)
  ((step_before == 0)) || say "goes on from step $step_before in $run_dir"
  on_ranks python -m resnet_cpu.train "$@"
  conclude
}

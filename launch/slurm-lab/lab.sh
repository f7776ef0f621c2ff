#!/usr/bin/env bash
# A temporary Slurm on this machine, to try the batch files of launch/ with the real sbatch. Needs root and Debian's packages.
#
#   launch/slurm-lab/lab.sh install                  slurm-wlm and munge, with apt-get
#   launch/slurm-lab/lab.sh start FOLDER             start it, with all its files in FOLDER; does nothing if it runs
#   launch/slurm-lab/lab.sh run FOLDER COMMAND ...   such as: run FOLDER sbatch launch/train.sbatch --flagfile=...
#   launch/slurm-lab/lab.sh stop FOLDER              cancel its jobs and end its processes; logs are kept
#
# It listens only on 127.0.0.1, on its own ports and with its own munge, so that several labs can run side by side.
#   LAB_NODES=2   number of nodes that it simulates; all of them are this machine
#   LAB_CPUS=16   cores that each node claims to have: tasks are counted, but not bound to cores
set -euo pipefail

fail() { printf 'slurm-lab: %s\n' "$*" >&2; exit 1; }
usage() { sed -n 's/^# \{0,1\}//; 2,11p' "${BASH_SOURCE[0]}" >&2; exit 64; }

# Whether Slurm and munge are installed.
installed() {
  local program
  for program in sbatch slurmctld slurmd munged; do command -v "$program" >/dev/null || return 1; done
}

[[ ${1:-} =~ ^(install|start|stop|run)$ ]] || usage
verb=$1
shift
export PATH=$PATH:/usr/sbin:/sbin

if [[ $verb == install ]]; then
  (($# == 0)) || usage
  if installed; then exit 0; fi
  (($(id -u) == 0)) || fail "slurm-wlm and munge are missing, and installing them needs root: sudo ${BASH_SOURCE[0]} install"
  command -v apt-get >/dev/null || fail "slurm-wlm and munge are missing, and apt-get was not found: install Slurm 22.05 or newer with your package manager"
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -q --no-install-recommends slurm-wlm munge >/dev/null 2>&1 || {
    apt-get update -q >/dev/null
    apt-get install -y -q --no-install-recommends slurm-wlm munge >/dev/null
  }
  exit 0
fi

(($# >= 1)) && [[ -n $1 ]] || usage
mkdir -p -- "$1"
folder=$(cd -- "$1" && pwd)
shift
# Slurm interprets `#`, spaces and % in paths, and the path of a socket is limited to 107 bytes.
[[ $folder =~ ^[A-Za-z0-9_./+-]+$ ]] || fail "$folder: choose a folder whose path has only letters, digits, and . _ - +"
((${#folder} <= 85)) || fail "$folder: this path is too long for a socket; choose one of at most 85 characters"
export SLURM_CONF=$folder/slurm.conf

# Prints the pid in a pid file if it still belongs to the daemon that wrote it; pids are reused.
alive() {
  local pid
  pid=$(cat "$folder/$1.pid" 2>/dev/null) || return 1
  [[ $pid =~ ^[0-9]+$ && $(cat "/proc/$pid/comm" 2>/dev/null) == "${1%%-*}" ]] || return 1
  printf '%s\n' "$pid"
}

# Waits until a command succeeds; fails after 30 s.
await() {
  local what=$1
  shift
  for _ in {1..300}; do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.1
  done
  fail "$what did not start within 30 s; see $folder/*.log"
}

# free_ports COUNT: prints the first of COUNT consecutive unused ports.
free_ports() {
  local first port
  while :; do
    first=$((20000 + RANDOM % 10000))
    for ((port = first; port < first + $1; port++)); do
      if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
    done
    printf '%s\n' "$first"
    return
  done
}

nodes_up() { [[ $(sinfo -h -t idle,mix,alloc -o %D) == "$nodes" ]]; }

case $verb in
  start)
    (($# == 0)) || usage
    (($(id -u) == 0)) || fail "needs root, as Slurm's daemons do"
    installed || fail "slurm-wlm or munge is missing; run ${BASH_SOURCE[0]} install"
    if alive slurmctld >/dev/null; then exit 0; fi
    nodes=${LAB_NODES:-1} cpus=${LAB_CPUS:-16}
    [[ $nodes =~ ^[1-9]$ && $cpus =~ ^[1-9][0-9]{0,3}$ ]] || fail "LAB_NODES=$nodes LAB_CPUS=$cpus: give 1 to 9 nodes and a whole number of cores"
    chmod 700 "$folder"
    mkdir -p "$folder/state" "$folder/spool"
    [[ -e $folder/munge.key ]] || (umask 077; head -c 1024 /dev/urandom >"$folder/munge.key")
    host=$(hostname -s)
    port=$(free_ports "$((nodes + 1))")

    # Inside an allocation mpirun starts ranks without srun only on a node with the name of this machine.
    names=("$host")
    for ((i = 2; i <= nodes; i++)); do names+=("$host-$i"); done
    {
      cat <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job waits this long before it starts again; 120 s by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
# Works in containers and on machines whose cgroups are managed by another service.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=86400
CONF
      for name in "${names[@]}"; do
        port=$((port + 1))
        echo "NodeName=$name NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$cpus State=UNKNOWN"
      done
      # FORCE: jobs that request --exclusive, like all of launch/, still run side by side on this machine.
      echo "PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:16"
    } >"$folder/slurm.conf"

    # --force: munge warns about a socket in a folder that other users cannot enter, which is intended here.
    if ! alive munged >/dev/null; then
      munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>>"$folder/munged.log" ||
        fail "munged did not start: $(tail -n 1 "$folder/munged.log")"
    fi
    slurmctld -f "$SLURM_CONF" || fail "slurmctld did not start: $(tail -n 1 "$folder/slurmctld.log")"
    for name in "${names[@]}"; do
      slurmd -f "$SLURM_CONF" -N "$name" || fail "slurmd did not start: $(tail -n 1 "$folder/slurmd-$name.log")"
    done
    await "slurmctld" scontrol ping
    await "the lab's nodes" nodes_up
    ;;

  run)
    (($# >= 1)) || usage
    alive slurmctld >/dev/null || fail "$folder: no lab is running there; start it first"
    export RESNET_CPU_OVERSUBSCRIBE=${RESNET_CPU_OVERSUBSCRIBE:-1} # nodes claim more cores than this machine has
    exec "$@"
    ;;

  stop)
    (($# == 0)) || usage
    if alive slurmctld >/dev/null; then
      scancel --quiet --user=root 2>/dev/null || true
      for _ in {1..100}; do
        [[ -n $(squeue -h 2>/dev/null) ]] || break
        sleep 0.1
      done
    fi
    daemons=()
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
      daemon=${file##*/}
      if pid=$(alive "${daemon%.pid}"); then
        kill "$pid"
        daemons+=("$pid")
      fi
    done
    for _ in {1..100}; do
      left=()
      for pid in ${daemons[@]+"${daemons[@]}"}; do
        if kill -0 "$pid" 2>/dev/null; then left+=("$pid"); fi
      done
      if ((${#left[@]} == 0)); then exit 0; fi
      sleep 0.1
    done
    kill -KILL "${left[@]}"
    ;;
esac

#!/usr/bin/env bash
# Copy a prepared data set to this node's disk and verify every record of the copy. launch/stage.sbatch runs it once per node.
#
#   launch/stage.sh FROM TO DATASET
# A verified copy is kept, and used again as long as its files have the names and sizes of those in FROM. Words in RANK_PREFIX
# (launch/env.sh) come before the command that verifies, as before those of the ranks.
set -euo pipefail

fail() { printf 'stage %s: %s\n' "$(hostname -s)" "$2" >&2; exit "$1"; }
(($# == 3)) || fail 64 "usage: launch/stage.sh FROM TO DATASET"
from=$1 to=$2 dataset=$3
[[ -d $from && $to == /* ]] || fail 64 "$from to $to: FROM must be an existing folder and TO an absolute path"
[[ -n $dataset ]] || fail 64 "DATASET is empty"

listing() { (cd -- "$1" && find -L . -type f ! -name .checked -printf '%s %p\n' | LC_ALL=C sort); }
# complete: whether the copy has all files of FROM and no others but indexes, which verifying writes where FROM has none.
complete() {
  local found
  [[ -e $to/.checked && $(<"$to/.checked") == "$wanted" ]] || return 1
  found=$(listing "$to")
  [[ -z $(LC_ALL=C comm -23 <(echo "$wanted") <(echo "$found")) ]] || return 1
  ! LC_ALL=C comm -13 <(echo "$wanted") <(echo "$found") | grep -v '\.index\.npy$' >/dev/null
}

umask 077
mkdir -p -- "${to%/*}"
# Others can write to /tmp too: a folder of theirs with this name could hold other data.
[[ -O ${to%/*} && ! -L ${to%/*} ]] || fail 73 "${to%/*} belongs to another user; set LOCAL_DISK in launch/env.sh"
exec 9>"$to.lock"
flock 9 # a batch system may start two of these on one node
wanted=$(listing "$from")
if complete; then
  printf 'stage %s: %s is already there\n' "$(hostname -s)" "$to" >&2
  exit 0
fi

rm -rf -- "$to" # before the check: what is left of another copy makes room for this one
needed=$(($(du -skL -- "$from" | cut -f 1) + 1024))
free=$(df --output=avail -k -- "${to%/*}" | tail -n 1)
((free > needed)) || fail 74 "${to%/*}: $((free / 1024)) MiB free, $((needed / 1024)) MiB needed; set LOCAL_DISK in launch/env.sh"
mkdir -- "$to"
started=$SECONDS
cp -RL -- "$from/." "$to/" || fail 74 "could not copy $from to $to"
copied=$((SECONDS - started))
code=0
read -ra prefix <<<"${RANK_PREFIX:-}"
${prefix[@]+"${prefix[@]}"} python -m resnet_cpu.prepare verify --data_dir="$to" --dataset="$dataset" >&2 || code=$?
((code == 0)) || fail "$code" "$to could not be verified; the error above gives the reason"
printf '%s\n' "$wanted" >"$to/.checked"
printf 'stage %s: %s MiB in %s s, checked in %s s: %s\n' "$(hostname -s)" "$((needed / 1024))" "$copied" "$((SECONDS - started - copied))" "$to" >&2

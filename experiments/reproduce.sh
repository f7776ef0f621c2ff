#!/usr/bin/env bash
# Run all experiments of docs/results.md, with one single-threaded process per core, which takes tens of hours; and before them the
# ladders of docs/scaling.md, one run at a time, which takes minutes. Call it again after an interruption: finished runs are
# skipped, interrupted ones are continued. It ends with 1 if anything ended with an error.
#
#   make reproduce                        RUNS=folder (runs/reproduce)  SEEDS="0 1 2"  JOBS=cores  ONLY=beginning-of-names
#   MISSING=1 make reproduce              without the runs that experiments/results/runs.csv holds (ladders: scaling_runs.csv)
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=${RUNS:-runs/reproduce}
seeds=${SEEDS:-0 1 2}
# The cores that this process may use; of the threads of a core, the first come before the others (without lscpu: any order).
cores=$({ lscpu --parse=CPU,CORE,SOCKET 2>/dev/null || seq 0 9999; } |
  awk -F, -v allowed="$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)" '
    BEGIN { split(allowed, parts, ","); for (i in parts) { split(parts[i], ends, "-"); if (ends[2] == "") ends[2] = ends[1]
            for (cpu = ends[1] + 0; cpu <= ends[2]; cpu++) usable[cpu] = 1 } }
    !/^#/ && $1 in usable { print (NF > 1 ? seen[$2 "," $3]++ : 0), $1 }' | sort -n -k 1,1 -k 2,2 | cut -d ' ' -f 2 | tr '\n' ' ')
read -ra core_list <<<"$cores"
jobs=${JOBS:-${#core_list[@]}}
only=${ONLY:-}  # how the names of the runs begin, or their ends after a slash: border/tiny-5000/half, tiny-5000/half, scaling, ...
ensemble=experiments/collapsed_ensemble
ladder=experiments/lr_scaling
border=$ensemble/border

wrong() { # MESSAGE: end with one line
  echo "$0: $1" >&2
  exit 64
}
if ! [[ $seeds =~ ^[0-9]+( [0-9]+)*$ ]]; then wrong "SEEDS=$seeds: give numbers with blanks between them, as in SEEDS=\"0 1 2\""; fi
if [[ $(tr ' ' '\n' <<<"$seeds" | sort | uniq -d) ]]; then wrong "SEEDS=$seeds: names a seed twice"; fi
if ! [[ $jobs =~ ^[1-9][0-9]*$ ]]; then wrong "JOBS=$jobs: give a number of processes, 1 or more"; fi
status=0
grep -qE "($only)" <<<"" 2>/dev/null || status=$?
if ((status > 1)); then wrong "ONLY=$only: not a regular expression; see grep -E"; fi

# Print a message with the time. The message is expanded before this command runs, so that it may hold a status.
timed() { echo "$(date +%T) $(cat)"; }

# The ladders need an otherwise idle machine. Rungs take turns, so that drift of the machine affects all of them; each
# repetition is a batch. On all rungs, every rank has a core of its own and one thread.
scaling() {
  local repetition kind ranks folder status=0
  for repetition in 0 1 2; do
    for kind in weak strong; do
      for ((ranks = 1; ranks <= ${#core_list[@]}; ranks *= 2)); do
        folder=scaling/$kind/rep-$repetition/ranks-$ranks
        if ! [[ /$folder =~ /($only) ]]; then continue; fi
        # --max_steps ends these runs, so that their results are not `complete`.
        if [[ -s $runs/$folder/result.json && -s $runs/$folder/scaling.json ]]; then continue; fi
        if [[ -n ${MISSING:-} ]] && grep -q "^$folder," experiments/results/scaling_runs.csv; then continue; fi
        mkdir -p "$runs/$folder"
        if taskset -c "$(IFS=,; echo "${core_list[*]:0:ranks}")" launch/local.sh "$ranks" python -m resnet_cpu.train \
          --flagfile="experiments/scaling/small_$kind.flags" --run_dir="$runs/$folder" --threads=1 --data_threads=1 \
          >"$runs/$folder/out" 2>>"$runs/$folder/log"; then
          echo "$(date +%T) done   $folder"
        else
          echo "ended with $?: $folder (see $runs/$folder/log)" | timed
          status=1
        fi
      done
    done
  done
  return "$status"
}

# Print one line per run: its folder below $runs, and its flags.
list() {
  local seed rung
  for seed in $seeds; do
    echo "ensemble/cycles/seed-$seed --flagfile=$ensemble/small_ce_of_b.flags --seed=$seed"
    echo "ensemble/one_model/seed-$seed --flagfile=$ensemble/small_one_model.flags --seed=$seed"
    echo "ensemble_full/cycles/seed-$seed --flagfile=$ensemble/small_ce_of_b_full.flags --seed=$seed"
    echo "ensemble_full/one_model/seed-$seed --flagfile=$ensemble/small_one_model_full.flags --seed=$seed"
    echo "cycles/recipe_b/seed-$seed --flagfile=$ensemble/small_recipe_b.flags --seed=$seed"
    echo "cycles/poly/seed-$seed --flagfile=$ensemble/small_poly.flags --seed=$seed"
    for rung in 64 256 1024 2048 4096; do
      echo "ladder/linear-$rung/seed-$seed --flagfile=$ladder/small_ladder.flags --global_batch_size=$rung --seed=$seed"
      echo "ladder/unscaled-$rung/seed-$seed --flagfile=$ladder/small_ladder_unscaled.flags --global_batch_size=$rung --seed=$seed"
    done
    echo "ladder/lars-4096/seed-$seed --flagfile=$ladder/small_lars.flags --seed=$seed"
  done
}

# The border where ensembles begin to pay (docs/ensemble.md). `third` trains three networks for an ensemble of independent ones.
# The data are not part of the repository: data/half_tiny_imagenet as border/make_data.py describes, and data/cifar10 by
# `prepare folder` from CIFAR-10 as train/CLASS/... and test/CLASS/...; without them these runs are left out. Other ensembles
# wait for border/predict.py.
border() {
  local first seed setting arms flags arm number data decay phases
  while read -r setting arms flags; do
    data=$(data_of "$flags")
    if ! [[ -e $data/manifest.json ]]; then
      echo "border/$setting: left out, because $data does not hold the data (see $0)" >&2
      continue
    fi
    for first in $seeds; do
      seed=$(seed_of "$setting" "$first")
      for arm in ${arms//,/ }; do
        decay=$(awk -F, -v where="$setting,$arm" '$1 "," $2 == where { print $3 }' "$border/decays.csv")
        if [[ -z $decay && $setting =~ ^(tuned|again|heavier|cifar)- ]]; then
          echo "border/$setting/$arm/seed-$seed: left out, because $border/decays.csv has no weight decay for it" >&2
          continue
        fi
        if [[ $setting =~ ^(tuned|heavier)- && $decay == 2e-3 ]]; then continue; fi # the runs of tiny-* and wide-* have it
        phases=${decay:+$(with_decay "$border/$arm.flags" "$decay" 1)}
        if [[ $arm == third ]]; then
          for number in 0 1 2; do
            echo "border/$setting/independent/seed-$seed/$number --flagfile=$border/third.flags --train_examples=${setting#*-} --seed=$((10 * seed + 100 + number)) $flags $phases"
          done
        elif [[ $arm == one* || $arm == half ]] || grep -qs "^$setting,$arm," "$border/predictions.csv"; then
          echo "border/$setting/$arm/seed-$seed --flagfile=$border/$arm.flags --train_examples=${setting#*-} --seed=$seed $flags $phases"
        fi
      done
    done
  done < <(border_settings)
}

data_of() { # FLAGS: print the folder of the data that flags name, or that of the study
  local data=data/half_tiny_imagenet
  if [[ $1 == *--data_dir=* ]]; then
    data=${1##*--data_dir=}
    data=${data%% *}
  fi
  echo "$data"
}

# Searches of the weight decay, with a seed of its own: with half of the budget, the same effort for one model and each ensemble;
# and with all of it, which is what one model of the whole budget needs.
border_search() {
  local arm decay
  for arm in half late_36 late_100 published; do
    for decay in 2e-3 4e-3 8e-3; do
      searched tiny-5000 "$arm" "$decay" "$([[ $arm == half ]] && echo 1 || echo 2)"
    done
  done
  for decay in 4e-3 8e-3 16e-3; do searched whole-5000 one "$decay" 1; done
  for decay in 2e-3 4e-3 8e-3; do
    searched whole-5000 third "$decay" 1
    for arm in one late_36 third; do
      searched whole-cifar-5000 "$arm" "$decay" 1 --data_dir=data/cifar10 --num_classes=10
    done
  done
  searched whole-wide-10000 one 8e-3 1 --width=0.25
  for decay in 1e-4 2e-4 5e-4 1e-3 2e-3; do
    for arm in one late_36; do
      searched whole-cifar-50000 "$arm" "$decay" 1 --data_dir=data/cifar10 --num_classes=10
    done
  done
}

# searched SEARCH ARM DECAY DIVISOR FLAG...: print the line of a run of a search, with its steps over DIVISOR; none without the
# data, which `border` and `cifar` report.
searched() {
  local search=$1 arm=$2 decay=$3 divisor=$4
  shift 4
  if ! [[ -e $(data_of "$*")/manifest.json ]]; then return; fi
  echo "search_border/$search/$arm-$decay/seed-9 --flagfile=$border/$arm.flags --train_examples=${search##*-} --seed=9 $* $(
    with_decay "$border/$arm.flags" "$decay" "$divisor"
  )"
}

with_decay() { # FLAGFILE DECAY DIVISOR: print the phases of FLAGFILE with DECAY for its 2e-3, and its steps over DIVISOR
  awk -v decay="$2" -v divisor="$3" -F, -v OFS=, '/^--phase=/ {
    for (i = 1; i <= NF; i++) {
      if (match($i, /steps=[0-9]+$/)) $i = substr($i, 1, RSTART + 5) int(substr($i, RSTART + 6) / divisor)
      if ($i ~ /^wd=/) $i = "wd=" substr($i, 4) / 2e-3 * decay
    }
    printf "%s ", $0
  }' "$1"
}

seed_of() { # SETTING SEED: print the seed of a run; `again` settings repeat `tuned` ones with seeds that are 3 larger
  if [[ $1 == again-* ]]; then echo $(($2 + 3)); else echo "$2"; fi
}

# One setting a line: its name with the number of training images, its arms, and the flags that make it. Arms that border/decays.csv
# lists have their weight decay from there; in `tuned`, `again`, `heavier` and `cifar` settings, these are the only ones that are run.
border_settings() {
  cat <<'SETTINGS'
tiny-10000 half,one,one_collapse,late_36,late_100,published,third
tiny-45000 half,one,one_collapse,late_36
tiny-20000 half,one,one_collapse,late_36,late_100,published
tiny-5000 half,one,one_collapse,late_36,late_100,published,third
tuned-5000 half,one,one_collapse,late_36,late_100,published
again-5000 half,one,late_36,third
cifar-5000 half,one,one_collapse,late_36,third --data_dir=data/cifar10 --num_classes=10
cifar-50000 half,one,one_collapse,late_36 --data_dir=data/cifar10 --num_classes=10
wide-10000 half,one,one_collapse,late_36,late_100 --width=0.25
heavier-10000 half,one,late_36 --width=0.25
SETTINGS
}

# The LR-scaling ladder on CIFAR-10, with 10 epochs, and once with 20; and the search of its rates, on a seed of its own: the
# linear rule and the unscaled rate at the smallest batch, LARS in the middle. Without the data (see border) it is left out.
cifar() {
  local seed rung rule rate name
  if ! [[ -e data/cifar10/manifest.json ]]; then
    echo "ladder_cifar: left out, because data/cifar10 does not hold the data (see $0)" >&2
    return
  fi
  for rate in 0.2 0.4 0.8; do
    for rule in linear:ladder unscaled:unscaled; do
      cifar_rate "${rule%:*}" "$ladder/cifar_${rule#*:}.flags" lr_per_256 "$rate" 256
    done
  done
  for rate in 2.5 5 10; do cifar_rate lars "$ladder/cifar_lars.flags" lr "$rate" 4096; done
  for seed in $seeds; do
    for rung in 256 1024 4096 8192 16384; do
      for rule in linear:ladder unscaled:unscaled lars:lars; do
        name=$ladder/cifar_${rule#*:}.flags
        echo "ladder_cifar/${rule%:*}-$rung/seed-$seed --flagfile=$name --global_batch_size=$rung --seed=$seed"
        if [[ $seed == 0 ]]; then
          echo "ladder_cifar_20/${rule%:*}-$rung/seed-$seed --flagfile=$name --global_batch_size=$rung --seed=$seed $(sed -n 's/^--phase=main:epochs=10/--phase=main:epochs=20/p' "$name")"
        fi
      done
    done
  done
}

cifar_rate() { # RULE FLAGFILE KEY RATE BATCH: print the line of a run of the search, with another rate under KEY
  local phase
  phase=$(sed -n "/^--phase=main:/s/\([:,]$3=\)[0-9.]*/\1$4/p" "$2")
  echo "search_cifar/$1-$4/seed-9 --flagfile=$2 --global_batch_size=$5 --seed=9 $phase"
}

# Time to accuracy with growing images on Tiny-ImageNet, as `prepare tiny_imagenet` writes it; without the data it is left out.
# The two runs of SEED start together, and the next two when both have ended, so that each seed has the same neighbours; in the
# last ones, `constant` is run again beside growing images for 7 epochs, since their times are compared.
image_size() { # SEED ARM...
  local seed=$1 arm
  shift
  if ! [[ -e data/tiny_imagenet/manifest.json ]]; then
    echo "image_size: left out, because data/tiny_imagenet does not hold the data (see experiments/image_size/base.flags)" >&2
    return
  fi
  for arm in "$@"; do
    echo "image_size/$arm/seed-$seed --flagfile=experiments/image_size/${arm%_again}.flags --seed=$seed"
  done
}

# in_table RUN: whether MISSING is given and the table holds the run.
in_table() { [[ -n ${MISSING:-} ]] && grep -q "^$1," experiments/results/runs.csv; }
finished() { grep -qs '"complete": true' "$1/result.json"; }

# to_combine FOLDER: whether three independent networks are finished, and at least one of them after they were combined.
to_combine() {
  local member new=1
  for member in 0 1 2; do
    finished "$1/$member" || return 1
    [[ $1/ensemble.json -nt $1/$member/result.json ]] || new=0
  done
  return "$new"
}

combine() {
  local folder status=0
  for folder in "$runs"/border/*/independent/seed-*; do
    to_combine "$folder" || continue
    if python -m resnet_cpu.evaluate --ensemble --members="$folder/0,$folder/1,$folder/2" >"$folder/ensemble.part" 2>>"$folder/log"; then
      mv "$folder/ensemble.part" "$folder/ensemble.json"
    else
      echo "ended with $?: $folder/ensemble.json (see $folder/log)" | timed
      status=1
    fi
  done
  return "$status"
}

# The batch-norm statistics of averaged weights are not the averaged statistics: compute them in a hundred steps at LR 0.
average() {
  local seed table setting arms flags arm own status=0
  for seed in $seeds; do
    for table in ensemble ensemble_full; do
      average_members "$table/cycles/seed-$seed" "$table/average/seed-$seed" --flagfile="$ensemble/${table/ensemble/small}.flags" \
        --seed="$seed" || status=1
    done
    while read -r setting arms flags; do
      own=$(seed_of "$setting" "$seed")
      for arm in ${arms//,/ }; do
        if [[ $arm == late_* || $arm == published ]]; then
          # shellcheck disable=SC2086  # a list of flags
          average_members "border/$setting/$arm/seed-$own" "border/$setting/average_$arm/seed-$own" \
            --flagfile="$border/base.flags" --train_examples="${setting#*-}" --seed="$own" $flags || status=1
        fi
      done
    done < <(border_settings)
  done
  return "$status"
}

# average_members RUN AVERAGE FLAG...: average the members of a finished run, and print the line of the run AVERAGE.
average_members() {
  local members=$runs/$1 name=$2 mean=$runs/$2.npz line
  shift 2
  line="$name $* --init_from=$(printf %q "$mean") --phase=statistics:steps=100,lr=0,augment=light"
  # Members that were trained again have another mean; a run that started from the old one is of no use.
  if [[ -e $mean && $members/result.json -nt $mean && /$name =~ /($only) ]] && ! in_table "$name"; then
    rm -rf -- "$mean" "${runs:?}/$name"
  fi
  if ! finished "$members" || [[ -z $(echo "$line" | chosen) ]]; then return; fi
  if ! [[ -e $mean ]]; then
    mkdir -p "$(dirname "$mean")"
    if ! python -m resnet_cpu.evaluate --ensemble --run_dir="$members" --export="$mean" >/dev/null 2>>"$members/log"; then
      echo "$(date +%T) ended with an error: $mean (see $members/log)" >&2
      return 1
    fi
  fi
  echo "$line"
}

# one NUMBER TOTAL FOLDER FLAG...: make one run. SLOT is the number of the process as xargs counts them; it selects the core. A
# failed run is reported, the others continue.
# shellcheck disable=SC2329  # xargs calls it
one() {
  local number=$1 total=$2 folder=$3
  shift 3
  mkdir -p "$runs/$folder"
  local list status=0
  read -ra list <<<"$cores"
  taskset -c "${list[SLOT % ${#list[@]}]}" python -m resnet_cpu.train "$@" --run_dir="$runs/$folder" --threads=1 --data_threads=1 \
    >"$runs/$folder/out" 2>>"$runs/$folder/log" || status=$?
  local count="$number of $total" left=$((($(date +%s) - began) * (total - number) / number / 60))
  if ((number < total)); then count+=", about $left min left"; fi
  if ((status == 0)); then
    echo "$(date +%T) done   $folder ($count)"
  elif ((status == 77)); then # a result as well: the tables count such runs
    echo "$(date +%T) ended with a loss that is not finite: $folder ($count)"
  else
    echo "$(date +%T) ended with $status: $folder ($count; see $runs/$folder/log)"
    return 1
  fi
}
export -f one
export runs cores

# Finished runs are left out, so that they do not count in the time left, and those whose loss was not finite, which would end in
# the same way again; with MISSING, those of the table as well. Three independent networks count as finished there when their
# combination is in the table.
wanted() {
  local line name
  while read -r line; do
    name=${line%% *}
    if finished "$runs/$name"; then continue; fi
    if [[ -e $runs/$name/not_finite.json ]]; then
      echo "$name: left out, because its loss was not finite (remove $runs/$name to run it again)" >&2
      continue
    fi
    if [[ $name == */independent/* ]]; then name=${name%/*}; fi
    if ! in_table "$name"; then echo "$line"; fi
  done
}
chosen() { { grep -E "^([^ ]*/)?($only)" || true; } | wanted; }
numbered() { awk '{ lines[NR] = $0 } END { for (i = 1; i <= NR; i++) print i, NR, lines[i] }'; }
all() { began=$(date +%s) && export began && chosen | numbered | xargs -r -d '\n' -P "$jobs" --process-slot-var=SLOT -I{} bash -c 'one {}'; }
failed=0 # whether a training, a combination or an average ended with an error
scaling || failed=1
lines=$(list; border_search; border; cifar)
all <<<"$lines" || failed=1
combine || failed=1
average | all || failed=1
for seed in $seeds; do image_size "$seed" constant growing | all || failed=1; done
for seed in $seeds; do image_size "$seed" constant_short; done | all || failed=1
for seed in $seeds; do image_size "$seed" constant_again growing_long | all || failed=1; done
exit "$failed"

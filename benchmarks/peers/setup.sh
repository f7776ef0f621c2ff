#!/usr/bin/env bash
# Creates an environment for each peer: stock TensorFlow 2.15, the newest TensorFlow and Keras, PyTorch for CPUs.
# The project's own environment is not touched. An environment whose requirements have not changed is kept.
#
#   benchmarks/peers/setup.sh              into benchmarks/peers/.venvs (4.2 GB)
#   benchmarks/peers/setup.sh FOLDER
#   PYTHON=/path/python3.11 PIP_ARGS="--find-links wheels" benchmarks/peers/setup.sh
#
# torch from PyPI needs several GB of CUDA libraries, which are not installed here (--no-deps), and does not load without
# them. If your index has no CPU build, set PIP_ARGS="--extra-index-url ..." to that of PyTorch's "cpu" wheels.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/.venvs}
python=${PYTHON:-python3.11}
started=$SECONDS

say() { printf '[peers %3ds] %s\n' "$((SECONDS - started))" "$*" >&2; }
fail() { printf 'peers: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
  fail "$python is not Python 3.11 with venv, for which the requirements are pinned; set PYTHON=/path/to/python3.11"

# Each environment with the package whose import shows that it works.
for peer in tensorflow_2_15:tensorflow tensorflow_newest:tensorflow pytorch:torch; do
  name=${peer%:*} package=${peer#*:}
  requirements=$here/requirements-$name.txt venv=$folder/$name
  stamp=$( { cat "$requirements"; "$python" --version; } | sha256sum)
  if [[ -f $venv/installed && $(<"$venv/installed") == "$stamp" ]]; then
    say "$name: up to date"
    continue
  fi
  say "$name: $(grep -E '^(tensorflow-cpu|keras|torch)==' "$requirements" | paste -s -d ' ') into $venv"
  "$python" -m venv --clear "$venv"
  # shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
  "$venv/bin/python" -m pip --disable-pip-version-check install --no-deps ${PIP_ARGS:-} -r "$requirements" >&2
  "$venv/bin/python" -c "import $package; print('$name: $package', $package.__version__)" >&2 ||
    fail "$package does not load in $venv (torch needs a CPU build, see the head of $0)"
  printf '%s\n' "$stamp" >"$venv/installed"
done
compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' >/dev/null ||
  say "libtcmalloc_minimal.so.4 is missing (Debian: libtcmalloc-minimal4): sides that preload it cannot run"
say "ready: $folder ($(du -sh "$folder" | cut -f 1))"

#!/usr/bin/env bash
# Set up a machine: system packages, a virtual environment from requirements.txt, Horovod built for this TensorFlow and MPI.
# Idempotent: a second call compares a stamp and returns at once. All output goes to standard error.
#
#   launch/install.sh
#   PYTHON=/path/python3.10 launch/install.sh
#   VENV=/scratch/venv launch/install.sh
#   PIP_ARGS="--no-index --find-links wheelhouse" launch/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
HOROVOD=0.28.1
MIN_MINOR=9 MAX_MINOR=11
started=$SECONDS

say() { printf '[install %3ds] %s\n' "$((SECONDS - started))" "$*" >&2; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

# A Python that TensorFlow 2.15 and Horovod 0.28.1 both support.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.10 python3.9 python3 python; do
    "$candidate" -c "import sys; sys.exit(not (3, $MIN_MINOR) <= sys.version_info[:2] <= (3, $MAX_MINOR))" \
      >/dev/null 2>&1 && { command -v "$candidate"; return; }
  done
  return 1
}

python=$(find_python) || fail "no Python 3.$MIN_MINOR-3.$MAX_MINOR found (TensorFlow 2.15 with Horovod needs one): install it or set PYTHON=/path/to/python3.11"

# Missing packages, by their Debian names. An MPI from a module (mpirun and mpicxx in PATH) counts as installed.
missing=()
command -v mpirun >/dev/null && command -v mpicxx >/dev/null || missing+=(openmpi-bin libopenmpi-dev)
command -v g++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
command -v cmake >/dev/null || missing+=(cmake)
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing+=(python3-venv)
if [[ -z ${RAW_DIR:-} && ! -e /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz && ! -e data/fashion_mnist/manifest.json ]]; then
  missing+=(dataset-fashion-mnist)
fi

sudo=() may_install=yes
if (($(id -u) != 0)); then
  if sudo -n true 2>/dev/null; then sudo=(sudo -n); else may_install=no; fi
fi
command -v apt-get >/dev/null || may_install=no
# Optional: a faster memory allocator for TensorFlow, which resnet_cpu.launch preloads if it is installed.
if [[ $may_install == yes ]] && ! compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' >/dev/null; then
  missing+=(libtcmalloc-minimal4)
fi

if ((${#missing[@]})); then
  [[ $may_install == yes ]] || fail "missing system packages (Debian names): ${missing[*]}; they cannot be installed here without apt-get and root or sudo. Ask for them, or load your site's MPI module and set RAW_DIR to the folder of the Fashion-MNIST files"
  say "system packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  "${sudo[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
    "${sudo[@]}" apt-get update -q >/dev/null
    "${sudo[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
  }
fi

stamp_text=$( { cat requirements.txt setup.cfg launch/install.sh; "$python" --version; mpirun --version | head -n 1; } | sha256sum)
if [[ -f $VENV/installed && $(<"$VENV/installed") == "$stamp_text" ]]; then
  exit 0
fi

say "virtual environment in $VENV with $("$python" --version 2>&1)"
rm -f "$VENV/installed"
"$python" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" >&2; }
say "the pinned packages of requirements.txt (TensorFlow alone is 475 MB)"
# shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
pip install -qq --no-deps ${PIP_ARGS:-} -r requirements.txt

# Horovod is linked against one TensorFlow and one MPI: rebuild it if either has changed.
built_for="horovod $HOROVOD; $(grep '^tensorflow==' requirements.txt); $(mpirun --version | head -n 1)"
if [[ ! -f $VENV/horovod-built-for || $(<"$VENV/horovod-built-for") != "$built_for" ]]; then
  say "Horovod $HOROVOD, built against this TensorFlow and this MPI (about two minutes; log: $VENV/horovod-build.log)"
  # No cached wheel: it may have been built for another MPI. PATH: cmake must find this environment's python.
  # shellcheck disable=SC2086
  PATH="$(cd "$VENV/bin" && pwd):$PATH" \
    HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_MPI=1 HOROVOD_CPU_OPERATIONS=MPI \
    HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
    "$VENV/bin/python" -m pip --disable-pip-version-check install --no-deps --no-build-isolation --no-cache-dir \
    --no-binary horovod --force-reinstall ${PIP_ARGS:-} "horovod==$HOROVOD" >"$VENV/horovod-build.log" 2>&1 ||
    { tail -n 30 "$VENV/horovod-build.log" >&2; fail "Horovod did not build; see BUILD_NOTES.md for symptoms and remedies"; }
  printf '%s\n' "$built_for" >"$VENV/horovod-built-for"
fi
pip install -qq --no-deps --no-build-isolation -e .
"$VENV/bin/python" -m pip --disable-pip-version-check check >/dev/null || fail "the environment in $VENV is inconsistent (see '$VENV/bin/python -m pip check'); remove $VENV and try again"
printf '%s\n' "$stamp_text" >"$VENV/installed"
say "ready"

#!/usr/bin/env bash
# Set up a machine: system packages, a virtual environment with one of the two stacks, Horovod built for this TensorFlow and MPI.
# Idempotent: a second call compares a stamp and returns at once. All output goes to standard error.
#
#   launch/install.sh                               the stack that suits the Python that is there
#   STACK=current launch/install.sh                 intel (Python 3.9 - 3.11) or current (Python 3.10 - 3.13)
#   PYTHON=/path/python3.10 launch/install.sh
#   VENV=/scratch/venv launch/install.sh            default: .venv-intel or .venv-current; .venv is a link to the first one
#   PIP_ARGS="--no-index --find-links wheelhouse" launch/install.sh
#   launch/install.sh --venv                        only print the folder of the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HOROVOD=0.28.1
export PIP_USER=0 # a pip.conf may ask for packages in the home folder
started=$SECONDS

say() { printf '[install %3ds] %s\n' "$((SECONDS - started))" "$*" >&2; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

# locate NAME: prints the path of an interpreter that runs. A name that pyenv has not switched on is found all the same.
locate() {
  local candidate
  for candidate in "$1" $(compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/*/bin/$1" | sort -rV); do
    if "$candidate" -c 'import sys' >/dev/null 2>&1; then command -v "$candidate"; return; fi
  done
  return 1
}

minor() { "$1" -c 'import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)'; }

# suits STACK MINOR: the versions of Python 3 for which the packages of the stack are published.
suits() {
  case $1 in
    intel) (($2 >= 9 && $2 <= 11)) ;;
    current) (($2 >= 10 && $2 <= 13)) ;;
    *) return 1 ;;
  esac
}

names_of() {
  case $1 in
    intel) echo python3.11 python3.10 python3.9 python3 python ;;
    current) echo python3.13 python3.12 python3.11 python3.10 python3 python ;;
  esac
}

stack=${STACK:-} python=""
case $stack in
  "" | intel | current) ;;
  *) fail "STACK=$stack: choose intel (Python 3.9 - 3.11) or current (Python 3.10 - 3.13)" ;;
esac
if [[ -n ${PYTHON:-} ]]; then
  python=$(locate "$PYTHON") || fail "PYTHON=$PYTHON does not run; give the path of a Python 3.9 - 3.13"
  version=$(minor "$python")
  for candidate in ${stack:-intel current}; do
    if suits "$candidate" "$version"; then stack=$candidate; break; fi
  done
  suits "${stack:-none}" "$version" ||
    fail "PYTHON=$PYTHON is Python 3.$version${STACK:+, STACK=$STACK}: intel needs Python 3.9 - 3.11, current 3.10 - 3.13"
else
  for candidate in ${stack:-intel current}; do
    for name in $(names_of "$candidate"); do
      if python=$(locate "$name") && suits "$candidate" "$(minor "$python")"; then stack=$candidate; break 2; fi
      python=""
    done
  done
  [[ -n $python ]] || fail "no Python 3.9 - 3.13 found${STACK:+ for STACK=$STACK}: install one or set PYTHON=/path/to/python3"
fi
lock=requirements/$stack.txt
VENV=${VENV:-.venv-$stack}
if [[ ${1:-} == --venv ]]; then printf '%s\n' "$VENV"; exit 0; fi
(($# == 0)) || fail "unknown argument: $1"

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
optional=()
# Optional: a faster memory allocator for TensorFlow, which resnet_cpu.launch preloads if it is installed.
if [[ $may_install == yes ]] && ! compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' >/dev/null; then
  optional+=(libtcmalloc-minimal4)
fi

system_packages() { # PACKAGE...: install them with apt-get, from newer lists if need be
  export DEBIAN_FRONTEND=noninteractive
  ${sudo[@]+"${sudo[@]}"} apt-get install -y -q --no-install-recommends "$@" >/dev/null 2>&1 || {
    ${sudo[@]+"${sudo[@]}"} apt-get update -q >/dev/null
    ${sudo[@]+"${sudo[@]}"} apt-get install -y -q --no-install-recommends "$@" >/dev/null
  }
}

# If nothing but the compiler and its tools is missing, all but Horovod and the fused kernels is set up, for jobs of one rank.
without_compiler=no
if [[ $may_install == no && ${#missing[@]} -gt 0 && " ${missing[*]} " == *" g++ "* ]]; then
  without_compiler=yes
  for package in "${missing[@]}"; do
    case $package in g++ | make | cmake) ;; *) without_compiler=no ;; esac
  done
fi
if ((${#missing[@]})) && [[ $without_compiler == no ]]; then
  [[ $may_install == yes ]] || fail "missing system packages (Debian names): ${missing[*]}; they cannot be installed here without apt-get and root or sudo. Ask for them, or load your site's MPI module and set RAW_DIR to the folder of the Fashion-MNIST files"
  say "system packages: ${missing[*]}"
  system_packages "${missing[@]}"
fi
# sed reads to the end: an MPI that is cut off would end this script.
mpi_version=$(timeout 60 mpirun --version 2>&1 | sed -n 1p) ||
  fail "$(command -v mpirun || echo mpirun) does not run: ${mpi_version:-it printed nothing within a minute}; load another MPI module, or install openmpi-bin"
compiler=$(g++ --version 2>/dev/null | head -n 1) || true
# The name that the documentation uses. It stays what it is, so that queued jobs keep their environment.
link() {
  if [[ $VENV == ".venv-$stack" ]]; then
    if [[ ! -e .venv ]]; then ln -sfn "$VENV" .venv; fi
    [[ -L .venv ]] || say "note: .venv is an environment of version 0.1; remove it (rm -r .venv) and call this again to have it point to $VENV"
  fi
}

stamp_text=$( printf 'stack %s\n' "$stack"; { cat "$lock" requirements/horovod.txt setup.cfg launch/install.sh resnet_cpu/model/kernels/{*.h,*.cc,build.py}; "$python" --version; echo "$mpi_version"; } | sha256sum)
compiled=$stamp_text$'\ncompiled'
if [[ -n $compiler ]]; then stamp_text=$compiled; fi
# What was built with a compiler is complete, also for a shell without it.
if [[ -f $VENV/installed && ($(<"$VENV/installed") == "$stamp_text" || $(<"$VENV/installed") == "$compiled") ]]; then
  link
  exit 0
fi

if ((${#optional[@]})); then
  say "optional system packages: ${optional[*]}"
  system_packages "${optional[@]}" >/dev/null 2>&1 || say "note: ${optional[*]} could not be installed; training is slower without it"
fi
say "virtual environment in $VENV: the stack $stack with $("$python" --version 2>&1)"
rm -f "$VENV/installed"
# Packages of another Python would stay behind in the folder.
clear=()
if [[ -f $VENV/pyvenv.cfg ]] && [[ $("$VENV/bin/python" --version 2>&1) != "$("$python" --version 2>&1)" ]]; then
  clear=(--clear)
fi
"$python" -m venv ${clear[@]+"${clear[@]}"} "$VENV"
in_venv=$(cd "$VENV/bin" && pwd)/python
pip() { "$in_venv" -m pip --disable-pip-version-check "$@" >&2; }
say "the pinned packages of $lock (TensorFlow alone is 500 MB)"
# shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
pip install -qq --no-deps --require-hashes ${PIP_ARGS:-} -r "$lock"

# Horovod is linked against one TensorFlow and one MPI. A wheel is kept for each combination of what it was built with.
tensorflow=$(sed -n 's/^tensorflow==\([0-9.]*\).*/\1/p' "$lock")
built_with=$(
  printf '%s\n' "tensorflow $tensorflow" "$("$in_venv" -VV)" "$(uname -m)" "$mpi_version" "$(mpicxx -show 2>&1)" "$compiler"
  cat requirements/horovod.txt
  sed -n '/^build_horovod/,/^}/p' launch/install.sh
)
key=$(sha256sum <<<"$built_with" | cut -c1-16)
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/resnet_cpu/horovod-$HOROVOD-$key

# not_before VERSION EARLIEST
not_before() { [[ $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# edit_line FILE PATTERN COMMAND: sed's COMMAND for the one line that matches; fails where it is another source.
edit_line() {
  if (($(grep -c "$2" "$1") != 1)); then
    echo "install: $1 of this Horovod has no single line '$2': it is not the source of horovod $HOROVOD that this script knows how to build"
    return 1
  fi
  sed -i "\\#$2#$3" "$1"
}

# build_horovod FOLDER: builds the wheel into the folder, which must not exist. Prints nothing but to the log.
build_horovod() {
  local work name
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  # shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
  "$in_venv" -m pip --disable-pip-version-check download --no-deps --no-build-isolation --no-binary horovod \
    --require-hashes ${PIP_ARGS:-} -d "$work" -r requirements/horovod.txt || return
  tar -xzf "$work/horovod-$HOROVOD.tar.gz" -C "$work" || return
  cd "$work/horovod-$HOROVOD" || return
  # This file holds collectives for XLA, which are not used here. It needs headers that TensorFlow 2.16 and later do not install
  # where it looks for them (horovod/horovod#4290); without it, everything else builds.
  if not_before "$tensorflow" 2.16; then
    edit_line horovod/tensorflow/CMakeLists.txt '/horovod/tensorflow/xla_mpi_ops\.cc")$' d || return
  fi
  # The bundled flatbuffers assign to a constant member in a template that is never used; g++ 14 and later refuse that.
  if not_before "$("${CXX:-g++}" -dumpversion)" 14; then
    edit_line third_party/flatbuffers/include/flatbuffers/stl_emulation.h '^  const size_type count_;$' 's/const //' || return
  fi
  # Variables for another kind of build, such as HOROVOD_GPU_OPERATIONS, would be obeyed.
  for name in $(compgen -e HOROVOD_); do [[ $name == HOROVOD_CMAKE ]] || unset "$name"; done
  # No cached wheel: it may have been built for another MPI. PATH: cmake must find this environment's python. CXXFLAGS: its
  # headers use these without including them, which the C++ library of g++ 13 and later does not forgive.
  PATH="${in_venv%/*}:$PATH" CXXFLAGS="${CXXFLAGS:-} -include string -include cstdint -include stdexcept" \
    HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_MPI=1 HOROVOD_CPU_OPERATIONS=MPI \
    HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
    "$in_venv" -m pip --disable-pip-version-check wheel -v --no-deps --no-build-isolation --no-cache-dir \
    -w "$work/wheel" "$work/horovod-$HOROVOD" || return
  mkdir -p "${1%/*}" && printf '%s\n' "$built_with" >"$work/wheel/built-with.txt" || return
  # A rename within one file system: another installation never sees half a folder.
  cp -r "$work/wheel" "$1.$$" && mv -T "$1.$$" "$1"
}

if [[ -n $compiler && (! -f $VENV/horovod-built-for || $(<"$VENV/horovod-built-for") != "$built_with") ]]; then
  if ! compgen -G "$wheels/horovod-*.whl" >/dev/null; then
    rm -rf "$wheels"
    say "Horovod $HOROVOD, built against this TensorFlow and this MPI (about two minutes; log: $VENV/horovod-build.log)"
    (build_horovod "$wheels") >"$VENV/horovod-build.log" 2>&1 ||
      { tail -n 30 "$VENV/horovod-build.log" >&2; fail "Horovod did not build; see BUILD_NOTES.md for symptoms and remedies"; }
  fi
  pip install -qq --no-deps --no-index --force-reinstall "$wheels"/horovod-*.whl
  printf '%s\n' "$built_with" >"$VENV/horovod-built-for"
fi
# --use-pep517: else setuptools calls pip once more, which then wants to download setuptools.
pip install -qq --no-deps --no-build-isolation --use-pep517 -e .
say "fused kernels (about 20 seconds, unless a library of these sources and this TensorFlow is in the cache)"
"$in_venv" -m resnet_cpu.model.kernels.build
pip check >/dev/null || fail "the environment in $VENV is inconsistent (see '$VENV/bin/python -m pip check'); remove $VENV and try again"
printf '%s\n' "$stamp_text" >"$VENV/installed"
link
[[ -n $compiler ]] || grep -qsx "tensorflow $tensorflow" "$VENV/horovod-built-for" ||
  say "warning: g++ was not found, so Horovod and the fused kernels were not built, and jobs can have one rank only (make train RANKS=1). Install g++, or load your site's module, and call this again"
say "ready: source $VENV/bin/activate"

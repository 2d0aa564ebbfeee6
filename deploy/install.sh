#!/usr/bin/env bash
# Makes the virtual environment if it is missing and installs Headrace into it, editable.
#
#   deploy/install.sh EXTRA        EXTRA: embedded (what `headrace up` needs), dev (and the tests)
#
#   VENV                  where (default .venv)
#   PYTHON                which Python to build it with (default: the first of python3,
#                         python3.13, python3.12, python3.11 that is 3.11 or newer)
#   HEADRACE_TORCH_INDEX  where torch's CPU build is looked for
#
# Without an NVIDIA driver torch comes from that index, because the build on PyPI brings gigabytes
# of CUDA along; where the index cannot be reached, it is what pip finds.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:?usage: deploy/install.sh EXTRA}
venv=${VENV:-.venv}
torch=torch==2.13.0
torch_index=${HEADRACE_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'install: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Headrace needs Python 3.11 or newer; $(python3 --version 2>&1 || true) is what is here." \
    "Install one, or name it: make PYTHON=/path/to/python3.11 ..."
}

make_venv() {
  local python
  python=$(find_python)
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || {
    rm -rf "$venv"
    fail "cannot make a virtual environment (on Debian or Ubuntu: apt install python3-venv)"
  }
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_gpu() { [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1; }

has_torch() { "$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; }

# Whether the CPU index answers and has this release; a few seconds when it cannot be reached.
cpu_index_answers() {
  pip index versions torch --index-url "$torch_index" --timeout 4 --retries 1 2>/dev/null |
    grep -q "${torch#torch==}"
}

install_torch() {
  if has_torch; then return; fi
  if has_gpu; then
    say "an NVIDIA driver is here: torch with CUDA"
  elif cpu_index_answers; then
    say "no NVIDIA driver: torch's CPU build from $torch_index"
    # without its dependencies: those come with the rest, from the user's own index
    if pip install --no-deps --index-url "$torch_index" "$torch"; then return; fi
    say "that failed; taking what pip finds"
  else
    say "no NVIDIA driver, but $torch_index cannot be reached: taking the torch that pip finds"
  fi
  pip install "$torch"
}

[[ -x $venv/bin/python ]] || make_venv
install_torch
pip install --editable ".[$extra]"

#!/usr/bin/env bash
# install.sh [PYTHON] [EXTRA]: on a worker, create .venv with the versions of constraints.txt; does nothing if it is up
# to date. PYTHON: 3.11 or newer; empty: the first one found, or one that uv downloads. EXTRA: of pyproject.toml (tpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${2:-tpu}

die() {
  echo "error: $(hostname): $*" >&2
  exit 2
}
new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

python=''
for candidate in ${1:-python3.11 python3.12 python3.13 python3}; do
  if new_enough "$candidate"; then python=$candidate && break; fi
done
[[ -n $python || -z ${1:-} ]] || die "PYTHON = $1: not a Python of 3.11 or newer with venv; leave it empty (config.env)"

wanted="$extra ${python:-uv} $(cat pyproject.toml constraints.txt requirements-corpus.txt \
  tpu_setup/install.sh | cksum)"
if [[ -x .venv/bin/python && $(cat .venv/installed 2>/dev/null) == "$wanted" ]]; then
  echo "already installed: $(.venv/bin/python --version)"
  exit 0
fi
rm -f .venv/installed
command -v tmux >/dev/null || sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq tmux >/dev/null
if [[ -n $python ]]; then
  "$python" -m venv .venv
else # TPU VMs run Ubuntu 22.04, which has Python 3.10
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --allow-existing --python 3.11 .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-corpus.txt
echo "$wanted" >.venv/installed
echo "installed: $(.venv/bin/python --version)"

#!/usr/bin/env bash
# profile.sh [SECONDS]: trace worker 0 of the active run (5 seconds) and copy the trace to profiles/TPU_NAME.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
seconds=${1:-5}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "$seconds: not a number of seconds"
[[ $PROFILER_PORT != 0 ]] || die "PROFILER_PORT = 0: no profiler is running; set it (in $CONFIG), then run.sh again"
need_ready
# shellcheck disable=SC2016 # expanded on the worker
on_worker 0 bash -euc 'cd rdlm
  .venv/bin/python -c "import xprof" 2>/dev/null || .venv/bin/python -m pip install --quiet -c constraints.txt xprof
  rm -rf ~/profile && .venv/bin/python -m jax.collect_profile --log_dir "$HOME/profile" --no_perfetto_link "$1" "$2"' \
  profile "$PROFILER_PORT" "$((seconds * 1000))"
mkdir -p "$ROOT/profiles/$TPU_NAME"
tpu tpu-vm scp "$TPU_NAME:profile" "$ROOT/profiles/$TPU_NAME" --worker=0 --recurse --quiet || explain "copy the trace"
say "to view it: pip install xprof; xprof --port=6006 profiles/$TPU_NAME/profile"

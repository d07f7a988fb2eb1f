#!/usr/bin/env bash
# stop.sh [SECONDS]: ask the run to save and stop (SIGTERM), wait for that (600). The TPU stays, and is billed.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ ${1:-600} =~ ^[0-9]+$ ]] || die "$1: not a number of seconds"
need_ready
on_all rdlm/tpu_setup/worker.sh stop "${1:-600}" | tee "$WORK/stopped"
! grep -qE 'lost|failed|wrong' "$WORK/stopped" || fail "the run did not end well; tpu_setup/logs.sh"
say "$TPU_NAME is still there and billed; tpu_setup/delete.sh ends that"

#!/usr/bin/env bash
# stop.sh [SECONDS]: make the run save and stop (SIGTERM); wait up to SECONDS (600). The TPU is kept, and billed.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ ${1:-600} =~ ^[0-9]+$ ]] || die "$1: not a number of seconds"
need_ready
on_all rdlm/tpu_setup/worker.sh stop "${1:-600}" | tee "$WORK/stopped"
! states <"$WORK/stopped" | grep -qE ' (lost|failed|wrong) ' || fail "the run failed; see tpu_setup/logs.sh"
say "$TPU_NAME is still there and billed; tpu_setup/delete.sh deletes it"

#!/usr/bin/env bash
# logs.sh [-n LINES]: the last lines of the newest run's log on every worker. logs.sh -f [WORKER]: follow one log (0).
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
need_ready
case ${1:-} in
  '') on_all rdlm/tpu_setup/worker.sh logs 20 ;;
  -n) on_all rdlm/tpu_setup/worker.sh logs "${2:-20}" ;;
  -f) on_worker "${2:-0}" rdlm/tpu_setup/worker.sh follow ;;
  *) die "$1: unknown; logs.sh [-n LINES] or logs.sh -f [WORKER]" ;;
esac

#!/usr/bin/env bash
# run.sh SCRIPT ARGS...: start an experiment on every worker, in the background. The same command again resumes it.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
check_script "$@"
need_ready
check_arguments "$@"
id=$(run_id "$@")
on_all rdlm/tpu_setup/worker.sh start "$id" "$PROFILER_PORT" "$@" ||
  fail "$id: did not start on every worker; tpu_setup/stop.sh stops it where it did"
say "$id: started; tpu_setup/logs.sh -f shows it, tpu_setup/stop.sh saves and stops it, tpu_setup/delete.sh ends billing"

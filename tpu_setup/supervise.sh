#!/usr/bin/env bash
# supervise.sh SCRIPT ARGS...: keep an experiment running until it is done: create the TPU, set it up, run; after a
# preemption delete it, create it again, resume. Exit codes of the run: 0 done, 75 preempted and saved (resume at once),
# 2 wrong input and 3 stopped by an alarm (give up), others: retry after a pause, MAX_TRIES times in a row. At the end:
# WHEN_DONE.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
check_script "$@"
[[ -n $BUCKET ]] || die "BUCKET is not set: the disks of a preempted TPU are lost, so a run resumes from a bucket (in $CONFIG)"
check_arguments "$@"
export QUIET=1
started=$(date +%s)
UNTIL=$((started + MAX_HOURS * 3600))
export UNTIL
id=$(run_id "$@")
failures=0
alive=0 # times in a row that the run was found running
BILLED=perhaps # for any early end of this script

end() { # CODE MESSAGE
  say "$id: $2"
  if (($1 != 0)) && [[ $(node_state 2>/dev/null) == READY ]]; then "$HERE/logs.sh" -n 30 || true; fi
  if [[ $WHEN_DONE == delete ]]; then
    local force=()
    (($1 != 1)) || force=(--force) # not after a refused command: another run may be using the TPU
    "$HERE/delete.sh" ${force[@]+"${force[@]}"} && BILLED=''
  fi
  [[ $1 != 0 || -z $BILLED ]] || mention_billing
  exit "$1"
}

trouble() { # MESSAGE: count a failure and wait, longer each time
  local wait
  failures=$((failures + 1))
  ((failures < MAX_TRIES)) || end 1 "$1; gave up after $failures failures in a row (MAX_TRIES)"
  wait=$((30 * 2 ** (failures < 7 ? failures : 7)))
  say "$id: $1; failure $failures of $MAX_TRIES, trying again in $wait seconds"
  pause "$wait"
}

# step SCRIPT ARGS...: run one of the scripts here; wrong input ends the supervision, other failures are counted.
step() {
  local code=0
  "$HERE/$1" "${@:2}" || code=$?
  ((code != 2)) || end 2 "$1 refuses; see above"
  ((code == 0)) || trouble "$1 failed"
  return "$code"
}

while :; do
  (($(date +%s) < UNTIL)) || {
    "$HERE/stop.sh" || true
    end 1 "MAX_HOURS = $MAX_HOURS are over; the same command resumes from the newest checkpoint"
  }
  if ! queue=$(queue_state) || ! node=$(node_state); then
    trouble "cannot get the state of $TPU_NAME"
    continue
  fi
  case $queue/$node in
    */READY) ;;
    / | WAITING_FOR_RESOURCES/* | ACCEPTED/* | PROVISIONING/* | CREATING/* | ACTIVE/ | */CREATING)
      step create.sh || true
      continue
      ;;
    *)
      say "$id: the TPU is gone (request ${queue:-none}, node ${node:-none}); creating it again"
      step delete.sh --force || true
      continue
      ;;
  esac
  case $(run_state none "$id") in
    running)
      alive=$((alive + 1))
      ((alive < 10)) || failures=0
      pause 60
      continue
      ;;
    done) end 0 "done" ;;
    wrong) end 2 "the run refused its input; see the log" ;;
    alarm) end 3 "an alarm stopped the run, and it is saved; see the log" ;;
    none) step setup.sh && step run.sh "$@" || true ;;
    preempted) step run.sh "$@" || true ;;
    failed) trouble "the run failed" && step run.sh "$@" || true ;;
    unreachable) trouble "its workers do not answer" ;;
  esac
  alive=0
  [[ $DRY_RUN != 1 ]] || end 0 "it would check again every minute and act on the state"
done

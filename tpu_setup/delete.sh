#!/usr/bin/env bash
# delete.sh [--force]: delete the TPU and its request. Refuses while a run is active, unless forced. Buckets are kept.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ ${1:-} == '' || $1 == --force ]] || die "$1: unknown; the only option is --force"

queue=$(queue_state)
node=$(node_state)
if [[ -z $queue$node ]]; then
  say "nothing to delete: there is no '$TPU_NAME' in $ZONE"
  exit 0
fi
if [[ $node == READY && ${1:-} != --force ]]; then
  case $(run_state none) in
    running) die "TPU_NAME = $TPU_NAME: a run is active; tpu_setup/stop.sh saves and stops it, --force deletes anyway" ;;
    unreachable) die "TPU_NAME = $TPU_NAME: cannot check its workers for active runs (ssh fails); --force deletes anyway" ;;
  esac
fi
BILLED=perhaps
if [[ -n $queue ]]; then # --force deletes its node as well
  tpu queued-resources delete "$TPU_NAME" --force --quiet || explain "delete the request $TPU_NAME"
  node=$(node_state '')
fi
if [[ -n $node ]]; then
  tpu tpu-vm delete "$TPU_NAME" --quiet || explain "delete $TPU_NAME"
fi
queue=$(queue_state '')
node=$(node_state '')
[[ -z $queue$node ]] || fail "TPU_NAME = $TPU_NAME: is still there after deleting; try again"
say "deleted: there is no '$TPU_NAME' in $ZONE any more${BUCKET:+; $BUCKET is kept}"

#!/usr/bin/env bash
# status.sh: the state of the request, of the TPU, and of the runs on its workers.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
queue=$(queue_state)
node=$(node_state)
if [[ -z $queue$node ]]; then
  say "there is no '$TPU_NAME' in $ZONE; nothing is billed"
  exit 0
fi
echo "request ${queue:-none}, node ${node:-none}, $ACCELERATOR_TYPE in $ZONE"
[[ $node != READY ]] || on_all rdlm/tpu_setup/worker.sh status

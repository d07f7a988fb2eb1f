#!/usr/bin/env bash
# ssh.sh [WORKER]: a shell on a worker (0). ssh.sh WORKER|all COMMAND ARGS...: run a command, its words unchanged.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
worker=${1:-0}
[[ $worker =~ ^([0-9]+|all)$ ]] || die "worker '$worker': use a number from 0, or all with a command"
need_ready
if (($# > 1)); then
  if [[ $worker == all ]]; then on_all "${@:2}"; else on_worker "$worker" "${@:2}"; fi
else
  [[ $worker != all ]] || die "all: needs a command; a shell runs on one worker"
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --project="$PROJECT" --zone="$ZONE" --worker="$worker"
fi

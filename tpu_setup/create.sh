#!/usr/bin/env bash
# create.sh: request the TPU and wait until it is ready. Run again while a request is pending, it continues to wait.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
tier=()
[[ $CAPACITY == on-demand ]] || tier=("--$CAPACITY")
now=$(date +%s)
deadline=${UNTIL:-$((now + WAIT_HOURS * 3600))} # supervise.sh may set an earlier one

queue=$(queue_state '')
node=$(node_state '')
case $queue/$node in
  /) made='' ;;
  WAITING_FOR_RESOURCES/* | ACCEPTED/* | CREATING/* | PROVISIONING/* | ACTIVE/ | */CREATING) made=before ;;
  *) die "TPU_NAME = $TPU_NAME: already exists in $ZONE (request ${queue:-none}, node ${node:-none});" \
    "continue with tpu_setup/setup.sh, or remove it: tpu_setup/delete.sh" ;;
esac
BILLED=perhaps

if [[ -n $made ]]; then
  say "$TPU_NAME: waiting for the earlier request"
elif [[ $REQUEST == queued ]]; then
  tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" --valid-until-duration="${WAIT_HOURS}h" ${tier[@]+"${tier[@]}"} \
    || explain "create $TPU_NAME"
else
  until tpu tpu-vm create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" \
    ${tier[@]+"${tier[@]}"}; do
    if (($(date +%s) >= deadline)) || ! grep -qE 'no more capacity|nsufficient.*capacity' "$WORK/trouble"; then
      explain "create $TPU_NAME"
    fi
    say "$TPU_NAME: no capacity in $ZONE now; trying again in a minute"
    pause 60
  done
fi

seen=''
while :; do
  queue=$(queue_state)
  node=$(node_state)
  if [[ $node == READY ]]; then break; fi
  [[ $queue/$node == "$seen" ]] || say "$TPU_NAME: request ${queue:-none}, node ${node:-none}"
  seen=$queue/$node
  case $queue/$node in
    FAILED/* | SUSPEND*/* | DELETING/*)
      reason=$(state_of queued-resources state.failedData.error.message '')
      fail "TPU_NAME = $TPU_NAME: the request is $queue${reason:+ ($reason)}; tpu_setup/delete.sh, then create.sh again" ;;
    */PREEMPTED | */TERMINATED | */STOPPED)
      fail "TPU_NAME = $TPU_NAME: was $node before it was ready; tpu_setup/delete.sh, then create.sh again" ;;
  esac
  (($(date +%s) < deadline)) ||
    fail "$TPU_NAME: no TPU in time (WAIT_HOURS = $WAIT_HOURS); try another zone or type, or CAPACITY=on-demand"
  pause 30
done
say "$TPU_NAME is READY in $ZONE, and billed from now on until tpu_setup/delete.sh; next: tpu_setup/setup.sh"

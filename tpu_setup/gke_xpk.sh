#!/usr/bin/env bash
# gke_xpk.sh [--dry-run] up | down | run IMAGE SCRIPT ARGS...: the same on Google Kubernetes Engine, with xpk
# (pip install xpk). up: create a cluster with the TPU, and BUCKET as /rdlm/runs. run: build and push IMAGE, and start
# SCRIPT on all workers, again after preemptions. down: delete the cluster.
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ -n $BUCKET ]] || die "BUCKET is not set: pods lose their files, so run folders must be in a bucket (in $CONFIG)"
for tool in xpk docker; do
  [[ $DRY_RUN == 1 ]] || command -v "$tool" >/dev/null || die "$tool is not installed (see the top of gke_xpk.sh)"
done
xpk() { run env xpk "$@" --cluster="$TPU_NAME" --project="$PROJECT" --zone="$ZONE"; }

case ${1:-} in
  up)
    [[ $CAPACITY != reserved ]] || die "CAPACITY = reserved: xpk needs the reservation's name; use spot or on-demand"
    xpk cluster create --tpu-type="$ACCELERATOR_TYPE" --num-slices=1 "--$CAPACITY" --enable-gcsfuse-csi-driver
    xpk storage attach rdlm-runs --type=gcsfuse --bucket="${BUCKET#gs://}" --mount-point=/rdlm/runs --readonly=false \
      --size=1 --auto-mount=true \
      --mount-options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
    say "cluster $TPU_NAME is up, and billed until: tpu_setup/gke_xpk.sh down"
    ;;
  run)
    (($# > 2)) || die "which image and script? gke_xpk.sh run IMAGE experiments/train.py small --run-dir runs/small"
    image=$2
    shift 2
    check_script "$@"
    check_arguments "$@"
    run bash -euc "cd $(quote "$ROOT") && git archive HEAD | docker build -f tpu_setup/Dockerfile -t $(quote "$image") -"
    run docker push "$image"
    xpk workload create --workload="$(run_id "$@" | tr '_' '-')" --tpu-type="$ACCELERATOR_TYPE" --num-slices=1 \
      --docker-image="$image" --max-restarts="$MAX_TRIES" --command="python $(quote "$@")"
    ;;
  down)
    xpk cluster delete --force
    say "cluster $TPU_NAME is deleted; $BUCKET is kept"
    ;;
  *) die "'${1:-}': use up, run IMAGE SCRIPT ARGS... or down" ;;
esac

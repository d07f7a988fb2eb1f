#!/usr/bin/env bash
# bucket.sh: make BUCKET, near the TPU, for run folders. Does nothing when it is there.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ -n $BUCKET ]] || die "BUCKET is not set: use gs://NAME (in $CONFIG)"

storage() { run gcloud storage buckets "$@" --project="$PROJECT" 2>"$WORK/trouble" >"$WORK/said" </dev/null; }

if [[ $DRY_RUN != 1 ]] && storage describe "$BUCKET" --format='value(location)'; then
  say "$BUCKET is there, in $(<"$WORK/said")"
  exit 0
fi
[[ $DRY_RUN == 1 ]] || grep -qiE 'not found|404' "$WORK/trouble" ||
  die "BUCKET = $BUCKET: $(tail -n 1 "$WORK/trouble"); if it is someone else's, choose another name"
# With a hierarchical namespace a folder is renamed at once: a checkpoint is there whole or not at all.
storage create "$BUCKET" --location="${ZONE%-*}" --uniform-bucket-level-access --enable-hierarchical-namespace \
  --public-access-prevention || die "BUCKET = $BUCKET: cannot be made: $(tail -n 1 "$WORK/trouble")"
say "$BUCKET: made in ${ZONE%-*}; its contents are billed until you delete them: gcloud storage rm --recursive $BUCKET"

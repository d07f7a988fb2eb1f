#!/usr/bin/env bash
# bucket.sh: create BUCKET for run folders, near the TPU. Does nothing if it exists.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ -n $BUCKET ]] || die "BUCKET is not set: use gs://NAME (in $CONFIG)"

storage() { run gcloud storage buckets "$@" --project="$PROJECT" 2>"$WORK/trouble" >"$WORK/said" </dev/null; }

if [[ $DRY_RUN != 1 ]] && storage describe "$BUCKET" --format='value(location)'; then
  say "$BUCKET exists, in $(<"$WORK/said")"
  exit 0
fi
[[ $DRY_RUN == 1 ]] || grep -qiE 'not found|404' "$WORK/trouble" ||
  die "BUCKET = $BUCKET: $(tail -n 1 "$WORK/trouble"); if it belongs to somebody else, choose another name"
# With a hierarchical namespace folders are renamed atomically, so a checkpoint is complete or absent.
storage create "$BUCKET" --location="${ZONE%-*}" --uniform-bucket-level-access --enable-hierarchical-namespace \
  --public-access-prevention || die "BUCKET = $BUCKET: cannot be created: $(tail -n 1 "$WORK/trouble")"
say "$BUCKET: created in ${ZONE%-*}; its contents are billed until you delete them: gcloud storage rm --recursive $BUCKET"

#!/usr/bin/env bash
# setup.sh: copy the code to every worker, install it, mount the bucket, and check that all devices are there. Run it
# again after every change of the code: tracked files are copied with their uncommitted changes.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
need_ready
[[ $(run_state none) != running ]] || die "TPU_NAME = $TPU_NAME: a run is active on this code; tpu_setup/stop.sh first"
WORKERS=$(count_workers)

say "1/5 ssh: keys and known hosts, one worker at a time"
for ((n = 0; n < WORKERS; n++)); do
  on_worker "$n" true 2>"$WORK/trouble" || explain "reach worker $n of $TPU_NAME by ssh"
done

commit=$(git -C "$ROOT" rev-parse HEAD)
# Tracked files with uncommitted changes, as a commit without a name; no branch moves.
tree=$(git -C "$ROOT" -c user.name=rdlm -c user.email=rdlm@localhost stash create)
say "2/5 code: commit $commit${tree:+ with changes}"
git -C "$ROOT" archive --format=tar.gz -o "$WORK/rdlm.tar.gz" "${tree:-HEAD}" -- . ':(exclude)tests'
tpu tpu-vm scp "$WORK/rdlm.tar.gz" "$TPU_NAME:rdlm.tar.gz" --worker=all --quiet || explain "copy the code"
# shellcheck disable=SC2016 # expanded on the workers
on_all bash -euc 'mkdir -p rdlm && cd rdlm
  find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name data ! -name runs -exec rm -rf {} +
  tar -xzf ../rdlm.tar.gz && echo "$1" > COMMIT' unpack "$commit${tree:++changes}"

say "3/5 install: takes some minutes the first time"
on_all rdlm/tpu_setup/install.sh "$PYTHON"

if [[ -n $BUCKET ]]; then
  say "4/5 bucket"
  on_all rdlm/tpu_setup/worker.sh mount "${BUCKET#gs://}"
else
  say "4/5 bucket: none (BUCKET is empty): runs stay on the disks of the TPU; several workers cannot share a run folder"
fi

say "5/5 devices: $(expected_devices) on $WORKERS workers"
# shellcheck disable=SC2016 # expanded on the workers
on_all bash -euc 'cd rdlm && exec .venv/bin/python -m rdlm.runtime --devices "$1" --processes "$2"' check \
  "$(expected_devices)" "$WORKERS" >"$WORK/devices" || fail "$TPU_NAME does not have all its devices; see above"
sed -nE '/devices|processes/p' "$WORK/devices"
say "ready; next: tpu_setup/run.sh experiments/train.py small --run-dir runs/small"

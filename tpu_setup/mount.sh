#!/usr/bin/env bash
# mount.sh: mount BUCKET on every worker as ~/rdlm-bucket; its folder runs/ is ~/rdlm/runs. setup.sh does this too.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
settings
[[ -n $BUCKET ]] || die "BUCKET is not set: use gs://NAME (in $CONFIG)"
need_ready
on_all rdlm/tpu_setup/worker.sh mount "${BUCKET#gs://}"

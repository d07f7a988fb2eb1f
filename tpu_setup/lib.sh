# shellcheck shell=bash disable=SC2034 # settings are for the scripts that source this
# Shared by all scripts, which source it first. Settings come only from config.env (CONFIG=FILE: from another file).
# DRY_RUN=1 prints every command instead of running it.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
CONFIG=${CONFIG:-$HERE/config.env}
DRY_RUN=${DRY_RUN:-0}
BILLED='' # not empty: after a failure something may be left that costs money
WORKERS='' # number of workers, once known
WORK=$(mktemp -d)
exec 3>&1 # DRY_RUN prints here, even inside $(...)

finish() {
  local code=$?
  if ((code != 0)) && [[ -n $BILLED ]]; then mention_billing; fi
  rm -rf "$WORK"
}
trap finish EXIT

say() {
  local mark=''
  [[ $DRY_RUN != 1 || $* == error:* ]] || mark='(dry run) '
  printf '%s\n' "$mark$*" >&2
}
die() { # wrong input: the same command would fail again
  say "error: $*"
  exit 2
}
fail() { # a failure that may be temporary
  say "error: $*"
  exit 1
}

# The words, quoted so that a shell reads exactly these words.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

run() {
  if [[ $DRY_RUN == 1 ]]; then quote "$@" >&3; else "$@"; fi
}

pause() { run sleep "$1"; }

# --- settings

NAMES='PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY REQUEST WAIT_HOURS BUCKET PYTHON PROFILER_PORT
MAX_TRIES MAX_HOURS WHEN_DONE'

read_settings() {
  local line name value number=0
  local setting='^([A-Z_]+)=("([^"]*)"|'\''([^'\'']*)'\''|([^[:space:]"'\''#]*))[[:space:]]*(#.*)?$'
  CAPACITY=spot REQUEST=queued WAIT_HOURS=24 MAX_TRIES=5 MAX_HOURS=72 WHEN_DONE=delete PROFILER_PORT=9012
  PROJECT='' ZONE='' TPU_NAME='' ACCELERATOR_TYPE='' RUNTIME_VERSION='' BUCKET='' PYTHON=''
  [[ -r $CONFIG ]] || die "CONFIG = $CONFIG: no such file; cp tpu_setup/config.env.example $CONFIG and fill it in"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ $setting ]] ||
      die "$CONFIG line $number: '$line' is not NAME=value (quote a value with blanks)"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[3]}${BASH_REMATCH[4]}${BASH_REMATCH[5]}
    [[ " ${NAMES//$'\n'/ } " == *" $name "* ]] ||
      die "$CONFIG line $number: unknown setting $name; known: ${NAMES//$'\n'/ }"
    printf -v "$name" %s "$value"
  done <"$CONFIG"
}

# must NAME PATTERN FIX
must() {
  [[ -n ${!1} ]] || die "$1 is not set: $3 (in $CONFIG)"
  [[ ${!1} =~ ^($2)$ ]] || die "$1 = '${!1}': $3 (in $CONFIG)"
}

check_settings() {
  local number='[1-9][0-9]*'
  must PROJECT '[a-z][a-z0-9.:-]*[a-z0-9]' 'use the id of your Google Cloud project'
  must ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' "use a zone, like us-central1-a; list them: gcloud compute tpus locations list"
  must TPU_NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'use small letters, digits and dashes, starting with a letter'
  must ACCELERATOR_TYPE '(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*' 'use a type like v5litepod-16, v6e-8, v5p-8 or v4-8'
  case $ACCELERATOR_TYPE in
    v6e-*) RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv6e} ;;
    v5litepod-*) RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite} ;;
    v5p-*) RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5} ;;
    *) RUNTIME_VERSION=${RUNTIME_VERSION:-tpu-ubuntu2204-base} ;;
  esac
  must CAPACITY 'spot|on-demand|reserved' 'use spot, on-demand or reserved'
  must REQUEST 'queued|direct' 'use queued (waits for capacity) or direct'
  must WHEN_DONE 'delete|keep' 'use delete or keep'
  must WAIT_HOURS "$number" 'use a whole number of hours'
  must MAX_TRIES "$number" 'use a whole number'
  must MAX_HOURS "$number" 'use a whole number of hours'
  must PROFILER_PORT '[0-9]+' 'use a port, or 0 for no profiler'
  [[ -z $BUCKET ]] || must BUCKET 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' 'use gs://NAME, without a folder'
}

# The settings in use, on one line. QUIET: another script has printed them already.
show_settings() {
  local name line="$CONFIG:"
  [[ -z ${QUIET:-} ]] || return 0
  for name in $NAMES; do line+=" $name=${!name:-''}"; done
  printf '%s\n' "$line" >&2
}

settings() {
  read_settings
  check_settings
  show_settings
  [[ $DRY_RUN == 1 ]] || command -v gcloud >/dev/null ||
    die "gcloud is not installed: https://cloud.google.com/sdk/docs/install, then gcloud auth login"
}

# The number of devices JAX sees: chips, but cores on v2 and v3. Types of v2 to v4 and of v5p count cores.
expected_devices() {
  case $ACCELERATOR_TYPE in
    v4-* | v5p-*) echo $((${ACCELERATOR_TYPE#*-} / 2)) ;;
    *) echo "${ACCELERATOR_TYPE#*-}" ;;
  esac
}

# --- gcloud

# tpu WORDS...: gcloud compute tpus WORDS..., in our project and zone. Its stderr goes to $WORK/trouble.
tpu() {
  run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" 2>"$WORK/trouble" </dev/null
}

# explain ACTION: exit with one line that says why gcloud failed and what to do.
explain() {
  local text
  text=$(<"$WORK/trouble")
  case $text in
    *'not found or access is unauthorized'* | *'may not exist'* | *'Invalid zone'* | *'Unknown zone'*)
      die "ZONE = $ZONE: no TPU zone for project $PROJECT (cannot $1); see gcloud compute tpus locations list" ;;
    *SERVICE_DISABLED* | *'has not been used in project'*)
      die "cannot $1: the TPU API is off; gcloud services enable tpu.googleapis.com --project=$PROJECT" ;;
    *'Permission denied (publickey'*)
      fail "cannot $1: your ssh key is refused; run ssh-add ~/.ssh/google_compute_engine and try again" ;;
    *'auth login'* | *'active account'*) die "cannot $1: not logged in; gcloud auth login" ;;
    *PERMISSION_DENIED* | *'does not have permission'* | *denied*)
      die "PROJECT = $PROJECT: no permission to $1; ask its owner for the role roles/tpu.admin, or gcloud auth login" ;;
    *ALREADY_EXISTS* | *'already exists'*)
      die "TPU_NAME = $TPU_NAME: already exists in $ZONE; choose another name, or tpu_setup/delete.sh" ;;
    *[Qq]uota*)
      die "ACCELERATOR_TYPE = $ACCELERATOR_TYPE ($CAPACITY): over the quota of $PROJECT in $ZONE (cannot $1);" \
        "take a smaller type or another zone, or ask for more: https://console.cloud.google.com/iam-admin/quotas" ;;
    *'no more capacity'* | *'nsufficient'*'capacity'*)
      fail "ZONE = $ZONE: no capacity for $ACCELERATOR_TYPE now (cannot $1); wait, or take another zone" ;;
    *) fail "cannot $1: $(sed '/^[[:space:]]*$/d' <<<"$text" | tail -n 1)" ;;
  esac
}

# state_of KIND FIELD ASSUMED: the field's value; empty if the resource does not exist; ASSUMED in a dry run.
state_of() {
  local code=0
  tpu "$1" describe "$TPU_NAME" --format="value($2)" || code=$?
  if [[ $DRY_RUN == 1 ]]; then
    echo "$3"
  elif ((code != 0)); then
    grep -qiE 'NOT_FOUND|was not found' "$WORK/trouble" || explain "look at $TPU_NAME"
  fi
}
node_state() { state_of tpu-vm state "${1-READY}"; }
queue_state() {
  local assumed=ACTIVE
  [[ $REQUEST == queued ]] || assumed=''
  state_of queued-resources state.state "${1-$assumed}"
}

# Says what exists and costs money, now or later.
mention_billing() {
  local queue node
  queue=$(queue_state 2>/dev/null) || queue=unknown
  node=$(node_state 2>/dev/null) || node=unknown
  [[ -z $queue$node ]] ||
    say "left behind in $ZONE, and billed while it runs: '$TPU_NAME' (request ${queue:-none}, node ${node:-none});" \
      "tpu_setup/delete.sh removes it"
}

need_ready() {
  local state
  state=$(node_state)
  [[ $state == READY ]] || fail "TPU_NAME = $TPU_NAME: is ${state:-missing} in $ZONE, not READY; tpu_setup/create.sh creates it"
}

# --- workers

count_workers() { state_of tpu-vm 'networkEndpoints[].ipAddress' 10.0.0.1 | awk -F ';' '{ n += NF } END { print n + 0 }'; }

# on_worker N WORDS...: run these words on worker N. Retries if ssh itself fails (255).
on_worker() {
  local worker=$1 try code
  shift
  for try in 1 2 3; do
    code=0
    run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --project="$PROJECT" --zone="$ZONE" --worker="$worker" \
      --command="$(quote "$@")" --quiet </dev/null || code=$?
    if ((code != 255 || try == 3)); then return "$code"; fi
    pause $((5 * try))
  done
}

# on_all WORDS...: run these words on all workers in parallel. Prints "[N] line" for each line of output, in the order
# of workers, and the errors of those that fail; returns the exit code of the last failure.
on_all() {
  local n count code worst=0 pids=()
  [[ -n $WORKERS ]] || WORKERS=$(count_workers)
  count=$WORKERS
  ((count > 0)) || fail "TPU_NAME = $TPU_NAME: has no workers in $ZONE; tpu_setup/create.sh"
  for ((n = 0; n < count; n++)); do
    on_worker "$n" "$@" >"$WORK/out.$n" 2>"$WORK/err.$n" &
    pids[n]=$!
    (((n + 1) % 16)) || wait # each gcloud takes 100 MB of memory
  done
  for ((n = 0; n < count; n++)); do
    code=0
    wait "${pids[n]}" || code=$?
    sed "s/^/[$n] /" "$WORK/out.$n"
    if ((code == 255)); then
      say "error: worker $n of $TPU_NAME cannot be reached by ssh; tpu_setup/status.sh says whether it is still there"
    elif ((code != 0)); then
      { grep '^error:' "$WORK/err.$n" || tail -n 5 "$WORK/err.$n"; } | sed "s/^/[$n] /" >&2
    fi
    ((code == 0)) || worst=$code
  done
  return "$worst"
}

# states: the state words of the lines that worker.sh says, each between blanks. A line is "[N] none" or
# "[N] ID STATE ..."; the rest of it may quote a log, which can contain any word.
states() { awk '{ printf " %s ", $2 == "none" ? $2 : $3 }'; }

# run_state ASSUMED [ID]: the state of run ID, or of the newest, on all workers, as one word: none | running | done |
# preempted | wrong | alarm | failed | unreachable.
run_state() {
  local said
  # A new worker does not have the code yet.
  # shellcheck disable=SC2016 # expanded on the worker
  said=$(on_all bash -c 'w=rdlm/tpu_setup/worker.sh; if [ -x $w ]; then $w status "$@"; else echo none; fi' - "${@:2}") || {
    echo unreachable
    return
  }
  if [[ $DRY_RUN == 1 ]]; then said="[0] ID $1"; fi
  said=$(states <<<"$said")
  case $said in
    *' running '*) echo running ;;
    *' wrong '*) echo wrong ;;
    *' alarm '*) echo alarm ;;
    *' failed '* | *' lost '*) echo failed ;;
    *' preempted '*) echo preempted ;;
    *' none '*) echo none ;;
    *) echo "done" ;;
  esac
}

# The name of a run: the same for the same command, on every worker and after every resume.
run_id() {
  local name
  name=$(basename "${1%.py}")
  printf '%s-%s\n' "$name" "$(printf '%s\0' "$@" | cksum | cut -d ' ' -f 1)"
}

# Exits unless the script is tracked by git; says which scripts there are.
check_script() {
  (($# > 0)) || die "which script? For example: tpu_setup/${0##*/} experiments/train.py small --run-dir runs/small"
  git -C "$ROOT" ls-files --error-unmatch -- "$1" >/dev/null 2>&1 ||
    die "$1: git tracks no such script; there are:" "$(git -C "$ROOT" ls-files 'experiments/*.py' | tr '\n' ' ')"
}

# Exits unless the script takes these arguments, and with a bucket writes in runs/ only: before anything is rented.
check_arguments() {
  local python code
  for python in "$ROOT/.venv/bin/python" python3; do
    code=0
    (cd "$ROOT" && BUCKET=$BUCKET PYTHONPATH=$ROOT "$python" tpu_setup/check.py "$@") >"$WORK/check" 2>&1 || code=$?
    case $code in
      0) return ;;
      2) cat "$WORK/check" >&2 && exit 2 ;;
    esac # else: this Python is missing, or lacks a package
  done
  say "note: no Python here has rdlm installed (make test), so the arguments of $1 are not checked before it starts"
}

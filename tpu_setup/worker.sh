#!/usr/bin/env bash
# worker.sh: the part of run.sh, status.sh, logs.sh, stop.sh and mount.sh that runs on a worker, over ssh.
#   start ID PORT SCRIPT ARGS...   run in the background, in tmux; log, process id and exit code go to ~/.rdlm/ID
#   status [ID]                    state of run ID, or of the newest: "ID running", "ID preempted (...)", "none", ...
#   logs LINES | follow | stop SECONDS | mount BUCKET
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STATE=$HOME/.rdlm
TMUX_SOCKET=$STATE/tmux

die() {
  echo "error: $(hostname): $*" >&2
  exit 2
}

current() { [[ -L $STATE/current ]] && readlink "$STATE/current"; }

# last_line ID: the last line of its log that says something: no stack frames of JAX, no lower edge of a message's box.
last_line() { grep -vE '^ *@ +0x|^\*\*\* Check failure|^(╭|╰)' "$STATE/$1/log" | tail -n 1; }

status() {
  local id=${1:-$(current || true)} code
  if [[ -z $id || ! -d $STATE/$id ]]; then
    echo none
  elif [[ -e $STATE/$id/exit ]]; then
    code=$(<"$STATE/$id/exit")
    case $code in
      0) echo "$id done" ;;
      75) echo "$id preempted (saved, exit code 75)" ;;
      3) echo "$id alarm (saved, exit code 3)" ;;
      2) echo "$id wrong input (exit code 2): $(last_line "$id")" ;;
      *) echo "$id failed (exit code $code): $(last_line "$id")" ;;
    esac
  elif tmux -S "$TMUX_SOCKET" has-session -t "=$id" 2>/dev/null; then
    echo "$id running"
  else
    echo "$id lost (this worker was restarted?)"
  fi
}

# is_running STATUS: whether it says so; the log line in a status can end in any word.
is_running() { [[ ${1#* } == running ]]; }

start() {
  local id=$1 now
  now=$(status)
  [[ $now != "$id running" ]] || return 0 # already started
  ! is_running "$now" || die "$now; tpu_setup/stop.sh first"
  [[ -x .venv/bin/python ]] || die "nothing is installed; tpu_setup/setup.sh first"
  mkdir -p "$STATE/$id"
  rm -f "$STATE/$id/exit" "$STATE/$id/pid"
  printf '%s\0' "${@:2}" >"$STATE/$id/command" # tmux would interpret some words itself
  ln -sfn "$id" "$STATE/current"
  tmux -S "$TMUX_SOCKET" new-session -d -s "$id" "$PWD/tpu_setup/worker.sh" hold "$id"
  echo "$id started"
}

hold() { # inside tmux
  local dir=$STATE/$1 code=0 words
  mapfile -d '' -t words <"$dir/command"
  echo "$(date -u +%FT%TZ) $(cat COMMIT 2>/dev/null || echo unknown): ${words[*]:1}" >>"$dir/log"
  RDLM_PROFILER_PORT=${words[0]} .venv/bin/python -u "${words[@]:1}" >>"$dir/log" 2>&1 </dev/null &
  echo $! >"$dir/pid"
  wait $! || code=$?
  echo "$code" >"$dir/exit.partial"
  mv "$dir/exit.partial" "$dir/exit"
}

stop() {
  local id left=$1
  id=$(current) || die "there is no run"
  is_running "$(status "$id")" || { status "$id" && return; }
  until [[ -s $STATE/$id/pid ]]; do sleep 0.1; done
  kill -TERM "$(<"$STATE/$id/pid")" 2>/dev/null || true # it may have just ended
  until [[ -e $STATE/$id/exit ]]; do
    ((left-- > 0)) || die "$id is still running $1 seconds after it was asked to stop"
    sleep 1
  done
  status "$id"
}

mount() {
  local folder=$HOME/rdlm-bucket package=gcsfuse_3.8.0_amd64.deb
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL -o "/tmp/$package" "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.8.0/$package"
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq "/tmp/$package" >/dev/null
  fi
  mkdir -p "$folder"
  # Without caches every host sees at once what others write; checkpoints of several hosts need that.
  mountpoint -q "$folder" || gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" "$folder" >/dev/null ||
    die "BUCKET = gs://$1: cannot be mounted; has the TPU's service account the role roles/storage.objectUser there?"
  mkdir -p "$folder/runs"
  [[ -L runs || ! -d runs ]] || rmdir runs 2>/dev/null || die "$PWD/runs: contains runs already; move them away first"
  ln -sfn "$folder/runs" runs
  echo "runs -> gs://$1/runs"
}

case ${1:-} in
  start | status | hold | stop | mount) "$@" ;;
  logs | follow)
    log=$STATE/$(current || die "there is no run")/log
    if [[ $1 == logs ]]; then tail -n "$2" "$log"; else tail -n 20 -F "$log"; fi ;;
  *) die "'${1:-}': see the top of tpu_setup/worker.sh" ;;
esac

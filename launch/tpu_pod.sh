#!/usr/bin/env bash
# Runs launch/train.py on every worker of a TPU pod of Google Cloud, through preemptions, until the run has ended.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/quoted.sh
source "$ROOT/launch/quoted.sh"

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE --workdir=FOLDER [options] -- [flags of launch/train.py]

Creates the pod, or takes the one of this name; copies this checkout to all workers, installs it, runs
`launch/train.py --distributed --workdir=FOLDER …` on all of them and follows the log. A pod that is lost (preempted, terminated, deleted)
is deleted and created again, and the same command goes on from its last checkpoint.

  --name=NAME         of the TPU VM
  --zone=ZONE         e.g. us-west4-a
  --type=TYPE         accelerator type, e.g. v5litepod-64, v5p-128, v6e-64
  --workdir=FOLDER    on a file system that all workers see and that outlives the pod (see --setup)
  --version=VERSION   runtime version of the TPU VM (default: by the type)
  --project=PROJECT   default: gcloud's own
  --setup=COMMAND     run on every worker before the run, e.g. to mount the workdir:
                      'mountpoint -q /mnt/runs || { sudo mkdir -p /mnt/runs && sudo mount -t nfs 10.0.0.2:/runs /mnt/runs; }'
  --spot              spot capacity: cheaper, and preempted
  --queued            wait in line for capacity (queued resources) instead of failing when there is none
  --tries=N           how often the run is started at most (default 50)
  --poll=SECONDS      between two looks at the pod's state (default 20)
  --delete            delete the pod when the run has ended well; otherwise it stays, and costs
  --dry-run           print the commands for a pod that is not there yet, one a line, and run nothing

Exit: 0 the run has ended well, 1 it failed or the pod could not be had, 2 bad usage.
Example:
  launch/tpu_pod.sh --name=radit --zone=us-west4-a --type=v5litepod-64 --spot --workdir=/mnt/runs/7b --setup='sudo mount …' \
    -- --config=configs/lm_ft.py:llama_65b --config.mesh.data=-1 --config.mesh.model=8
TEXT
}

# -- options --------------------------------------------------------------------------------------------------------------------------

say() { echo "tpu_pod.sh: $1" >&2; }

name='' zone='' type='' workdir='' version='' project='' setup='' spot='' queued='' delete='' dry=''
tries=50 poll=20
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) wrong "unknown option '$1'; flags of train.py come after --" ;;
  esac
  shift
done
[[ $name ]] || wrong "--name=NAME is missing"
[[ $zone ]] || wrong "--zone=ZONE is missing"
[[ $type ]] || wrong "--type=TYPE is missing"
[[ $workdir ]] || wrong "--workdir=FOLDER is missing"
[[ $workdir == gs://* ]] && wrong "--workdir=$workdir: expected a folder; a bucket is mounted by --setup"
[[ $tries =~ ^[1-9][0-9]*$ ]] || wrong "--tries=$tries: expected a whole number from 1"
[[ $poll =~ ^[0-9]+$ ]] || wrong "--poll=$poll: expected seconds"

if [[ ! $version ]]; then
  case $type in
    v5lite* | v5e*) version=v2-alpha-tpuv5-lite ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v6e*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
where=("--zone=$zone")
[[ $project ]] && where+=("--project=$project")

# -- commands -------------------------------------------------------------------------------------------------------------------------

# Runs a command, or prints it in a dry run.
run() {
  if [[ $dry ]]; then quoted "$@"; else "$@"; fi
}

describe() { run gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($2)"; }

# Commands as one line of a shell.
steps() {
  local line
  printf -v line '%s; ' "$@"
  echo "${line%; }"
}

on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"; }

create() {
  local kind=(--accelerator-type="$type")
  [[ $spot ]] && kind+=(--spot)
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" "${kind[@]}" --runtime-version="$version"
  else
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${kind[@]}" --version="$version"
  fi
}

remove() {
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# shellcheck disable=SC2016  # what the workers' shells are to expand
install() {
  local archive="${TMPDIR:-/tmp}/radit_jax-$name.tar.gz"
  run tar -czf "$archive" -C "$ROOT" --exclude-vcs --exclude=./.venv --exclude=./runs . &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:radit_jax.tar.gz" "${where[@]}" --worker=all || return
  # The images' own Python is older than ours: uv brings one, without root. Weights and versions are the Makefile's matter.
  on_workers "$(steps 'set -e' 'mkdir -p radit_jax' 'tar -xzf radit_jax.tar.gz -C radit_jax' 'cd radit_jax' \
    'python3 -m pip install --quiet --user uv' 'uv=$HOME/.local/bin/uv' '$uv python install --quiet 3.12' \
    'make --silent install PYTHON="$($uv python find 3.12)"' '.venv/bin/pip install --quiet -e ".[tpu]"')" || return
  [[ ! $setup ]] || on_workers "$setup"
}

# A run that a lost connection left behind is ended first: it saves, and the chips are free again.
# shellcheck disable=SC2016  # as above
train() {
  on_workers "$(steps 'set -e' 'cd radit_jax' \
    'if pkill -F run.pid -f launch/train.py 2>/dev/null; then tail --pid="$(cat run.pid)" -f /dev/null; fi' 'echo $$ > run.pid' \
    "exec $(quoted .venv/bin/python launch/train.py --distributed "--workdir=$workdir" "$@")")"
}

# -- the pod --------------------------------------------------------------------------------------------------------------------------

# ask KIND FIELD: one word, ABSENT where nothing has this name, UNKNOWN (and why) where gcloud cannot tell.
ask() {
  local answer
  if answer=$(describe "$1" "$2" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ ${answer,,} == *not_found* || ${answer,,} == *"not found"* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

state() { ask tpu-vm state; }

lost() { [[ $1 =~ ^(ABSENT|PREEMPTED|TERMINATED|STOPPING|STOPPED|DELETING|SUSPENDING|SUSPENDED|FAILED)$ ]]; }

# Returns once the pod is ready: the one that is there, or a new one. Fails where it cannot be created, or its state is not to be had.
have_pod() {
  local now unknown=0
  while :; do
    now=$(state)
    [[ $now == ABSENT && $queued ]] && now=$(ask queued-resources state.state)
    case $now in
      READY) return 0 ;;
      UNKNOWN) ((++unknown < 5)) || return 1 ;;
      ABSENT)
        say "creating $name ($type)"
        create >&2 || return 1
        ;;
      *)
        if lost "$now"; then
          say "$name is $now: deleting it"
          remove >&2 || return 1
        fi
        ;;
    esac
    [[ $(state) == READY ]] || sleep "$poll"
  done
}

# Whether the pod is gone. A preemption breaks the connection before the state tells, so it is looked at more than once.
pod_is_lost() {
  local now look
  for look in 1 2 3 4; do
    now=$(state)
    lost "$now" && return 0
    ((look == 4)) || sleep "$poll"
  done
  return 1
}

# -- the run --------------------------------------------------------------------------------------------------------------------------

if [[ $dry ]]; then
  say "dry run: a pod that is lost is deleted, and all of this is done again"
  describe tpu-vm state
  create
  install
  train "$@"
  [[ ! $delete ]] || remove
  exit 0
fi

log=$(mktemp "${TMPDIR:-/tmp}/radit_jax-$name.XXXXXX.log")
for ((try = 1; try <= tries; try++)); do
  if ! have_pod; then
    say "no pod"
    ((try > 1)) || exit 1 # a wrong type, no rights: no use in trying on
    sleep "$poll"
    continue
  fi
  status=0
  install >&2 || status=$?
  if ((status == 0)); then
    say "run $try of at most $tries on $name"
    # Answers stay on stdout, logs on stderr; the logs are kept, for they say whether the run was preempted.
    { train "$@" 3>&1 1>&4 2>&3 | tee "$log" >&2; } 4>&1 || status=$?
    if ((status == 0)) && ! grep -q '^preempted: ' "$log"; then
      say "the run has ended"
      [[ ! $delete ]] || remove >&2
      exit 0
    fi
  fi
  if pod_is_lost; then
    say "$name is lost: a new one goes on from the last checkpoint"
  elif ((status == 0)); then
    say "the run was told to stop and saved: it goes on"
  elif ((status == 255)); then
    say "the connection is lost, the pod is there: the run goes on"
  else
    say "the run failed ($status) and the pod is there: not tried again"
    exit 1
  fi
done
say "given up after $tries runs"
exit 1

#!/usr/bin/env bash
# Submits launch/train.py to a SLURM cluster of GPUs: one process a node with all GPUs of the node, through preemptions and time limits.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/quoted.sh
source "$ROOT/launch/quoted.sh"

usage() {
  cat <<'TEXT'
launch/slurm.sh --nodes=N --gpus=M --workdir=FOLDER [options] -- [flags of launch/train.py]

Submits a batch job that runs `launch/train.py --workdir=FOLDER …` as one process on each node, with all of the node's GPUs: the processes
find each other by SLURM's variables. Two minutes before the time limit the processes are told to save, and the job is queued again; a job
that the scheduler preempts is queued again by the scheduler. Either way it goes on from its last checkpoint.

  --nodes=N            nodes, each with one process
  --gpus=M             GPUs of each node
  --workdir=FOLDER     on a file system that all nodes see; the checkout must lie on one, too
  --time=LIMIT         of one job, as sbatch takes it (default 24:00:00)
  --name=NAME          of the job (default radit)
  --log=FILE           where the job writes, %j being its number (default NAME-%j.log)
  --python=PYTHON      default: .venv/bin/python of the checkout, with jax[cuda] installed (pip install -e '.[cuda]')
  --sbatch=OPTION      one more option of sbatch, e.g. --sbatch=--partition=gpu; may be given several times
  --dry-run            print the command and the batch script, and submit nothing

Prints the number of the job. Exit: 0 submitted, 2 bad usage, otherwise what sbatch says.
Example:
  launch/slurm.sh --nodes=8 --gpus=8 --workdir=/shared/runs/7b --sbatch=--partition=gpu -- --config=configs/lm_ft.py:llama_65b
TEXT
}

nodes='' gpus='' workdir='' time=24:00:00 name=radit log='' python='' extra=() dry=''
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --log=*) log=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --sbatch=*) extra+=("${1#*=}") ;;
    --dry-run) dry=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) wrong "unknown option '$1'; flags of train.py come after --" ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || wrong "--nodes=$nodes: expected a whole number from 1"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || wrong "--gpus=$gpus: expected a whole number from 1"
[[ $workdir ]] || wrong "--workdir=FOLDER is missing"

# One process is no cluster; of several, --distributed insists that they find each other.
together=()
((nodes == 1)) || together=(--distributed)

options() {
  printf '#SBATCH %s\n' "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" --exclusive "--time=$time" \
    --requeue --open-mode=append --signal=B:USR1@120 "--output=${log:-$name-%j.log}" "${extra[@]}"
}

# USR1, not TERM, announces the time limit: TERM is also what scancel sends, and a cancelled job is not to come back.
script() {
  cat <<SCRIPT
#!/usr/bin/env bash
$(options)
set -uo pipefail
cd $(quoted "$ROOT") || exit 1
told='' again='' run=''
trap 'told=1; \${run:+kill -TERM "\$run"}' TERM
trap 'told=1; again=1; \${run:+kill -TERM "\$run"}' USR1
srun --kill-on-bad-exit=1 --cpu-bind=none $(quoted "${python:-.venv/bin/python}" launch/train.py "${together[@]}" "--workdir=$workdir" "$@") &
run=\$!
[[ \$told ]] && kill -TERM "\$run"  # told before there was a run
status=0
wait "\$run" || status=\$?
# A signal ends the wait and not the run.
while [[ \$told ]]; do
  told=''
  status=0
  wait "\$run" || status=\$?
done
if [[ \$again ]] && ((status == 0)); then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
SCRIPT
}

if [[ $dry ]]; then
  printf '%s\n' "sbatch --parsable <<'SCRIPT'" "$(script "$@")" SCRIPT
else
  script "$@" | sbatch --parsable
fi

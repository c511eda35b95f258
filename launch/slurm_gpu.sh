#!/usr/bin/env bash
# Runs one experiment on GPUs of a SLURM cluster, a process for each, and again where it was preempted.
#
#   launch/slurm_gpu.sh [--dry-run] NODES GPUS CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   PARTITION=h100 HOURS=12 launch/slurm_gpu.sh 2 8 configs/llama31_8b.py /shared/run
#
# GPUS is of each node. WORKDIR and this checkout lie on storage that all nodes see; ACTIVATE (default
# .venv/bin/activate) sets up Python with `pip install '.[cuda]'`. Two minutes before its time is up SLURM sends
# SIGTERM: the run saves, ends with status 75, and is queued again. The log is WORKDIR/log.txt.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
eval "$(options "$@")"
[ $# -ge 4 ] || usage
nodes=$1 gpus=$2 config=$3 workdir=$4
shift 4
cd "$(dirname "$0")/.."
partition=()
[ -z "${PARTITION:-}" ] || partition=("--partition=$PARTITION")
command=(python -m ppow_jax.main "--config=$config" "--workdir=$workdir" --config.distributed=True "$@")
job="#!/usr/bin/env bash
. $(printf '%q' "${ACTIVATE:-.venv/bin/activate}")
srun --kill-on-bad-exit=0 $(printf '%q ' "${command[@]}")
status=\$?
[ \$status -ne 75 ] || scontrol requeue \$SLURM_JOB_ID
exit \$status"
run mkdir -p "$workdir"
echo "$job"
[ -n "$dry" ] || printf '%s\n' "$job" >"$workdir/job.sh"
run sbatch --job-name=ppow_jax "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
  "--time=${HOURS:-24}:00:00" --signal=TERM@120 --requeue --open-mode=append \
  "--output=$workdir/log.txt" "${partition[@]}" "$workdir/job.sh"

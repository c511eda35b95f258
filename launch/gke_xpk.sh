#!/usr/bin/env bash
# Runs one experiment on TPUs of a GKE cluster, as a workload of xpk.
#
#   launch/gke_xpk.sh [--dry-run] CLUSTER WORKLOAD IMAGE CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   TYPE=v5p-32 launch/gke_xpk.sh pods llama-ppow REGISTRY/ppow_jax:tpu configs/llama31_8b.py /mnt/shared/run
#
# IMAGE is made by `docker build -f launch/Dockerfile.tpu -t IMAGE .` and pushed to where the cluster pulls from.
# STORAGE is what `xpk storage` calls the shared volume that WORKDIR lies on.
# RESTARTS (default 10) is how often GKE starts the workload again; each time it goes on from its checkpoint.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
eval "$(options "$@")"
[ $# -ge 5 ] && [ -n "${TYPE:-}" ] || usage
cluster=$1 workload=$2 image=$3 config=$4 workdir=$5
shift 5
command=(python -m ppow_jax.main "--config=$config" "--workdir=$workdir" --config.distributed=True "$@")
storage=()
[ -z "${STORAGE:-}" ] || storage=("--storage=$STORAGE")
run xpk workload create "--cluster=$cluster" "--workload=$workload" "--docker-image=$image" \
  "--tpu-type=$TYPE" --num-slices=1 "--max-restarts=${RESTARTS:-10}" "${storage[@]}" \
  "--command=$(printf '%q ' "${command[@]}")"

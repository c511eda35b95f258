#!/usr/bin/env bash
# Runs one experiment on a Cloud TPU VM or on all workers of a pod slice, through gcloud.
#
#   launch/tpu_vm.sh [--dry-run] NAME ZONE CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   TYPE=v5p-16 launch/tpu_vm.sh my-tpu us-east5-a configs/llama31_8b.py /mnt/shared/run
#
# With TYPE the slice NAME is made first (VERSION: its software, SPOT=1: a spot one); without, it is there.
# WORKDIR lies on storage that all workers mount under the same path (Filestore, or a bucket by gcsfuse).
# The package is copied from here and installed on every worker; the log of each is /tmp/ppow_jax.log there.
# Every worker is one process of the same run. A preempted slice has saved itself: run the same line again.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
eval "$(options "$@")"
[ $# -ge 4 ] || usage
name=$1 zone=$2 config=$3 workdir=$4
shift 4
cd "$(dirname "$0")/.."
tpu=(gcloud compute tpus tpu-vm)
if [ -n "${TYPE:-}" ]; then
  spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  run "${tpu[@]}" create "$name" "--zone=$zone" "--accelerator-type=$TYPE" \
    "--version=${VERSION:-tpu-ubuntu2204-base}" "${spot[@]}"
fi
archive=$(mktemp -d)/ppow_jax.tar.gz
run tar -czf "$archive" --exclude=.venv setup.py pyproject.toml README.md LICENSE ppow_jax configs
run "${tpu[@]}" scp "$archive" "$name:/tmp/ppow_jax.tar.gz" "--zone=$zone" --worker=all
command=(python -m ppow_jax.main "--config=$config" "--workdir=$workdir" --config.distributed=True "$@")
there="set -e; mkdir -p ppow_jax && tar -xzf /tmp/ppow_jax.tar.gz -C ppow_jax && cd ppow_jax"
# the software of TPU VMs comes with a Python of its own, which may be too old
there+=" && python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 .venv"
there+=" && python3 -m uv pip install -q --python .venv/bin/python -e '.[tpu,hub,plots]'"
there+=" && . .venv/bin/activate"
there+=" && { nohup $(printf '%q ' "${command[@]}") >/tmp/ppow_jax.log 2>&1 & }"
run "${tpu[@]}" ssh "$name" "--zone=$zone" --worker=all "--command=$there"
echo "to watch: ${tpu[*]} ssh $name --zone=$zone --worker=0 --command='tail -f /tmp/ppow_jax.log'"

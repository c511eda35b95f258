#!/usr/bin/env bash
# Runs one experiment on this machine, in the background, and again if it dies.
#
#   launch/single_host.sh [--dry-run] CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   launch/single_host.sh configs/smollm2_135m.py /data/run --config.train.ppow.steps=200
#
# The log is WORKDIR/log.txt. A run goes on from its last checkpoint, so starting it again is always safe.
# TRIES (default 3) bounds the restarts after a crash. A mistake in the configuration (status 2) and a run that
# was asked to end (SIGTERM: it saves and ends with status 75) are not tried again.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
eval "$(options "$@")"
[ $# -ge 2 ] || usage
config=$1 workdir=$2
shift 2
cd "$(dirname "$0")/.."
command=(python -m ppow_jax.main "--config=$config" "--workdir=$workdir" "$@")
if [ -n "$dry" ]; then
  run mkdir -p "$workdir"
  run "${command[@]}"
  echo "in the background, at most ${TRIES:-3} times, log $workdir/log.txt"
  exit
fi
mkdir -p "$workdir"
again() {
  for try in $(seq "${TRIES:-3}"); do
    status=0
    "${command[@]}" || status=$?
    case $status in 0 | 2 | 75) exit "$status" ;; esac
    echo "try $try ended with status $status"
    sleep 5
  done
  exit "$status"
}
again >>"$workdir/log.txt" 2>&1 &
echo "process $!, log $workdir/log.txt"

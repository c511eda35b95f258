#!/usr/bin/env bash
# Runs one experiment on this machine, in the background, and again if it is stopped or dies.
#
#   launch/single_host.sh configs/smollm2_135m.py WORKDIR [--config.KEY=VALUE ...]
#
# The log is WORKDIR/log.txt. A run goes on from its last checkpoint, so starting it again is always safe.
# TRIES (default 3) bounds the restarts after a crash; a mistake in the configuration (status 2) is not retried.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
mkdir -p "$workdir"
cd "$(dirname "$0")/.."
again() {
  for try in $(seq "${TRIES:-3}"); do
    status=0
    python -m ppow_jax.main --config="$config" --workdir="$workdir" "$@" || status=$?
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then exit "$status"; fi
    echo "try $try ended with status $status"
    sleep 5
  done
  exit "$status"
}
again "$@" >>"$workdir/log.txt" 2>&1 &
echo "process $!, log $workdir/log.txt"

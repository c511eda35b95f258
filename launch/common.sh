# shellcheck shell=bash
# What the launchers share; sourced by them.

# The text at the top of a launcher, to stderr; then the end.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Takes a leading --dry-run; "$@" is set to the rest by: eval "$(options "$@")".
options() {
  if [ "${1:-}" = --dry-run ]; then
    echo 'dry=1; shift'
  else
    echo 'dry='
  fi
}

# Shows a command as it could be typed, and runs it unless this is a dry run.
run() {
  printf '+'
  printf ' %q' "$@"
  echo
  [ -n "${dry:-}" ] || "$@"
}

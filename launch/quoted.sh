# shellcheck shell=bash
# Sourced by tpu_pod.sh and slurm.sh.

# Words as one line that a shell reads back as the same words.
quoted() {
  local line='' word
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# One line on stderr, exit 2.
wrong() {
  echo "$(basename "$0"): $1 (--help lists the options)" >&2
  exit 2
}

#!/usr/bin/env bash
# A TPU pod slice by gcloud: asks for one (a queued resource), sets every host up, and runs one process
# on each. A slice that is preempted is asked for again, and the run goes on.
#
#   NAME=slice ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SPOT=1 \
#     train/launch/tpu_pod.sh --config train/recipes/llama3_8b_v5e_16.yaml \
#       --data.train gs://my-bucket/data.jsonl --train.output gs://my-bucket/runs/llama3_8b
#
# Call it from a clone, whose last commit the hosts get; its branch may have the recipe. Called again, it
# takes up what is there. VERSION is v2-alpha-tpuv5 for v5p and v2-alpha-tpuv6e for v6e. The slice stays
# until `gcloud compute tpus queued-resources delete NAME --zone ZONE --force`.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}"
tpus() { gcloud compute tpus "$@" --zone "$ZONE" --quiet; }
state() {
  tpus queued-resources list --filter "name~/$NAME\$" --format 'value(state.state)' || echo UNKNOWN
}
on_all() { tpus tpu-vm ssh "$NAME" --worker all --command "$1"; }
archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format tar.gz --output "$archive" HEAD

# shellcheck disable=SC2016 # $PATH, $PWD, $HOME and $USER are the host's
set_up() {
  tpus tpu-vm scp "$archive" "$NAME":genlora_jax.tar.gz --worker all &&
    # The hosts' own Python is older than the library needs.
    on_all 'mkdir -p genlora_jax && tar xzf genlora_jax.tar.gz -C genlora_jax && cd genlora_jax &&
      pip install --quiet --user uv && export PATH=~/.local/bin:$PATH &&
      { [ -d .venv ] || uv venv --quiet --python 3.12; } &&
      uv pip install --quiet --editable ".[train,tpu,gcs]"'
}

# A service of its own: a lost connection does not end it, and when the host is shut down it gets
# SIGTERM and time to save. While one runs, another cannot start.
# shellcheck disable=SC2016
run() {
  on_all 'cd genlora_jax && sudo systemd-run --quiet --wait --collect --unit genlora --uid "$USER" \
    --working-directory "$PWD" --setenv HOME="$HOME" --property TimeoutStopSec=90 \
    "$PWD"/.venv/bin/genlora finetune --train.distributed true --train.resume auto '"$arguments"
}

arguments=$(printf '%q ' "$@")
failures=0
while [ "$failures" -lt 5 ]; do
  case $(state) in
    ACTIVE)
      if set_up && run; then exit; fi
      failures=$((failures + 1))
      ;;
    "")
      tpus queued-resources create "$NAME" --node-id "$NAME" --accelerator-type "$TYPE" \
        --runtime-version "$VERSION" ${SPOT:+--spot}
      ;;
    SUSPENDED | FAILED)
      tpus queued-resources delete "$NAME" --force
      failures=0
      ;;
  esac
  sleep "${WAIT:-30}"
done
echo "gave up after $failures attempts on one slice: see logs/ in train.output" >&2
exit 1

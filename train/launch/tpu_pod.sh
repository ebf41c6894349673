#!/usr/bin/env bash
# A TPU pod slice over gcloud: makes it, sets every host up, and runs one process on each.
#
#   NAME=slice ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=gs://my-bucket \
#     train/launch/tpu_pod.sh train/recipes/llama3_8b_v5e_16.yaml
#
# The hosts find one another through the TPU's metadata. The bucket holds the data and the runs, and
# must be reachable by all of them: it is mounted as ./bucket, so give paths below it. Call it again
# with --train.resume true after a preemption.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${BUCKET:?}"
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "$1"; }

gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" > /dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
    --version "${VERSION:-v2-alpha-tpuv5-lite}"
gcloud compute tpus tpu-vm scp --recurse --zone "$ZONE" --worker all . "$NAME":genlora_jax
on_all "cd genlora_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[train,tpu]'"
on_all "cd genlora_jax && mkdir -p bucket && (mountpoint -q bucket || gcsfuse ${BUCKET#gs://} bucket)"
on_all "cd genlora_jax && .venv/bin/python train/finetune.py --config $* --train.distributed true"

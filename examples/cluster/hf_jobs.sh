#!/bin/bash
# Parts on Hugging Face Jobs: `hf_jobs.sh IMAGE BUCKET`, with jobs.yaml, inputs by hf:// and outputs in a bucket that all
# jobs mount. IMAGE is built from the Dockerfile beside this file and lies where HF can pull it. When all have ended
# (`hf jobs ps`), run it with a third word, finish.
set -euo pipefail
image=${1:?an image} bucket=${2:?org/bucket} what=${3:-parts}
count=8
start() {
    hf jobs run --detach --flavor cpu-upgrade --timeout 6h --secrets HF_TOKEN \
        --volume "hf://buckets/$bucket:/shared" "$image" sh -c "cd /shared && $1"
}

if [ "$what" = finish ]; then
    start "safeshard finish jobs.yaml"
else
    for part in $(seq "$count"); do
        start "safeshard batch jobs.yaml --part $part/$count --memory 4GiB"
    done
fi

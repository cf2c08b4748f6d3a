#!/bin/bash
# Parts on a Ray cluster, from one of its nodes: `ray.sh jobs.yaml`, in a folder that all nodes share. Without a cluster
# Ray is started on this machine, where every GPU does parts of its own. Needs `pip install 'safeshard[ray]'` on each.
set -euo pipefail
exec safeshard batch "${1:?the jobs file}" --engine ray --memory 4GiB

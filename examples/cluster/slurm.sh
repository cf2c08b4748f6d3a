#!/bin/bash
# Submit with `sbatch slurm.sh jobs.yaml`, in a folder that all nodes share. Eight tasks do a part each; the last line of
# the first submits what puts them together. A task that was preempted is queued again and goes on from its journal.
#SBATCH --job-name=safeshard
#SBATCH --array=1-8
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=safeshard-%A-%a.log
# One GPU a part, where there are some:
##SBATCH --gpus-per-task=1
set -euo pipefail
jobs=${1:?the jobs file}

if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ] && [ -z "${SLURM_RESTART_COUNT:-}" ]; then
    sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" --job-name=safeshard-finish --mem=8G \
        --wrap="safeshard finish '$jobs'"
fi
# exec, so that the signal 120 seconds before the end reaches it, and it writes down what it has
exec safeshard batch "$jobs" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --memory 4GiB

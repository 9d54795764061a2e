#!/bin/bash
#SBATCH --job-name=qvera
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1            # one `qvera launch` on each node, which starts a process for each of its GPUs
#SBATCH --gpus-per-node=4
#SBATCH --signal=TERM@120              # two minutes' notice before the time is up: all ranks save, and end with 75
#SBATCH --requeue
#SBATCH --open-mode=append

recipe=${1:?usage: sbatch slurm.sh RECIPE RUN_DIRECTORY}
run=${2:?usage: sbatch slurm.sh RECIPE RUN_DIRECTORY}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
options=(--nnodes "$SLURM_NNODES" --rdzv "$head:29500" --gpus "${SLURM_GPUS_ON_NODE:-1}" --set "training.output_dir=$run")
[ -e "$run/recipe.yaml" ] && options+=(--resume)

# SLURM_NODEID is each task's own, so it is read there and not here
srun bash -c 'exec qvera launch "$@" --node-rank "$SLURM_NODEID"' launch "$recipe" "${options[@]}"
status=$?

# interrupted, and saved: the job goes back into the queue, and on from there
[ "$status" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"

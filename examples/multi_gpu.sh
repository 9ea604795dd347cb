#!/usr/bin/env bash
# Train on all GPUs of this machine: one process per GPU, one loss over the pairs of all, gradients averaged (DDP).
#
#     examples/multi_gpu.sh                                      a trial with digits; without a GPU on two CPU processes
#     examples/multi_gpu.sh --data 'shards/{0000..0999}.tar' --model ViT-B-32 --precision bf16 --batch-size 32768 \
#         --micro-batch 512 --output runs/b32                    any options of `fastclip train`
#     PROCESSES=4 examples/multi_gpu.sh ...                      on four GPUs
#
# On several machines, run the same command on each, with torchrun's --nnodes, --node-rank and --rdzv-endpoint in place
# of --standalone. --batch-size counts the pairs of all processes together. If the model is too large for a GPU, add
# --parallel fsdp. If the features of all processes are too large, add --comm ring. To resume a run, add --resume auto.
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
if (($# == 0)); then
    set -- --data digits --val-data digits --model ViT-tiny --context-length 16 --loss unicl --lr 1e-3 \
        --batch-size 64 --max-steps 20 --workers 1 --output "runs/multi-gpu/$(date +%Y%m%d-%H%M%S)"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # per process; torchrun would choose 1, too, with a warning

echo "$processes processes on $gpus GPUs: fastclip train $*" >&2
exec torchrun --standalone --nproc-per-node "$processes" --no-python fastclip train "$@"

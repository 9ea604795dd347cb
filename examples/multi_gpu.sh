#!/usr/bin/env bash
# Train on all GPUs of this machine: a process each, one loss over all their pairs, gradients averaged (DDP).
#
#     examples/multi_gpu.sh                                      the digits, to try it; on two CPU processes without a GPU
#     examples/multi_gpu.sh --data 'shards/{0000..0999}.tar' --model ViT-B-32 --precision bf16 --batch-size 32768 \
#         --micro-batch 512 --output runs/b32                    any options of `fastclip train`
#     PROCESSES=4 examples/multi_gpu.sh ...                      on four of them
#
# On several machines, the same on each, with --nnodes, --node-rank and --rdzv-endpoint of torchrun in place of
# --standalone. --batch-size is that of all processes together. Where the model is too large for a GPU:
# --parallel fsdp; where the features of all are too many: --comm ring. Started again with --resume auto, a run goes on.
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
if (($# == 0)); then
    set -- --data digits --val-data digits --model ViT-tiny --context-length 16 --loss unicl --lr 1e-3 \
        --batch-size 64 --max-steps 20 --workers 1 --output "runs/multi-gpu/$(date +%Y%m%d-%H%M%S)"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # of each process; torchrun would choose 1 too, and warn

echo "$processes processes on $gpus GPUs: fastclip train $*" >&2
exec torchrun --standalone --nproc-per-node "$processes" --no-python fastclip train "$@"

#!/usr/bin/env bash
# The field on the embedded model: exact, fewer steps, our plans and everybody's peers on one task, under one protocol.
#   benchmarks/bench_world.sh world-short@1 OUT --jobs 5 ...   all clips and metrics (a GPU; minutes)
#   benchmarks/bench_world.sh world-smoke@1 OUT --no-quality ...    wall time in turns (a CPU; an hour)
# CONTENDERS=few takes one setting of each family instead of the sweeps.
set -euo pipefail
task=$1 out=$2
shift 2
plans=benchmarks/plans
few=(
  --steps 18 --plan near-exact --plan fast
  --peer diffusers.mag_cache@threshold=0.12 --peer diffusers.first_block_cache@threshold=0.08
  --peer diffusers.sea_cache@threshold=0.15 --peer diffusers.taylorseer@interval=3
  --peer cache_dit.dbcache@threshold=0.12 --peer cache_dit.steps_mask@policy=medium
  --steps 8 --peer diffusers.pab_branchwise@spatial=3 --peer diffusers.taylorseer_lite@interval=3
  --plan "$plans/first-block-cache.yaml@first_block_cache.threshold=0.08"
)
all=(
  --steps 36 --steps 25 --steps 18 --steps 13 --steps 8 --plan near-exact --plan fast
  --plan "$plans/first-block-cache.yaml@first_block_cache.threshold=0.05"
  --plan "$plans/first-block-cache.yaml@first_block_cache.threshold=0.12"
  --peer diffusers.mag_cache@threshold=0.06 --peer diffusers.mag_cache@threshold=0.24
  --peer diffusers.taylorseer@interval=2 --peer diffusers.taylorseer@interval=4
  --peer diffusers.taylorseer_lite@interval=3
  --peer diffusers.pab_branchwise@spatial=3
  --peer diffusers.faster_cache_branchwise@spatial=3
  --peer cache_dit.steps_mask@policy=slow --peer cache_dit.steps_mask@policy=fast
  --peer sageattention.int8 --peer fastvideo.vsa@keep=0.25
  --peer diffusers.first_block_cache@threshold=0.05 --peer diffusers.first_block_cache@threshold=0.12
  --peer diffusers.sea_cache@threshold=0.1 --peer diffusers.sea_cache@threshold=0.3
  --peer cache_dit.dbcache@threshold=0.05 --peer cache_dit.dbcache@threshold=0.12
  --peer cache_dit.taylorseer@threshold=0.12
)
if [ "${CONTENDERS:-all}" = few ]; then chosen=("${few[@]}"); else chosen=("${all[@]}"); fi
exec ${VIVACE:-vivace} bench --task "$task" --out "$out" "${chosen[@]}" "$@"

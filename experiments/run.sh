#!/usr/bin/env bash
# The runs behind README.md, two at a time, on one thread each: experiments/run.sh [PART ...]
# What is there is skipped, and what was interrupted goes on. Then: python experiments/tables.py
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/experiments
mkdir -p $out

# Each function prints commands. A run is done when its log has scores.
run() {  # NAME SCRIPT FLAGS: for seeds 0, 1, 2
  local name=$1 script=$2
  shift 2
  for seed in 0 1 2; do
    local dir=$out/$name-s$seed
    echo "grep -qs accuracy $dir/log.csv || python $script --out $dir --seed $seed $*"
  done
}
cfg() {  # NAME SCALE: the runs of that name, drawn with CFG on top
  for seed in 0 1 2; do
    local file=$out/$1-cfg$2-s$seed
    local draw="python sample.py $out/$1-s$seed/ckpt.pt --seed $seed --cfg $2 --out $file.npz"
    draw+=" --num-samples 2000 --class-labels balanced --steps 50 --batch 500"
    echo "test -s $file.md || ($draw && python fid.py $file.npz digits > $file.md)"
  done
}

sparse() {  # guidance for a share of the samples
  run sit-plain train_sit_mg.py --w 1
  for p in 1 0.5 0.25 0.125; do
    for teacher in ema online; do
      run sit-$teacher-p$p train_sit_mg.py --teacher $teacher --guide-share $p
    done
  done
  for p in 1 0.25; do
    for teacher in ema online; do
      for w in 1.25 1.75; do
        run sit-$teacher-p$p-w$w train_sit_mg.py --teacher $teacher --guide-share $p --w $w
      done
    done
  done
}
sparse_dit() {
  run dit-plain train_dit_mg.py --w 1
  for teacher in ema online; do
    for p in 1 0.25; do
      run dit-$teacher-p$p train_dit_mg.py --teacher $teacher --guide-share $p
    done
  done
}
sparse_t() {  # where the authors guide
  for teacher in ema online; do
    for p in 1 0.25; do
      run sit-$teacher-p$p-t.75 train_sit_mg.py --teacher $teacher --guide-share $p --t-max 0.75
    done
  done
}
price() {  # quality at equal price: the steps that some plain steps pay for
  for steps in 400 800 1600; do
    run price-plain-$steps train_sit_mg.py --w 1 --steps $steps
    run price-ema-$steps train_sit_mg.py --steps $((steps * 100 / 158))
    run price-online-$steps train_sit_mg.py --teacher online --steps $((steps * 100 / 129))
    run price-quarter-$steps train_sit_mg.py --teacher online --guide-share 0.25 \
      --steps $((steps * 100 / 108))
  done
}
price_cfg() {
  for steps in 400 800 1600; do cfg price-plain-$steps 2; done
}
gft() {  # Guidance-free training's own loss beside online MG
  run gft experiments/gft.py
  run gft-alike experiments/gft.py --guide-share 0.5  # see gft.py: dropped samples weighted alike
}

for part in ${*:-sparse sparse_dit sparse_t price price_cfg gft}; do
  $part | xargs -d '\n' -P 2 -I{} bash -c '{}' 2>&1 | grep -v step/s || true
done

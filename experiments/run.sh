#!/usr/bin/env bash
# The runs of experiments/README.md, two at a time, one thread each: experiments/run.sh [PART ...]
# What has rows in experiments/results.csv is skipped, and what was interrupted goes on. Then: python
# experiments/tables.py. Progress bars and errors go to out/experiments/stderr.txt.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/experiments
mkdir -p $out
declare -A trained  # the command that makes a run's checkpoint, also where results.csv alone is left

# Each function prints commands, one a line.
once() {  # MARK COMMAND: unless it has run to its end
  echo "test -e $1 || ($2 && touch $1) || echo FAILED: $1"
}
scored() {  # RUN COMMAND: unless results.csv has its scores, which it then gets; RUN: NAME-sSEED
  grep -q "^${1%-s*},${1##*-s}," experiments/results.csv ||
    echo "$2 && python experiments/tables.py keep $1 || echo FAILED: $1"
}
run() {  # NAME SCRIPT FLAGS: for seeds 0, 1, 2, or $seeds; from=NAME: with that run's --init
  local name=$1 script=$2
  shift 2
  for seed in ${seeds:-0 1 2}; do
    local dir=$out/$name-s$seed first= init=
    if [ "${from:-}" ]; then
      first="${trained[$from-s$seed]:-true} && "
      init="--init $out/$from-s$seed/ckpt.pt"
    fi
    local train="python $script --out $dir --seed $seed --eval-batch 200 $init $*"
    train="flock $dir.lock sh -c 'test -e $dir/done || ($train && touch $dir/done)'"
    trained[$name-s$seed]=$first$train
    scored $name-s$seed "${trained[$name-s$seed]}"
  done
}
draw() {  # NAME SUFFIX FLAGS: sample sets of that run, NAME-SUFFIX-s0, ..., scored; real: its data
  local name=$1 suffix=$2
  shift 2
  for seed in ${seeds:-0 1 2}; do
    local file=$out/$name-$suffix-s$seed
    local command="${trained[$name-s$seed]:-true} && python sample.py $out/$name-s$seed/ckpt.pt"
    command+=" --out $file.npz --num-samples 2000 --class-labels balanced --steps 50 --batch 200"
    command+=" --seed $seed $* && python fid.py $file.npz ${real:-digits} > $file.tmp"
    command+=" && mv $file.tmp $file.md"
    scored $name-$suffix-s$seed "$command"
  done
}

# ---------------------------------------------------------------- MG beside CFG, at the presets
quality() {
  run preset-plain train_sit_mg.py --w 1
  for w in 1.1 1.25 1.4 1.5 1.6 1.75; do run preset-w$w train_sit_mg.py --w $w; done
  run preset-quarter train_sit_mg.py --teacher online --guide-share 0.25
}
quality_cfg() {  # at its best scale, which has to be looked for; and in an interval
  for cfg in 1.25 1.5 1.75 2 2.5 3; do draw preset-plain cfg$cfg --cfg $cfg; done
  for cfg in 2 3; do
    draw preset-plain cfg$cfg-low --cfg $cfg --interval 0 0.75
    draw preset-plain cfg$cfg-mid --cfg $cfg --interval 0.25 0.75
  done
}
quality_dit() {
  run dit-preset-plain train_dit_mg.py --w 1
  for w in 1.25 1.4 1.5 1.6 1.75; do run dit-preset-w$w train_dit_mg.py --w $w; done
  run dit-preset-quarter train_dit_mg.py --teacher online --guide-share 0.25
}
quality_dit_cfg() {
  for cfg in 1.5 1.75 2 2.5; do draw dit-preset-plain cfg$cfg --cfg $cfg; done
}

# ---------------------------------------------------------------- network passes per image
passes() {  # plain, CFG and MG at several scales; Heun of N steps calls the network 2N - 1 times
  local seeds=0
  for sampler in euler-maruyama euler; do
    for steps in 8 12 16 24 50 100 200; do
      for name in preset-plain preset-w1.4; do
        draw $name $sampler$steps --sampler $sampler --steps $steps
      done
    done
    for steps in 4 6 8 12 25 50 100; do
      draw preset-plain cfg1.75-$sampler$steps --cfg 1.75 --sampler $sampler --steps $steps
    done
    for steps in 8 12 16 24 50; do  # what is best may change with few steps
      for w in 1.25 1.5; do draw preset-w$w $sampler$steps --sampler $sampler --steps $steps; done
      for cfg in 1.5 2; do
        draw preset-plain cfg$cfg-$sampler$((steps / 2)) --cfg $cfg --sampler $sampler \
          --steps $((steps / 2))
      done
    done
  done
  for steps in 4 6 8 12 25 50 100; do
    for name in preset-plain preset-w1.4; do
      draw $name heun$steps --sampler heun --steps $steps
    done
  done
  for steps in 2 3 4 6 13 25 50; do
    draw preset-plain cfg1.75-heun$steps --cfg 1.75 --sampler heun --steps $steps
  done
}
passes_dit() {
  local seeds=0
  for steps in 8 12 16 25 50 100 200; do
    draw dit-preset-plain ddpm$steps --steps $steps
    draw dit-preset-w1.5 ddpm$steps --steps $steps
  done
  for steps in 4 6 8 12 25 50 100; do
    draw dit-preset-plain cfg2-ddpm$steps --cfg 2 --steps $steps
  done
}

# ---------------------------------------------------------------- fine-tuning plain networks
tune() {  # FROM NAME W: that run's networks tuned, w = 2 - 1 / the best scale of their CFG
  local from=$1
  for steps in 25 50 100 200 400; do
    run $2-ema$steps train_sit_mg.py --w $3 --steps $steps
    run $2-quarter$steps train_sit_mg.py --w $3 --teacher online --guide-share 0.25 --steps $steps
  done
}
finetune() {  # best scale 1.75
  tune preset-plain fine400 1.43
}
finetune_late() {  # best scale 1.1
  tune plain2400 fine2400 1.09
  local from=plain2400
  for steps in 50 100; do  # at a quarter of the learning rate
    run fine2400-slow$steps train_sit_mg.py --w 1.09 --lr 1e-3 --steps $steps
    run fine2400-slowplain$steps train_sit_mg.py --w 1 --lr 1e-3 --steps $steps
  done
}

# ---------------------------------------------------------------- FD by steps, of DiT
steps_dit() {
  for w in 1 1.25 1.5; do
    run dit-steps-w$w train_dit_mg.py --w $w --steps 1600 --eval-every 100
  done
  run dit-steps-quarter train_dit_mg.py --teacher online --guide-share 0.25 --steps 1600 \
    --eval-every 100
}

# ---------------------------------------------------------------- guidance for a share
# preset-w... are the EMA teacher with P = 1, preset-quarter is the online one with P = 1/4.
sparse() {
  for p in 1 0.25 0.125; do
    for w in 1.25 1.5 1.75; do
      if [ $p != 1 ]; then
        run ema-p$p-w$w train_sit_mg.py --guide-share $p --w $w
      fi
      if [ $p-$w != 0.25-1.5 ]; then
        run online-p$p-w$w train_sit_mg.py --teacher online --guide-share $p --w $w
      fi
    done
  done
}
sparse_dit() {
  run dit-ema-p0.25-w1.5 train_dit_mg.py --guide-share 0.25
  run dit-online-p1-w1.5 train_dit_mg.py --teacher online
}
sparse_t() {  # where the authors guide
  for teacher in ema online; do
    for p in 1 0.25; do
      run $teacher-p$p-t.75 train_sit_mg.py --teacher $teacher --guide-share $p --t-max 0.75
    done
  done
}
gft() {  # Guidance-free training's own loss beside online MG
  run gft experiments/gft.py
  run gft-alike experiments/gft.py --alike
}
board() {
  for seed in 0 1 2; do echo "python experiments/board.py $seed > /dev/null"; done
}

# ---------------------------------------------------------------- FD by the price of training
curves() {
  for w in 1.25 1.5; do
    run steps-w$w train_sit_mg.py --w $w --steps 800 --eval-every 200
    run steps-quarter$w train_sit_mg.py --w $w --teacher online --guide-share 0.25 --steps 800 \
      --eval-every 200
  done
}
curves_plain() {
  for seed in 0 1 2; do  # one run, and its checkpoints on the way, plain400-s0, ...
    local plain=$out/curve-plain-s$seed command=true
    for steps in 400 800 1600 2400; do
      local copy=$out/plain$steps-s$seed
      command+=" && (test -e $copy/ckpt.pt || (mkdir -p $copy && python train_sit_mg.py --w 1"
      command+=" --seed $seed --out $plain --eval-every 400 --eval-batch 200 --steps $steps"
      command+=" && cp $plain/ckpt.pt $copy/tmp && mv $copy/tmp $copy/ckpt.pt))"
    done
    command="flock $plain.lock sh -c '$command'"
    for steps in 400 800 1600 2400; do trained[plain$steps-s$seed]=$command; done
    scored curve-plain-s$seed "$command"
  done
}
curves_cfg() {
  for cfg in 1.1 1.25 1.5; do draw plain2400 cfg$cfg --cfg $cfg; done
  for cfg in 1.25 1.5 1.75; do draw plain1600 cfg$cfg --cfg $cfg; done
  for cfg in 1.5 1.75 2; do draw plain800 cfg$cfg --cfg $cfg; done
}

# ---------------------------------------------------------------- the paper's tables and figures
table3() {  # auto moves on 500 samples
  local auto="--eval-every 50 --eval-samples 500"
  run ema-auto-paper train_sit_mg.py --w auto-paper $auto
  for teacher in ema online; do
    run $teacher-p1-w2 train_sit_mg.py --teacher $teacher --w 2
    run $teacher-auto train_sit_mg.py --teacher $teacher --w auto $auto
  done
}
table3_draw() {
  for name in ema-auto-paper ema-auto online-auto; do draw $name 2000; done
}
table4() {
  for drop in 0.05 0.15 0.2; do run sit-drop$drop train_sit_mg.py --drop $drop; done
}
table5() {  # one network for all scales; those of `quality` have one each
  run range train_sit_mg.py --w-range 1 3
}
table5_draw() {
  for w in 1 1.33 2 3; do draw range w$w --w $w; done
}
table6() {
  for n in 1 2 4 9; do run sit-labels$n train_sit_mg.py --num-labels $n; done
  for w in 1.35 1.45; do run sit-labels1-w$w train_sit_mg.py --num-labels 1 --w $w; done
}
fig4() {  # CFG on top of MG
  for cfg in 1.1 1.25 1.5; do
    for w in 1.25 1.5; do draw preset-w$w cfg$cfg --cfg $cfg; done
  done
}
late() {  # six times the steps, where guidance hardly helps
  for w in 1.1 1.25; do run late-w$w train_sit_mg.py --w $w --steps 2400; done
  run late-fall1.5 experiments/fall.py --w 1.5 --steps 2400
}
late_auto() {
  for teacher in ema online; do
    run late-$teacher-auto train_sit_mg.py --teacher $teacher --w auto --eval-every 100 \
      --eval-samples 500 --steps 2400
  done
}
late_auto_draw() {
  for teacher in ema online; do draw late-$teacher-auto 2000; done
}

# ---------------------------------------------------------------- another data set: MNIST
mnist_images() {
  local command="python experiments/mnist.py out/mnist"
  command+=" && python data.py out/mnist --size 28 --vae none --no-flip --out out/mnist-28"
  once out/mnist-28.done "$command"
}
mnist() {  # half of the preset's steps, one seed, 500 samples
  local seeds=0 flags="--data out/mnist-28 --eval-samples 500 --steps 4000"
  run mnist-plain train_sit_mg.py $flags --w 1
  run mnist-quarter train_sit_mg.py $flags --teacher online --guide-share 0.25
  run mnist-ema train_sit_mg.py $flags
}
mnist_cfg() {
  local seeds=0 real=out/mnist-28
  for cfg in 2 3 4; do draw mnist-plain cfg$cfg --cfg $cfg --num-samples 500; done
}
mnist_finetune() {  # best scale 3
  local seeds=0 from=mnist-plain
  for steps in 250 500 1000; do
    run mnist-fine$steps train_sit_mg.py --data out/mnist-28 --eval-samples 500 --teacher online \
      --guide-share 0.25 --w 1.67 --steps $steps
  done
  run mnist-fineplain500 train_sit_mg.py --data out/mnist-28 --eval-samples 500 --w 1 --steps 500
}

parts="quality quality_cfg passes finetune quality_dit quality_dit_cfg passes_dit curves_plain
  curves_cfg curves finetune_late steps_dit sparse sparse_dit sparse_t gft board table3
  table3_draw table4 table5 table5_draw table6 fig4 late late_auto late_auto_draw
  mnist_images mnist mnist_cfg mnist_finetune"
for part in $parts; do $part > /dev/null; done  # each run's command is known
for part in ${*:-$parts}; do
  declare -F "$part" > /dev/null || { echo "$part: no such part; there are $parts"; exit 2; }
  $part | xargs -d '\n' -P 2 -I{} bash -c '{}' 2>> $out/stderr.txt
done

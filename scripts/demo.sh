#!/usr/bin/env bash
# The main job on the embedded default, in minutes on two CPU cores and offline:
# micro world -> micro base -> SFT with latent spans, SFT on text only -> from the latent SFT, LA-DAPO on verl and DAPO
# without latent terms -> futurebench for all five -> table and pictures.
# Each line is what a user runs by hand. A broken-off demo goes on where it was.
# OUT=folder puts it elsewhere; SEED, TEST, TRAIN, STEPS, RL_STEPS and RL (more overrides) change the training and sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/demo}
SEED=${SEED:-0} TEST=${TEST:-480} TRAIN=${TRAIN:-3000} STEPS=${STEPS:-} RL_STEPS=${RL_STEPS:-30} RL=${RL:-}
export HF_HUB_OFFLINE=1

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

say "micro world: $TEST test questions, $TRAIN training records, 1024 questions for RL"
future-l1 world "$OUT/world" --test "$TEST" --train "$TRAIN" --seed 0
future-l1 world "$OUT/rl_world" --test 1024 --train 0 --seed 7

if [ ! -f "$OUT/start/config.json" ]; then
  say "micro base: sees, but was never shown a future; a fresh latent head for SFT to start from"
  rm -rf "$OUT/base"
  future-l1 tiny "$OUT/base" --pretrained
  future-l1 convert "$OUT/base" "$OUT/start" --system-prompt "" --dtype float32 \
    --set use_projection_head=true --set projection_head_type=lvr --set fixed_latent_budget=true
fi

settings=(model="$OUT/start" data.records="$OUT/world/sft.json" data.videos="$OUT/world/videos" train.seed="$SEED")
[ -n "$STEPS" ] && settings+=(train.max_steps="$STEPS")

say "SFT with latent spans (seed $SEED)"
scripts/sft.sh recipes/sft_micro.yaml output="$OUT/latent" "${settings[@]}"

say "SFT on text only: the same records and steps, future frames left out"
scripts/sft.sh recipes/ablations/sft_micro_text.yaml output="$OUT/text" "${settings[@]}"

rl() { # name, then what it adds to the recipe
  if [ "$(cat "$OUT/$1/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$RL_STEPS" ]; then
    echo "$OUT/$1 has its $RL_STEPS steps"
    return
  fi
  # shellcheck disable=SC2086
  python -m verl.trainer.main_ppo --config-dir recipes --config-name la_dapo_micro out="$OUT" \
    data.seed="$SEED" actor_rollout_ref.rollout.seed="$SEED" trainer.total_training_steps="$RL_STEPS" "${@:2}" $RL
}

say "LA-DAPO from the latent SFT, on verl"
rl la_dapo
say "DAPO without latent terms, from the same start"
rl dapo +ablations=dapo

export FUTUREBENCH_DATA="$OUT/world/futurebench.json" FUTUREBENCH_VIDEO_DIR="$OUT/world/videos"
for name in base text latent dapo la_dapo; do
  say "futurebench: $name"
  case $name in
    base) model="$OUT/base" ;;
    *dapo) model="$OUT/$name/global_step_$RL_STEPS/actor/huggingface" ;;
    *) model="$OUT/$name/final" ;;
  esac
  lmms-eval --model future_l1 --model_args "pretrained=$model,responses=$OUT/$name/responses.jsonl" \
    --tasks futurebench --batch_size 48 --gen_kwargs max_new_tokens=128 \
    --output_path "$OUT/$name/eval" --log_samples
done

say "report"
future-l1 report "$OUT"

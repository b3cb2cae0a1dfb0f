#!/usr/bin/env bash
# The small T5 1.1 family, from a folder of text shards to backbones: every stage is one command of
# `softprompt`, with fixed seeds. A stage that was interrupted goes on where it stopped; a finished one
# is left alone.
#
#   benchmarks/family.sh CORPUS FAMILY [SIZE …]     # sizes: nano embedded mini
#   CPU_DEVICES=2 benchmarks/family.sh …            # on two cores a quarter faster
#
# CORPUS holds train*.jsonl[.gz|.xz|.zst] and validation*.jsonl with a field 'text'. FAMILY/SIZE/ gets
# pretrain/ (span corruption) and lm_adapt/ (prefix LM, kept at 10%, 50% and 100% of its steps), each
# with a backbone/. The embedded default is embedded/pretrain/backbone as int8:
#
#   softprompt convert FAMILY/embedded/pretrain/backbone OUTPUT --to softprompt --dtype int8
set -euo pipefail
corpus=$1 family=$2
shift 2
[ $# -gt 0 ] || set -- nano embedded mini
declare -A width=([nano]=128 [embedded]=256 [mini]=512)
# Steps of the two stages, of 8,256 and 8,192 tokens each.
declare -A steps=([nano]="2000 250" [embedded]="2000 250" [mini]="500 60")
mkdir -p "$family"
vocabulary=$family/spiece.model
[ -f "$vocabulary" ] || softprompt vocabulary "$corpus"/train*.jsonl* --output="$vocabulary"

for size in "$@"; do
  read -r pretrain lm <<<"${steps[$size]}"
  embeddings=$family/embeddings_${width[$size]}.npy
  [ -f "$embeddings" ] || softprompt embeddings "$corpus"/train*.jsonl* \
    --vocabulary_file="$vocabulary" --width="${width[$size]}" --output="$embeddings"
  folder=$family/$size
  run() { # stage, run file, then flags
    [ -d "$folder/$1/backbone" ] || softprompt train --gin_file="models/t5_1_1_$size.gin" \
      --gin_file="runs/$2.gin" --gin.CORPUS="$corpus" --gin.DTYPE=bfloat16 \
      --cpu_devices="${CPU_DEVICES:-1}" \
      --gin.MODEL_DIR="$folder/$1" "${@:3}"
    [ -d "$folder/$1/backbone" ] || { echo "$folder/$1 was interrupted: the same command goes on"; exit 1; }
  }
  run pretrain pretrain_small --gin.VOCABULARY_FILE="$vocabulary" --gin.EMBEDDINGS_FILE="$embeddings" \
    --gin.TRAIN_STEPS="$pretrain"
  run lm_adapt lm_adapt_small --gin.INITIAL_CHECKPOINT_PATH="$folder/pretrain/backbone" \
    --gin.TRAIN_STEPS="$lm" --gin.EVAL_PERIOD=$((lm / 10)) \
    --gin.BACKBONE_STEPS="($((lm / 10)), $((lm / 2)), $lm)"
done

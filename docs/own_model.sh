#!/usr/bin/env bash
# Takes a model through SFT, reward model, PPO, DPO, sampling and evaluation on a file of comparisons.
#
#     bash docs/own_model.sh MODEL COMPARISONS OUT
#
# MODEL is a folder in Hugging Face format, or `tiny` for a small model with random weights. COMPARISONS is a file in any
# of the forms of docs/data.md. Every command reads the output of earlier ones in OUT; a command whose results exist is
# skipped, and an interrupted one is resumed, so the script can be started again. Run it in a clone of the repository.
#
# Variables: QUICK=1 takes few short steps, to try the script; DTYPE=bfloat16 is faster on a GPU or TPU.
set -euo pipefail
model=$1 comparisons=$2 out=$3
compute=(--compute.dtype "${DTYPE:-float32}")
sft=() preferences=() ppo=() sampling=()
if [[ -n ${QUICK:-} ]]; then
    sft=(--steps 4 --batch 4 --data.width 128)
    preferences=(--steps 4 --batch 4 --data.prompt-width 96 --data.response-width 32)
    ppo=(--ppo.iterations 2 --ppo.batch 8 --max-new-tokens 16 --prompt-width 96)
    sampling=(--max-new-tokens 16 --prompt-width 96 --limit 16)
fi

stage() { # NAME COMMAND FLAGS...: runs a command with the output folder OUT/NAME, unless it is done
    local name=$1 command=$2
    shift 2
    [[ -e $out/$name/results.json ]] && return
    if [[ -n $(find "$out/$name/checkpoints" -type f -print -quit 2> /dev/null) ]]; then
        python "experiments/$command" --resume "$out/$name"
    else
        python "experiments/$command" --out "$out/$name" "$@"
    fi
}

# Three parts: training, a second reward model that only judges, and prompts for the evaluation. Comparisons with the
# same first question are in the same part.
mkdir -p "$out"
[[ -e $out/test.jsonl ]] || python - "$comparisons" "$out" <<'END'
import hashlib, json, pathlib, sys
from rlhf_jax.data import errors, records, sources

lines = {"train": [], "judge": [], "test": []}
for record in sources.raw_records(sys.argv[1]):
    try:
        prompt = records.parse_ranking(record.fields).prompt
    except errors.UnusableRecord:
        continue  # the commands would drop and count it
    question = next(turn.text for turn in prompt if turn.role == "user")
    tenth = hashlib.sha256(question.encode()).digest()[0] % 10
    lines["test" if tenth == 0 else "judge" if tenth < 4 else "train"].append(json.dumps(record.fields) + "\n")
for name, part in lines.items():
    (pathlib.Path(sys.argv[2]) / f"{name}.jsonl").write_text("".join(part))
END

stage sft sft.py --model "$model" --data.path "$out/train.jsonl" "${compute[@]}" "${sft[@]}"
stage reward_model reward_model.py --model "$out/sft" --data.path "$out/train.jsonl" "${compute[@]}" "${preferences[@]}"
stage judge reward_model.py --model "$out/sft" --data.path "$out/judge.jsonl" "${compute[@]}" "${preferences[@]}"
stage ppo ppo.py --policy "$out/sft" --reward-model "$out/reward_model" --prompts "$out/train.jsonl" \
    "${compute[@]}" "${ppo[@]}"
stage dpo dpo.py --model "$out/sft" --data.path "$out/train.jsonl" "${compute[@]}" "${preferences[@]}"
[[ -e $out/samples.jsonl ]] || python experiments/sample.py --model "$out/ppo" --prompts "$out/test.jsonl" \
    --out "$out/samples.jsonl" "${compute[@]}" "${sampling[@]}"
[[ -e $out/evaluation/results.json ]] || {
    rm -rf "$out/evaluation"
    python experiments/evaluate.py --policies "$out/sft" "$out/ppo" "$out/dpo" --prompts "$out/test.jsonl" \
        --reward-model "$out/judge" --out "$out/evaluation" "${compute[@]}" "${sampling[@]}"
}

# The table of all stages.
python - "$out" <<'END'
import json, pathlib, sys
from rich import box
from rich.console import Console
from rich.table import Table

out = pathlib.Path(sys.argv[1])
results = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/results.json")}
policies, table = results["evaluation"]["policies"], Table(box=box.SIMPLE_HEAD)


def text(interval, percent=False):
    if interval is None or interval[0] is None:
        return "–"
    mean, low, high = (100 * x if percent else x for x in interval)
    return f"{mean:.1f} ({low:.1f}–{high:.1f})"


names = ("", "minutes", "tokens/s", "held-out accuracy, %", "wins over sft by judge, %", "KL, nats", "length")
for name in names:
    table.add_column(name, overflow="fold")
for name in ("sft", "reward_model", "judge", "ppo", "dpo"):
    run, policy = results[name], policies.get(name, {})
    speed = run["tokens_per_second"]
    accuracy = run.get("reward_model", {}).get("accuracy", run.get("implicit_accuracy"))
    numbers = [text(accuracy, percent=True), text(policy.get("win_rate"), percent=True)]
    numbers += [text(policy.get("kl")), text(policy.get("length"))]
    table.add_row(name, f"{run['seconds'] / 60:.1f}", "–" if speed is None else f"{speed:,.0f}", *numbers)
Console(width=110).print(table)
END

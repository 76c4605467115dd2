#!/usr/bin/env bash
# Everything that is worth knowing about fastres on a GPU, the most important first, in under 9 minutes.
#
#   benchmarks/run_gpu.sh [FOLDER]
#
# Each result is in FOLDER (benchmarks/results/MACHINE-DATE) as soon as it is there; a step that fails or takes too
# long is noted in steps.txt, and the next begins. What no time is left for is noted, too: called again with the same
# FOLDER, the script does what has not come to its end yet, and what has been deleted from steps.txt. PYTHON names the
# interpreter that fastres is installed for, BUDGET the seconds for all of it, DATA a folder with CIFAR-10 as
# train/<class>/ and test/<class>/ (digits otherwise) and LABEL what the tables call it. QUICK=1 takes tiny sizes, to
# try the script itself, also where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # also where the extension was only built in place
BUDGET=${BUDGET:-520}
LABEL=${LABEL:-$([[ ${DATA:-} ]] && echo "CIFAR-10 (JPEG q75)" || echo digits)}
if nvidia-smi -L >/dev/null 2>&1; then
    machine=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9\n' -)
else
    machine=cpu
fi
out=${1:-benchmarks/results/$machine-$(date +%F)}
mkdir -p "$out"
touch "$out/steps.txt"

# step NAME SECONDS COMMAND...: runs it for at most SECONDS, keeps what it prints, and says how it ended; no more if it
# ended before, other than by its limit (124, 137)
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((BUDGET - SECONDS)) code=0
    shift 2
    grep -Eq "^$name: exit code [0-9]{1,2} " "$out/steps.txt" && return
    if ((left < limit / 2)); then # it would be cut, and nothing kept
        echo "$name: left out, no time" | tee -a "$out/steps.txt"
        return
    fi
    ((limit > left)) && limit=$left
    rm -rf "${out:?}/$name" # of a call that was cut
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "$name: exit code $code after $((SECONDS - start)) s" | tee -a "$out/steps.txt"
}

pytest() { # NAME SECONDS FILE...: a benchmark
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$PYTHON" -m pytest "$@" --benchmark-only --benchmark-csv="$out/bench-$name.csv"
}

models=(resnet50 resnet18 vgg16 vgg19_bn_4096)
batches=(128 512)
sizes=(--seconds 20)
training=(--dataset digits --epochs 8)
interpreter=()
[[ ${DATA:-} ]] && training=(--dataset folder --data-dir "$DATA" --epochs 30 --augmentation crop-flip-cutout)
if [[ ${QUICK:-} ]]; then
    models=(vgg11 vgg13)
    batches=(8)
    sizes=(--seconds 1 --images 64 --rounds 1)
    training=(--dataset digits --epochs 2 --batch-size 256)
    export FASTRES_BENCHMARK_BATCH=2
    [[ $machine == cpu ]] && interpreter=(env TRITON_INTERPRET=1)
fi

profile() { # NAME SECONDS MODEL BATCH FLAG...
    local name=profile-$1 limit=$2 model=$3 batch=$4
    shift 4
    step "$name" "$limit" "$PYTHON" -m fastres.profile --model "$model" --batch-size "$batch" "${sizes[@]}" "$@" \
        --output-dir "$out/$name"
    [[ -f $out/$name/profile.json ]] && "$PYTHON" benchmarks/keep_run.py "$out/$name" "$out/$name.json"
}

train() { # MODEL
    step "train-$1" 150 "$PYTHON" -m fastres.train --model "$1" "${training[@]}" --output-dir "$out/train-$1"
    [[ -f $out/train-$1/summary.json ]] && "$PYTHON" benchmarks/keep_run.py "$out/train-$1" "$out/train-$1.json" "$LABEL"
}

parallel=()
"$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n 8) # compiling hundreds of kernels takes most of the time
step gpu-tests 150 "$PYTHON" -m pytest -m gpu "${parallel[@]}"
profile "${models[0]}-${batches[0]}" 100 "${models[0]}" "${batches[0]}" --no-compile-variant
pytest operator 240 benchmarks/test_batch_norm_relu.py
for model in "${models[@]:1}"; do
    profile "$model-${batches[0]}" 80 "$model" "${batches[0]}" --no-compile-variant
done
train "${models[1]}"
pytest loaders 60 benchmarks/test_loaders.py
pytest steps 120 benchmarks/test_training.py -k "step or epoch"
# compiling takes most of the time, and max-autotune, the rival's, most of that
profile "${models[0]}-${batches[0]}-compiled" 420 "${models[0]}" "${batches[0]}" --compile-variant
pytest forward 150 benchmarks/test_training.py -k forward
for batch in "${batches[@]:1}"; do
    for model in "${models[@]}"; do
        profile "$model-$batch" 80 "$model" "$batch" --no-compile-variant
    done
done
step tilings 200 "${interpreter[@]}" "$PYTHON" benchmarks/tune_batch_norm_relu.py "$out/tilings.jsonl"
if [[ ${DATA:-} ]]; then
    step study-architecture 150 "$PYTHON" -m fastres.study architecture --dataset folder --data-dir "$DATA" \
        --output-dir "$out/study-architecture"
fi
for model in "${models[0]}" "${models[@]:2}"; do
    train "$model"
done
echo "results: $out"

#!/usr/bin/env bash
# Measures fastres on a GPU that is there for minutes, the most important first.
#
#   benchmarks/run_gpu.sh OUT [STAGE...]
#
# The stages, which are all taken unless some are named:
#
#   correctness   the operator's kernels are compiled in parallel; then the doctor's checks and the tests that need a GPU
#   kernels       kernel tables of ResNet-50 at batch 128 and 512, and its step under other tunings of the operator
#   rival         eager, fastres, and torch.compile with max-autotune and CUDA graphs; fastres' step with max-autotune
#   train         ResNet-18 to its target accuracy
#   profile       the profile of ResNet-50, without its compiled rows, which take minutes
#   loaders       images a second of both loaders; left out without DALI
#   studies       the studies with DATA, ten runs at a time, as starting takes longer than training; no seconds
#   rest          the compiled rows of the profile, the slower tests, operator, steps, other models
#
# After every step OUT/results.tar.gz holds all results so far but the weights, those of an earlier call included. In it
# steps.txt has a line for each step with exit code and seconds. After a step that fails or takes too long the next one
# runs; a step that there is no time left for is noted. Unpacked into benchmarks/results/MACHINE-DATE, they are kept.
#
#   PYTHON           interpreter with torch (python3); fastres itself need not be installed
#   FASTRES_COMMIT   commit for the tables and for studies that share runs, where there is no git repository
#   DATA, LABEL      folder with CIFAR-10 as train/<class>/ and test/<class>/ (digits otherwise), and its name in tables
#   TARGET           accuracy in percent at which training ends (93; digits: 95)
#   BUDGET           seconds for this call (560)
#   RESULTS          folder of the results (build/gpu), to which later calls add theirs
#   QUICK=1          tiny sizes, to try the script itself, also where there is no GPU
set -uo pipefail

out=$(mkdir -p "${1:?usage: run_gpu.sh OUT [STAGE...]}" && cd "$1" && pwd)
shift
stages=(correctness kernels rival train profile loaders studies rest)
(($#)) || set -- "${stages[@]}"
for stage; do
    if [[ " ${stages[*]} " != *" $stage "* ]]; then
        echo "run_gpu.sh: no stage $stage; choose from ${stages[*]}" >&2
        exit 2
    fi
done
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
BUDGET=${BUDGET:-560}
RESULTS=${RESULTS:-build/gpu}
LABEL=${LABEL:-$([[ ${DATA:-} ]] && echo "CIFAR-10 (JPEG q75)" || echo digits)}
cores=$(nproc)
mkdir -p "$RESULTS"

models=(resnet50 resnet18 vgg16 vgg19_bn_4096)
batches=(128 512)
sizes=(--seconds 20)
rival="max-autotune without descent"
training=(--dataset digits --epochs 8 --target-accuracy "${TARGET:-95}")
shapes="64x32x32 or 256x32x32 or 512x16x16 or 2048x4x4"
quick=
scale=()
[[ ${DATA:-} ]] && training=(--dataset folder --data-dir "$DATA" --epochs 30 --augmentation crop-flip-cutout
    --workers "$((cores > 2 ? cores - 2 : 1))" --target-accuracy "${TARGET:-93}")
if [[ ${QUICK:-} ]]; then
    models=(vgg11 vgg13)
    batches=(8)
    sizes=(--seconds 1 --images 64 --rounds 1)
    rival="+ channels-last"
    training=(--dataset digits --epochs 1 --train-fraction 0.1)
    shapes="2048x4x4 and forward and plain"
    export FASTRES_BENCHMARK_BATCH=2
    quick="and vgg16"
    scale=(--scale 0.05 --data-scale 0.02 --jobs 1)
fi
parallel=()
imports() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }
imports xdist && parallel=(-n "$cores") # compiling hundreds of kernels takes most of the tests' time

note() (
    flock 9 # studies end side by side
    echo "$*" | tee -a "$RESULTS/steps.txt"
    tar -czf "$out/part" --exclude='*.safetensors' --exclude='*.pt' -C "$RESULTS" .
    (($? < 2)) && mv "$out/part" "$out/results.tar.gz" # 1: a file has grown meanwhile
) 9<benchmarks/run_gpu.sh

# step NAME SECONDS COMMAND...: runs it for at most SECONDS, and keeps what it prints in NAME.log
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((BUDGET - SECONDS)) code=0
    shift 2
    if ((left < limit / 2)); then # it would be cut
        note "$name: left out, no time"
        return
    fi
    rm -rf "${RESULTS:?}/$name" # of an earlier call
    # SIGINT lets pytest and fastres keep what they have; without env a background job would ignore it
    env --default-signal=INT timeout --signal=INT --kill-after=10 "$((limit < left ? limit : left))" "$@" \
        >"$RESULTS/$name.log" 2>&1 || code=$?
    keep "$name"
    note "$name: exit code $code after $((SECONDS - start)) s"
}

keep() { # NAME: the run or profile that NAME has written to its folder, if any, as the file for the README's tables
    local label=()
    [[ -f $RESULTS/$1/summary.json ]] && label=("$LABEL")
    if [[ -f $RESULTS/$1/summary.json || -f $RESULTS/$1/profile.json ]]; then
        "$PYTHON" benchmarks/keep_run.py "$RESULTS/$1" "$RESULTS/$1.json" "${label[@]}"
    fi
}

tests() { # NAME SECONDS EXPRESSION: the tests that need a GPU; a file that cannot be imported does not stop the others
    # -vv, as pyproject.toml has -q, names a test as soon as it has failed
    step "$1" "$2" "$PYTHON" -m pytest -vv -m gpu -k "$3" --continue-on-collection-errors "${parallel[@]}"
}

kernel_table() { # NAME SECONDS BATCH FLAG...
    step "kernels-$1-$3" "$2" "$PYTHON" benchmarks/kernel_table.py --model "${models[0]}" --batch-size "$3" "${@:4}"
}

benchmark() { # NAME SECONDS FILE...
    step "$1" "$2" "$PYTHON" -m pytest "${@:3}" --benchmark-only --benchmark-csv="$RESULTS/bench-$1.csv"
}

profile() { # MODEL SECONDS BATCH FLAG...
    local name=profile-$1-$3
    [[ " $* " == *" --compile "* ]] && name+=-compiled
    [[ " $* " == *" --rows "* ]] && name+=-rival
    step "$name" "$2" "$PYTHON" -m fastres.profile --model "$1" --batch-size "$3" "${sizes[@]}" "${@:4}" \
        --output-dir "$RESULTS/$name"
}

train() { # MODEL
    step "train-$1" 150 "$PYTHON" -m fastres.train --model "$1" "${training[@]}" --output-dir "$RESULTS/train-$1"
}

stage_correctness() {
    step precompile 90 "$PYTHON" benchmarks/precompile.py "${batches[@]}"
    step doctor 60 "$PYTHON" -m fastres.doctor
    tests gpu-tests 150 "not (compile or signals)"
}

stage_kernels() {
    for batch in "${batches[@]}"; do kernel_table fastres 60 "$batch"; done
    step tunings 120 "$PYTHON" benchmarks/tune_batch_norm_relu.py "$RESULTS/tunings.jsonl"
}

stage_rival() {
    # it tries the variants of each convolution for minutes; a second call on the same machine goes on with the rest
    profile "${models[0]}" 540 "${batches[0]}" --rows "$rival"
    # the rival's choice of convolutions under our operator, in our graph of the whole step
    kernel_table compiled 240 "${batches[0]}" --compile --compile-mode max-autotune-no-cudagraphs
}

stage_train() {
    train "${models[1]}"
}

stage_profile() {
    profile "${models[0]}" 150 "${batches[0]}" --no-compile
}

stage_loaders() {
    if imports nvidia.dali; then
        FASTRES_CIFAR10_JPEG=${DATA:-} benchmark loaders 90 benchmarks/test_loaders.py
    else
        note "loaders: left out, DALI does not import"
    fi
}

study() { # NAME FLAG...
    step "study-$1" 500 "$PYTHON" -m fastres.study "$1" --dataset folder --data-dir "$DATA" --workers 3 --no-eager-cost \
        --no-report-seconds "${@:2}" "${scale[@]}" --output-dir "$RESULTS/study-$1"
}

stage_studies() {
    [[ ${DATA:-} ]] || return 0
    step doctor 60 "$PYTHON" -m fastres.doctor # whose outcome is kept, or each step below would check for itself
    study schedule --jobs 5 & # has the runs of three others
    study residual --jobs 3 &
    (study fast --seeds 0,1,2 --jobs 2; study architecture --seeds 0,1,2 --reuse "$RESULTS") &
    wait
    for name in augmentation zero-gamma; do study "$name" --reuse "$RESULTS"; done
}

stage_rest() {
    profile "${models[0]}" 420 "${batches[0]}" --compile
    tests slower-gpu-tests 150 "compile or signals"
    benchmark operator 120 benchmarks/test_batch_norm_relu.py -k "$shapes"
    benchmark steps 120 benchmarks/test_training.py -k "(step or epoch) $quick"
    for model in "${models[@]:1}"; do profile "$model" 80 "${batches[0]}" --no-compile; done
    for batch in "${batches[@]:1}"; do
        for model in "${models[@]}"; do profile "$model" 80 "$batch" --no-compile; done
    done
    benchmark forward 150 benchmarks/test_training.py -k "forward $quick"
    for model in "${models[0]}" "${models[@]:2}"; do train "$model"; done
}

for stage; do "stage_$stage"; done
echo "results: $out/results.tar.gz, $(du -k "$out/results.tar.gz" | cut -f1) KiB"

#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests that skip without one, then timings, the table last.
#   benchmarks/gpu.sh            on a machine with a GPU
#   benchmarks/gpu.sh cpu        the same logic, small, on the CPU: a check of this script
# SHARDS=set.json: real frames of 340x256 for the loader; without it, drawn ones.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=${1:-cuda}
python=${PYTHON:-python3}
out=${OUT:-$(mktemp -d)}
failed=0

"$python" -m pytest tests -q -k "gpu" 2>&1 | tail -n 15 || failed=1

times="$out/step.md"
: > "$times"
time_step() { "$python" -m cli bench step --device "$device" "$@" >> "$times" 2> "$out/step.err" || { failed=1; tail -n 3 "$out/step.err"; }; }
if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/machine.txt"
    time_step --precision bf16
    time_step --precision bf16 --channels-last --compile --only-step
else
    time_step --arch resnet18 --crop-size 32 --batch-size 32 --queue-size 192 --repeats 2 --only-step
fi

# A short real run from shards to features on the device, once with frames decoded there.
"$python" - "$out/shards" "$device" <<'PY' || failed=1
import sys
from pathlib import Path
from tests.made_shards import make_set
make_set(Path(sys.argv[1]), videos=64, frames=6, per_shard=32)
many = 1024 if sys.argv[2] == "cuda" else 32
make_set(Path(sys.argv[1]), videos=many, frames=4, per_shard=128, name="large", size=(256, 340))
PY
decode=cpu; [ "$device" = cuda ] && decode=nvjpeg
"$python" -m cli pretrain --shards "$out/shards/made.json" --out "$out/run-decode" --arch resnet18 --epochs 3 \
    --batch-size 16 --queue-size 64 --crop-size 64 --device "$device" --decode "$decode" > /dev/null || failed=1
"$python" -m cli pretrain --shards "$out/shards/made.json" --out "$out/run" --arch resnet18 --epochs 3 \
    --batch-size 16 --queue-size 64 --crop-size 64 --device "$device" > /dev/null || failed=1
"$python" -m cli extract-features --shards "$out/shards/made.json" --checkpoint "$out/run/last.pt" \
    --out "$out/features" --frames 4 --short-edge 72 --crop-size 64 --device "$device" > /dev/null || failed=1

# Does pre-training pay? Real clips, ResNet-18 from scratch, 3 seeds, Table 1's ablation. Needs ffmpeg and the test data.
data=${SECO_TEST_DATA:-../shared}/data/hmdb51
: > "$out/hmdb51.md"
if [ -d "$data" ] && "$python" -c "import imageio_ffmpeg" 2> /dev/null; then
    quick=(); [ "$device" = cpu ] && quick=(--seeds 0 --steps 2)
    "$python" benchmarks/demo_seeds.py --work "$out/demo" --src "$data" --dataset hmdb51 "${quick[@]}" \
        --tasks inter/inter,intra/inter,intra,order > "$out/hmdb51.md" 2> "$out/hmdb51.err" \
        || { failed=1; tail -n 3 "$out/hmdb51.err"; }
else
    echo "no clips or no ffmpeg: the accuracies are not measured" >> "$out/hmdb51.md"
fi

# The loader alone, and the views on the device: docs/loader.md.
shards=${SHARDS:-$out/shards/large.json}
if [ "$device" = cuda ]; then
    "$python" -m cli bench loader --shards "$shards" --triplets 512 --repeats 3 --workers 1,8,16 > "$out/loader.md" || failed=1
    "$python" -m cli bench views --shards "$shards" --device cuda > "$out/views.md" || failed=1
    "$python" -m cli bench extract --shards "$shards" --device cuda --workers 14 > "$out/extract.md" || failed=1
else
    "$python" -m cli bench loader --shards "$shards" --triplets 8 --repeats 1 --only-costs > "$out/loader.md" || failed=1
    "$python" -m cli bench views --shards "$shards" --repeats 1 --device cpu --batch 4 > "$out/views.md" || failed=1
    "$python" -m cli bench extract --shards "$out/shards/made.json" --repeats 1 --device cpu --arch resnet18 \
        --frames 2 --short-edge 72 --crop-size 64 > "$out/extract.md" || failed=1
fi

# The SVM of Kinetics' size: docs/probe.md.
probe=(); [ "$device" = cpu ] && probe=(--rows 400 --classes 5 --dimension 64 --repeats 1)
[ "$device" = cuda ] && probe=(--rows 240000 --classes 400 --repeats 3)
"$python" -m cli bench probe --device "$device" --only-ours "${probe[@]}" > "$out/probe.md" || failed=1

# SiamFC on the frozen backbone: docs/track.md.
if [ "$device" = cuda ]; then
    "$python" -m cli bench track --device cuda > "$out/track.md" || failed=1
else
    "$python" -m cli bench track --arch resnet18 --feature-layer layer2 --batch-size 2 --repeats 1 --device cpu > "$out/track.md" || failed=1
fi

echo "== $device: tracking =="
cat "$out/track.md"
echo "== $device: probe =="
cat "$out/probe.md"
echo "== $device: loader, views and features =="
cat "$out/loader.md" "$out/views.md" "$out/extract.md"
echo "== $device: 8 classes of HMDB51 =="
cat "$out/hmdb51.md"
echo "== $device: step times =="
cat "$times"
[ "$failed" = 0 ] && echo "all passed" || { echo "something failed, see above"; exit 1; }

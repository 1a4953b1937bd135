#!/usr/bin/env bash
# Checks and measures this toolkit on a machine with one GPU, in two calls of a few minutes.
#
#   benchmarks/gpu.sh check          is everything right there?   at most 5 minutes
#   benchmarks/gpu.sh measure        how fast is it?              at most 6 minutes
#   benchmarks/gpu.sh check cpu      the same logic at its smallest on the CPU; also measure cpu
#
# It reads .gpu/ (made by `make gpu-kit`) where that is there. Environment: OUT, the folder of the
# results (results.md, failures.md); PYTHON; ONLY, the parts to run, for example ONLY=step,bare.
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-} device=${2:-cuda}
case "$mode-$device" in
    check-cuda) total=300 ;;
    measure-cuda) total=360 ;;
    check-cpu | measure-cpu) total=7200 ;; # limits are for a GPU that others wait for
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

export PYTHONUNBUFFERED=1 TMPDIR
TMPDIR=$(mktemp -d /tmp/seco-gpu.XXXXXX) # all bulk: shards, runs, compiled kernels
out=${OUT:-$(mktemp -d)} python=${PYTHON:-python3} kit=${SECO_GPU_KIT:-$PWD/.gpu}
results=$out/results.md failures=$out/failures.md
mkdir -p "$out"
: > "$results"
verdicts=() unhappy=() child=

# Runs whatever ends the script, so that what was measured is on the screen last.
summary() {
    trap - EXIT INT TERM
    if [ -n "$child" ]; then
        kill "$child" 2> /dev/null
        unhappy+=("the script was stopped")
    fi
    echo
    echo "== gpu.sh $mode $device: $SECONDS s; $results"
    grep -v '^> ' "$results" | cat -s | tail -c 9000
    [ ${#verdicts[@]} = 0 ] || printf '%s\n' "${verdicts[@]}"
    rm -rf "$TMPDIR"
    if [ ${#unhappy[@]} = 0 ]; then
        echo "all passed"
    else
        (IFS=';'; echo "not all passed: ${unhappy[*]}")
        exit 1
    fi
}
trap summary EXIT
trap 'exit 1' INT TERM

# part NAME SECONDS COMMAND...: run it if that much time is left, for no longer, and note down at
# once what it prints and how it ended.
part() {
    local name=$1 limit=$2 began=$SECONDS code errors=$TMPDIR/$1.err output=$TMPDIR/$1.out
    shift 2
    case ",${ONLY:-$name}," in *",$name,"*) ;; *) [ "$name" = sets ] || return 0 ;; esac
    [ "$device" = cuda ] || limit=$((limit * 20))
    if [ $((SECONDS + limit)) -gt "$total" ]; then
        verdicts+=("$name: skipped, $((total - SECONDS)) s are left and it may take $limit")
        unhappy+=("$name skipped")
        return 0
    fi
    printf '\n## %s\n\n' "$name" >> "$results"
    timeout --kill-after=5 "$limit" "$@" > >(tee -a "$results" > "$output") 2> "$errors" &
    child=$!
    wait "$child"
    code=$?
    child=
    wait # for tee
    verdicts+=("$name: exit code $code after $((SECONDS - began)) of $limit s")
    printf '\n%s\n' "${verdicts[-1]}" >> "$results"
    if [ $code != 0 ]; then
        unhappy+=("$name failed")
        {
            printf '\n## %s, exit code %s\n\n```\n' "$name" "$code"
            tail -n 30 "$output"
            tail -n 30 "$errors"
            printf '```\n'
        } | tee -a "$failures"
    fi
    return 0
}

# Packages that this Python lacks, from the kit. A wheel of another Python is left out; the first
# part tells what is missing.
export SECO_GPU_PACKAGES=$TMPDIR/packages PYTHONPATH
PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$SECO_GPU_PACKAGES:$PWD"
for wheel in "$kit"/wheels/*.whl; do
    [ -f "$wheel" ] || continue
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --target "$SECO_GPU_PACKAGES" "$wheel" 2> /dev/null || echo "not for this Python: $wheel"
done

module() { # PART-NAME SECONDS MODULE ARGUMENTS...
    local name=$1 limit=$2 module=$3
    shift 3
    part "$name" "$limit" "$python" -m "benchmarks.gpu.$module" --device "$device" \
        --work "$TMPDIR/work" "$@"
}

mkdir -p "$TMPDIR/work"
# A copy of the checkout may be without its history.
commit=$(git rev-parse --short HEAD 2> /dev/null || cat "$kit/commit" 2> /dev/null)
printf '# gpu.sh %s %s, commit %s\n' "$mode" "$device" "${commit:-unknown}" >> "$results"

module sets 40 data
if [ "$mode" = check ]; then
    [ "$device" = cpu ] || export SECO_REQUIRE_GPU=1
    module card 40 card
    # shellcheck disable=SC2016
    part tests 110 sh -c '"$0" -m pytest "$@" >&2; code=$?; [ $code != 0 ] || echo "passed"; exit $code' \
        "$python" -p no:cacheprovider -m gpu $(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
    module smoke 80 smoke smoke
    module nvjpeg 45 smoke nvjpeg
    module step 75 step eager
    [ "$device" = cuda ] || export TORCH_COMPILE_DISABLE=1 # compiling is for GPUs
    module compile 85 step compile
else
    if [ "$device" = cuda ]; then
        module step 130 step compiled
        module bare 90 step bare
        module plain 45 step plain
        module views 60 benches views
        module loader 40 benches loader
        module extract 45 benches extract
        module svm 60 benches svm
        module track 40 benches track
        module learning 75 learning
    else
        module benches 60 benches views,loader,extract,svm,track # one process: less to load
        export TORCH_COMPILE_DISABLE=1
        module step 265 step compiled,bare,plain
        module learning 75 learning
    fi
fi

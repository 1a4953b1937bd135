#!/usr/bin/env bash
# Checks and measures this toolkit on a machine with one GPU, in two calls of a few minutes.
#
#   benchmarks/gpu.sh check          is everything right there?   at most 5 minutes
#   benchmarks/gpu.sh measure        how fast is it?              at most 6 minutes
#   benchmarks/gpu.sh check cpu      the same logic at its smallest on the CPU; also measure cpu
#
# It reads .gpu/ (made by `make gpu-kit`) where that is there. Environment: OUT, the folder of the
# results (results.md, failures.md); PYTHON; ONLY, the parts to run, for example ONLY=step,bare;
# TOTAL, seconds for all of it.
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-} device=${2:-cuda}
case "$mode-$device" in
    check-cuda) total=${TOTAL:-300} ;;
    measure-cuda) total=${TOTAL:-360} ;;
    check-cpu | measure-cpu) total=${TOTAL:-7200} ;; # limits are for a GPU that others wait for
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

out=${OUT:-$(mktemp -d)} python=${PYTHON:-python3} kit=${SECO_GPU_KIT:-$PWD/.gpu}
export PYTHONUNBUFFERED=1 TMPDIR
# On the CPU kernels compiled before are used: a minute less.
[ "$device" = cuda ] || export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/torchinductor_$(id -un)}
TMPDIR=$(mktemp -d /tmp/seco-gpu.XXXXXX) # all bulk: shards, runs, compiled kernels
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

# part NAME LIMIT COMMAND...: run it, and note down at once what it prints and how it ended. LIMIT
# is LEAST-MOST seconds: it is skipped if there are fewer than LEAST left, and stopped after MOST.
part() {
    local name=$1 least=${2%-*} limit=${2#*-} left=$((total - SECONDS)) began=$SECONDS code
    local errors=$TMPDIR/$1.err before
    shift 2
    case ",${ONLY:-$name}," in *",$name,"*) ;; *) [ "$name" = sets ] || return 0 ;; esac
    [ "$device" = cuda ] || least=1 limit=$((limit * 20))
    if [ "$left" -lt "$least" ]; then
        verdicts+=("$name: skipped, $left s are left and it takes $least or more")
        unhappy+=("$name skipped")
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    printf '\n## %s\n\n' "$name" >> "$results"
    before=$(wc -l < "$results")
    timeout --kill-after=5 "$limit" "$@" >> "$results" 2> "$errors" &
    child=$!
    wait "$child"
    code=$?
    child=
    verdicts+=("$name: exit code $code after $((SECONDS - began)) of $limit s")
    printf '\n%s\n' "${verdicts[-1]}" >> "$results"
    if [ $code != 0 ]; then
        unhappy+=("$name failed")
        {
            printf '\n## %s, exit code %s\n\n```\n' "$name" "$code"
            tail -n "+$((before + 1))" "$results" | tail -n 30
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
    module card 15-40 card
    # shellcheck disable=SC2016,SC2046
    part tests 60-110 sh -c '"$0" -m pytest "$@" >&2; code=$?; [ $code != 0 ] || echo passed; exit $code' \
        "$python" -p no:cacheprovider -m gpu $(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
fi
# On the CPU fewer processes: loading torch takes as long as the parts do.
case "$mode-$device" in
    check-cuda)
        module smoke 40-80 smoke smoke
        module nvjpeg 25-45 smoke nvjpeg
        module step 40-75 step eager
        module compile 50-85 step compile
        ;;
    measure-cuda)
        module step 90-130 step compiled
        module bare 50-90 step bare
        module plain 20-45 step plain
        module views 30-60 benches views
        module feeding 30-60 benches loader,extract
        module after 40-80 benches svm,track
        module learning 50-90 learning
        ;;
    check-cpu)
        module smoke 125 smoke smoke,nvjpeg
        TORCH_COMPILE_DISABLE=1 module step 160 step eager,compile # compiling is for GPUs
        ;;
    measure-cpu)
        TORCH_COMPILE_DISABLE=1 module step 265 step compiled,bare,plain
        module benches 200 benches views,loader,extract,svm,track
        module learning 90 learning
        ;;
esac

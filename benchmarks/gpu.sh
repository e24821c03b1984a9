#!/usr/bin/env bash
# Everything that a GPU can show, in at most nine minutes and without a network:
#
#     benchmarks/gpu.sh [--device cuda|cpu] [--quick] [--record] [PART ...]
#
# Parts, in this order, by default all: tests (marked `cuda`), training, decoding, features. Each has a time limit, and
# prints its figures as they come. `--record` writes them to benchmarks/results/machines/, with `--quick` to
# runs/benchmarks/. `--device cpu --quick` tries everything on a CPU in about a minute. Wheels in a folder .whl of the
# checkout are installed first. PYTHON names the interpreter, by default python3.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda quick=() record=false parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?--device is cuda or cpu}; shift ;;
        --quick) quick=(--quick) ;;
        --record) record=true ;;
        tests | training | decoding | features) parts+=("$1") ;;
        *) echo "gpu.sh: there is no $1; see the head of this file" >&2; exit 2 ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests training decoding features)

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d .whl ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .whl/*.whl || exit
    export PYTHONPATH="/tmp/site:$PYTHONPATH"
fi

# 525 of 540 seconds
declare -A limits=([tests]=100 [training]=155 [decoding]=120 [features]=150)
workers=$(($(nproc) > 2 ? $(nproc) - 1 : 1))
journal=$PWD/runs/gpu.jsonl
rm -f "$journal"
options=(--device "$device" --journal "$journal" "${quick[@]}")

failed=0
begin=$SECONDS
for part in "${parts[@]}"; do
    echo "== $part, at most ${limits[$part]} s"
    start=$SECONDS
    if [ "$part" = tests ]; then
        files=$(grep -rlE --include='test_*.py' 'mark\.cuda' tests)
        # shellcheck disable=SC2086
        timeout -k 5 "${limits[$part]}" "$python" -m pytest -m cuda -q -p no:cacheprovider -p no:benchmark -n "$workers" $files
    else
        timeout -k 5 "${limits[$part]}" "$python" -m benchmarks.gpu "$part" "${options[@]}"
    fi
    status=$?
    if [ $status -eq 124 ]; then
        echo "-- $part was stopped; its figures so far count"
    elif [ $status -ne 0 ]; then
        echo "-- $part failed with status $status"
        failed=1
    fi
    echo "-- $part: $((SECONDS - start)) s"
done

if $record && [ -f "$journal" ]; then
    "$python" -m benchmarks.gpu record "${options[@]}" || failed=1
fi
echo "-- in all $((SECONDS - begin)) s"
exit $failed

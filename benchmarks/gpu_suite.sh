#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than 8 minutes: the device tests, the tests through torch, the
# benchmarks with their check, and compute-sanitizer for what time is left. Writes one JSON with the device, driver,
# date and commit, after every step anew, and ends with 0 only if every step that ran passed.
#
#   benchmarks/gpu_suite.sh [FILE]     default FILE: docs/results/<date>-<device>.json
#
# PARTS: of "tests benchmarks sanitizers" (default all), so that two calls can do all of them. PYTHON: with a CUDA build
# of torch (default python3). BUILD: the build folder (default build/make). COMMIT: what is tested, where this is no git
# clone. LOGS: where the steps' output stays (default: a temporary folder that goes). No setting of the card is touched.
set -uo pipefail
cd "$(dirname "$0")/.."
PARTS=${PARTS:-tests benchmarks sanitizers}
for part in $PARTS; do
  [[ " tests benchmarks sanitizers " == *" $part "* ]] || { echo "gpu_suite: PARTS: no part $part" >&2; exit 2; }
done
found=$(command -v "${PYTHON:=python3}") || { echo "gpu_suite: PYTHON: $PYTHON is not there" >&2; exit 2; }
PYTHON=$(realpath -s "$found")
BUILD=${BUILD:-build/make}
DEVICE_TESTS=$BUILD/tests/cuda_host/device
if [ -z "${LOGS:-}" ]; then
  LOGS=$(mktemp -d)
  trap 'rm -rf "$LOGS"' EXIT
fi
mkdir -p "$LOGS"
rm -f "$LOGS/steps"
started=$SECONDS

if ! device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$device" ]; then
  echo "gpu_suite: not run: nvidia-smi finds no GPU" >&2
  exit 2
fi
name=${device%%,*}
driver=${device##*, }
hopper=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | grep -c '^9\.')
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
[ -z "$(git status --porcelain 2>/dev/null)" ] || commit=$commit+changes
file=${1:-docs/results/$(date -u +%Y-%m-%d)-$(tr -cs 'A-Za-z0-9' '-' <<<"$name" | sed 's/-*$//').json}
mkdir -p "$(dirname "$file")"

# record: writes the JSON, and says how many steps passed; fails if one failed or none passed.
record() {
  NAME=$name DRIVER=$driver COMMIT=$commit SECONDS_TAKEN=$((SECONDS - started)) "$PYTHON" - "$LOGS" "$file" <<'PYTHON'
import datetime
import json
import os
import pathlib
import sys

logs, record_file = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
steps = []
for line in (logs / "steps").read_text().splitlines():
    name, status, note = line.split("\t")
    if status == "not run":
        steps.append({"step": name, "result": "not run", "why": note})
    else:
        log = (logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
        result = "passed" if status == "0" else f"failed with {status}"
        steps.append({"step": name, "result": result, "seconds": int(note), "last_line": log[-1] if log else ""})
files = [logs / f"{step['step'].removeprefix('bench.')}.jsonl" for step in steps if "seconds" in step]
results = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
record = {
    "device": os.environ["NAME"],
    "driver": os.environ["DRIVER"],
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": os.environ["COMMIT"],
    "seconds": int(os.environ["SECONDS_TAKEN"]),
    "steps": steps,
    "benchmarks": results,
}
record_file.write_text(json.dumps(record, indent=1) + "\n")
passed = sum(step["result"] == "passed" for step in steps)
failed = sum(step["result"].startswith("failed") for step in steps)
print(f"{record_file}: {len(results)} benchmarks")
print(f"{passed} passed, {failed} failed, {len(steps) - passed - failed} not run")
sys.exit(1 if failed or not passed else 0)
PYTHON
}

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, shows how it ended, and notes it for the JSON. A test
# program that left something out for want of a GPU has failed here.
step() {
  local step_name=$1 limit=$2 begin=$SECONDS left=$((470 - SECONDS + started)) status
  shift 2
  if [ $left -lt 5 ]; then
    not_run "$step_name" "no time left"
    return
  fi
  timeout $((left < limit ? left : limit)) "$@" >"$LOGS/$step_name.log" 2>&1
  status=$?
  ! grep -q '[1-9][0-9]* parts not run' "$LOGS/$step_name.log" || status=not-run
  printf '%s\t%s\t%s\n' "$step_name" "$status" "$((SECONDS - begin))" >>"$LOGS/steps"
  if [ $status = 0 ]; then
    echo "passed  $step_name ($((SECONDS - begin)) s): $(tail -n 1 "$LOGS/$step_name.log")"
  else
    echo "FAILED  $step_name ($((SECONDS - begin)) s, status $status):"
    tail -n 30 "$LOGS/$step_name.log"
  fi
  record >/dev/null
}

# not_run NAME WHY
not_run() {
  echo "not run $1: $2"
  printf '%s\tnot run\t%s\n' "$1" "$2" >>"$LOGS/steps"
}

# What is built already takes a few seconds.
step build 200 env CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "$PYTHON" -m pip install --no-build-isolation --no-deps \
  --force-reinstall --config-settings=build-dir="$BUILD" --config-settings=cmake.define.DSV4_CUDA=ON \
  --config-settings=cmake.define.DSV4_NATIVE=ON .
# Not from here, where the sources are and no library.
step import 60 env -C / "$PYTHON" -c \
  'import dsv4; found = dsv4.ops.implementations()["mhc_pre"]["cuda"]; print(found); assert "sm80" in found'

# What there is: tests/cuda_host/device builds a program of every test.
programs=$(cd "$DEVICE_TESTS" 2>/dev/null && ls -d device_test_* 2>/dev/null | grep -v '\.')
if [ "$hopper" = 0 ] && [[ $programs == *device_test_wgmma* ]]; then
  not_run device.test_wgmma "no Hopper GPU"
  programs=$(grep -v '^device_test_wgmma$' <<<"$programs")
fi
[ -n "$programs" ] || { echo "gpu_suite: no device tests in $DEVICE_TESTS" >&2; exit 2; }

if [[ $PARTS == *tests* ]]; then
  for program in $programs; do
    step "device.${program#device_}" 60 "$DEVICE_TESTS/$program"
  done
  step ops 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_rows_on_cuda.py \
    tests/ops/test_mhc_gradients_on_cuda.py tests/model/test_cuda_attention_gradient.py \
    tests/model/test_cuda_row_gradients.py tests/model/test_cuda_experts_gradient.py
  step model 90 "$PYTHON" -m pytest -q -p no:cacheprovider tests/model/test_cuda_device.py \
    tests/model/test_bench_on_cuda.py
fi

attention=(sparse_attention index_topk sparse_attention_backward)
weights=(fp8_linear grouped_linear fp4_linear moe_gate moe_experts)
# bench NAME LIMIT ARGUMENT...: a part of `dsv4 bench` on the GPU.
bench() {
  step "bench.$1" "$2" "$PYTHON" -m dsv4 bench --device cuda --json "$LOGS/$1.jsonl" "${@:3}"
}
if [[ $PARTS == *benchmarks* ]]; then
  both=(--shape v4-flash --shape v4-pro)
  bench weights 120 "${weights[@]/#/--op=}" "${both[@]}" --context={1,8,64,256,2048,8192}
  bench attention 100 "${attention[@]/#/--op=}"
  others=$(env -C / "$PYTHON" -c \
    'import sys; from dsv4 import bench; print(*sorted(bench.families().keys() - sys.argv[1:]))' \
    "${attention[@]}" "${weights[@]}")
  # Hopper's own kernels, which must be asked for: beside the same in the part `weights`.
  [ "$hopper" = 0 ] || DSV4_MAX_ISA=sm90 bench hopper 40 --op={fp8_linear,grouped_linear,fp4_linear} --context={256,2048,8192}
  [ "$hopper" = 0 ] || DSV4_MAX_ISA=sm90 bench hopper_index 40 --op=index_topk
  bench rows 90 $(printf -- '--op=%s ' $others) "${both[@]}" --context={1,64,4096}
fi

# A sanitizer slows a program down by 10 to 100 times: a part of the cases, of a program that is not named here all.
declare -A part=([test_mhc]=token_counts [test_attention]=key_counts [test_index]=heads [test_norm_rope]=every_count
  [test_quantize]=every_width [test_linear]=input_counts [test_moe]=float32_scales [test_compress]=every_format
  [test_mhc_backward]=token_counts [test_attention_backward]=key_counts [test_norm_rope_backward]=every_count
  [test_moe_backward]=rows_of_an_expert [test_compress_backward]=token_counts)
if [[ $PARTS == *sanitizers* ]]; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  [ -n "$sanitizer" ] || not_run sanitizers "no compute-sanitizer"
  for tool in ${sanitizer:+memcheck racecheck synccheck}; do
    for program in $programs; do
      test=${program#device_}
      step "$tool.$test" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 "$DEVICE_TESTS/$program" ${part[$test]:-}
    done
  done
fi

record

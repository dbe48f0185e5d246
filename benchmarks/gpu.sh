#!/usr/bin/env bash
# Everything about one GPU, in two steps; see gpu.py and docs/gpu.md.
#   benchmarks/gpu.sh prepare           with a network: fetch the packages that the other machine will not have
#   benchmarks/gpu.sh run [OPTION …]    without one: install them into a temporary folder, run gpu.py there
# They are Python files (nothing is compiled) in build/gpu-packages, which goes along with the clone.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=build/gpu-packages
python=${PYTHON:-python3}

prepare() {
  rm -rf "$packages" && mkdir -p "$packages"
  "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$packages" fla-core==0.6.0 einops==0.8.2
  # the source: its wheels are of one PyTorch and one CUDA
  MAMBA_SKIP_CUDA_BUILD=TRUE "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
    --dest "$packages" mamba-ssm==2.3.2.post1
  local size
  size=$(du -sk "$packages" | cut -f1)
  [ "$size" -le 65536 ] || { echo "$packages has $size KB; at most 65536 may go along"; exit 1; }
  echo "$packages: $size KB"
}

run() {
  local place
  place=$(mktemp -d)
  trap 'rm -rf "$place"' EXIT
  for wheel in "$packages"/*.whl; do
    [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" "$place"
  done
  for source in "$packages"/*.tar.gz; do  # of which only the Python files are wanted
    [ ! -e "$source" ] || tar -xzf "$source" -C "$place" --strip-components=1 --wildcards '*/mamba_ssm/*' '*/PKG-INFO'
  done
  PYTHONPATH="$PWD/src:$place${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
    "$python" benchmarks/gpu.py "$@"
}

case "${1:-}" in
  prepare) prepare ;;
  run) shift && run "$@" ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

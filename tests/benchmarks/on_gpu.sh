#!/usr/bin/env bash
# What needs a GPU, within a budget of seconds: checks, speed, and methods on ResNet-9 at full size.
#
#   OUT=folder DATTRI_DATA=folder BUDGET=600 bash tests/benchmarks/on_gpu.sh [checks] [speed] [cifar]
#
# From the root of the repository. Stages run in this order unless others are named; one that is cut
# leaves what it finished, and RESUME=outcomes.tar.gz goes on with the models of an earlier run (that
# of docs/results/outcomes, say). Nothing has to be installed but torch and what the package needs.
set -u
ROOT=$PWD
: "${OUT:?}" "${BUDGET:=600}" "${PYTHON:=python3}" "${STATE:=$ROOT/.benchmarks/on_gpu}" "${WORKERS:=12}"
: "${SIZE10:=full}" "${SIZE2:=full}" "${COUNT:=50}" "${MODELS:=10}" "${SHARDS:=3}"
export PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$STATE/cache MPLCONFIGDIR=$STATE/mpl
export PYTHONPATH=$ROOT:$ROOT/plugins${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT" "$STATE/logs" "$STATE/mpl"
RESERVE=10 # seconds for packing
left() { local n=$((BUDGET - RESERVE - SECONDS - ${1:-0})); echo $((n > 1 ? n : 1)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
bounded() { local limit=$1; shift; timeout -s INT -k 12 "$limit" "$@"; }
say() { echo "== $* [$SECONDS s]"; }

# Entry points are read from metadata: where the package is not installed, from what stands in
# pyproject.toml.
if ! $PYTHON -c 'import importlib.metadata as m; m.version("dattri-core")' 2> /dev/null; then
  $PYTHON - "$ROOT/pyproject.toml" "$STATE/site/dattri_core-0.dist-info" <<'PY'
import sys, tomllib
from pathlib import Path
project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
)
lines = [f"{name} = {place}" for name, place in project["entry-points"]["dattri"].items()]
(folder / "entry_points.txt").write_text("\n".join(["[dattri]", *lines, ""]))
PY
  export PYTHONPATH=$PYTHONPATH:$STATE/site
fi

checks() {
  # The files that have tests of a device: collecting all others takes each worker half a minute.
  local files
  files=$(grep -rlE "mark.cuda|oracles.devices" tests --include='test_*.py' | grep -v benchmarks/)
  bounded "$(least 240 "$(left)")" $PYTHON -m pytest $files -m cuda -n "$WORKERS" \
    --dist worksteal -v -p no:cacheprovider --timeout 150 > "$STATE/logs/checks.log" 2>&1
  grep -E "^=+ .*(passed|failed)|^(FAILED|ERROR) tests" "$STATE/logs/checks.log" | cut -c1-200
  say "checks"
}

speed() {
  export DATTRI_BENCH_TABLE=$STATE/tables
  for name in language_model knn projectors; do
    bounded "$(least 120 "$(left)")" $PYTHON -m pytest "tests/benchmarks/test_${name}_cuda.py" \
      -m cuda --benchmark-only -q -s -p no:cacheprovider > "$STATE/logs/$name.log" 2>&1
    tail -n +11 "$DATTRI_BENCH_TABLE/${name}_cuda.md" 2> /dev/null
    say "$name"
  done
}

cifar() {
  local dattri="$PYTHON -m dattri_core" methods first shared part
  cd "$STATE" || return
  if [ -n "${RESUME:-}" ]; then tar xzf "$RESUME"; fi
  shared="--size $SIZE2 --trained-on half --out bench/cifar2-resnet9 --retrained retrained"
  methods="random loss grad-norm embedding-similarity knn-shapley rps-l2 self-influence grad-dot
    grad-cos trak logra trackstar factgrass grass if-ekfac tracin relatif-ekfac if-kfac if-diagonal
    if-datainf"
  bounded "$(least 110 "$(left)")" $dattri bench cifar10-resnet9 --size "$SIZE10" --metrics \
    mislabel-auroc --out bench/cifar10-resnet9 --retrained retrained --methods $methods \
    2>&1 | tee logs/cifar10.log
  say "wrong labels"
  for part in $(seq "$SHARDS"); do # several, since one alone leaves the device idle in between
    bounded "$(left 60)" $dattri retrain cifar2-resnet9 --size "$SIZE2" --count "$COUNT" \
      --index "$part/$SHARDS" --out retrained > "logs/shard$part.log" 2>&1 &
  done
  wait
  tail -qn 1 logs/shard*.log | cut -c1-200
  say "halves of the train set"
  first="grad-cos trak logra trackstar relatif-ekfac if-ekfac"
  for words in "--methods $first" "--checkpoints $MODELS --methods $first" "--methods $methods"; do
    bounded "$(left)" $dattri bench cifar2-resnet9 $shared --metrics lds \
      --subsets "$COUNT" $words 2>&1 | tee -a logs/cifar2.log
  done
  say "datamodels"
  cd "$ROOT" || return
}

for stage in ${*:-checks speed cifar}; do $stage; done

cd "$STATE" || exit 1
nvidia-smi > logs/nvidia-smi.log 2>&1
tar czf "$OUT/logs.tar.gz" logs
if [ -d tables ]; then tar czf "$OUT/tables.tar.gz" tables; fi
if [ -d bench ]; then
  find bench -path '*/scores/*' -prune -o -type f ! -name '*.png' -print0 |
    tar czf "$OUT/bench.tar.gz" --null -T -
fi
if [ -d retrained ]; then
  find retrained -type f \( -name 'rows-*.npz' -o -name manifest.json \) -print0 |
    tar czf "$OUT/outcomes.tar.gz" --null -T -
fi
say "end"

#!/usr/bin/env bash
# The long forms of the randomised tests of fs-core, optimised, with assertions on; the model checkers; then many power cuts
# in a guest, where SPDK and QEMU are installed.
#
#   scripts/long.sh [FILTER]   only tests of fs-core whose name contains FILTER; no model checkers, no power cuts
#
#   GAUR_OPS=N       operations of the model test (default here 1000000)
#   GAUR_STEPS=N     steps of the models of trees, allocator and range lock, shuttle's schedules of the range lock (default here 300000)
#   GAUR_SCHEDULES=N shuttle's schedules of whole operations (default here 300000)
#   GAUR_CRASHES=N   crash states that the crash test tries (default here 10000)
#   GAUR_CUTS=N      power cuts (default here 20, and half of them again with sectors of 4096 bytes)
#   GAUR_SEED=N      replay a run

set -uo pipefail
export LC_ALL=C
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

have cargo || die "cargo is not on PATH" "install Rust 1.89 or later, with rustup for example"
export GAUR_OPS="${GAUR_OPS:-1000000}" GAUR_STEPS="${GAUR_STEPS:-300000}"
export GAUR_SCHEDULES="${GAUR_SCHEDULES:-300000}" GAUR_CRASHES="${GAUR_CRASHES:-10000}"
# Long tests are not hung tests.
export GAUR_STEP_TIMEOUT="${GAUR_STEP_TIMEOUT:-86400}" GAUR_TIME_LIMIT="${GAUR_TIME_LIMIT:-86400}"
begin_steps long-logs
# A build directory of its own, so that the next `make test` does not build everything again.
step "long forms" env CARGO_TARGET_DIR="$(target_dir)/long" CARGO_PROFILE_TEST_OPT_LEVEL=3 \
  cargo test --locked --no-fail-fast -p fs-core --tests --lib -- --include-ignored --nocapture "$@"
power_cuts() {
  local cuts="${GAUR_CUTS:-20}" seed=()
  if ! spdk_is_there; then
    skip allowed "power cuts" "SPDK is not installed (make spdk)"
    return
  fi
  if [ -n "${GAUR_SEED:-}" ]; then seed=(--seed "$GAUR_SEED"); fi
  step "guest: image" scripts/guest.sh build || return
  step "guest: programs" scripts/guest-tests.sh build || return
  step "guest: pack" scripts/guest-tests.sh pack || return
  step "guest: $cuts power cuts" scripts/guest-tests.sh powercut --cuts "$cuts" "${seed[@]}"
  step "guest: power cuts, 4096" scripts/guest-tests.sh powercut --cuts "$(((cuts + 1) / 2))" --sector 4096 "${seed[@]}"
}

if [ $# -eq 0 ]; then
  model_checker loom
  model_checker shuttle
  power_cuts
fi
finish_steps

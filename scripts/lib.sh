# shellcheck shell=bash
# Shared by the scripts here: steps with their time and log, what was skipped, the table at the end. Sourced, not run.
#
# A step is a command. Its output goes to the terminal and to a log of its own; its result goes to the table. Steps go on
# after a failure, so that one run shows everything that is wrong.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# What cargo itself is told by CARGO_TARGET_DIR, or its default.
target_dir() { printf '%s' "${CARGO_TARGET_DIR:-target}"; }

# Where tools that are built here go: outside of any checkout, like SPDK.
cache_dir() { printf '%s' "${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/gaur"; }

note() { printf '   %s\n' "$*"; }
die() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  shift
  for line in "$@"; do printf '  %s\n' "$line" >&2; done
  exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }
have() { command -v "$1" >/dev/null 2>&1; }
# What a fresh Debian machine lets us do: install packages.
may_install() { is_root && have apt-get; }

# ---------------------------------------------------------------------------------------------------------------------
# Steps

LOGS=
NAMES=()
RESULTS=()
TIMES=()
NOTES=()
FAILED=0
CHILD=

interrupted() {
  if [ -n "$CHILD" ]; then kill -TERM -- "-$CHILD" 2>/dev/null || kill -TERM "$CHILD" 2>/dev/null; fi
  printf '\ninterrupted\n'
  exit 130
}
trap interrupted INT TERM

# Logs go to a new directory. One run at a time uses it.
begin_steps() {
  LOGS="$(target_dir)/$1"
  rm -rf "$LOGS"
  mkdir -p "$LOGS" || die "cannot make $LOGS"
}

record() {
  NAMES+=("$1")
  RESULTS+=("$2")
  TIMES+=("$3")
  NOTES+=("${4:-}")
}

# step NAME COMMAND...: runs it; its status is the command's.
step() {
  local name="$1" began=$SECONDS status=0 log
  shift
  log="$LOGS/$(printf '%02d' "${#NAMES[@]}")-$(printf '%s' "$name" | tr -cs 'A-Za-z0-9' '-').log"
  printf '\n=== %s\n' "$name"
  : >"$log"
  # The limit is for hangs, not for slow machines. In the background, so that a signal can end it: timeout leads a process
  # group of its own.
  timeout --kill-after=10 "${GAUR_STEP_TIMEOUT:-3600}" "$@" </dev/null >"$log" 2>&1 &
  CHILD=$!
  tail -n +1 -f -s 0.1 --pid="$CHILD" "$log" 2>/dev/null &
  wait "$CHILD" || status=$?
  CHILD=
  wait
  case "$status" in
    0) record "$name" ok $((SECONDS - began)) ;;
    124 | 137) FAILED=$((FAILED + 1)) && record "$name" FAILED $((SECONDS - began)) "stopped after ${GAUR_STEP_TIMEOUT:-3600} s; $log" ;;
    *) FAILED=$((FAILED + 1)) && record "$name" FAILED $((SECONDS - began)) "exit code $status; $log" ;;
  esac
  printf -- '--- %s: %s, %d s\n' "$name" "${RESULTS[-1]}" "${TIMES[-1]}"
  return "$status"
}

# skip KIND NAME REASON: what was not done, and why. A skipped SPDK step is a failure under GAUR_REQUIRE_SPDK=1, a skipped
# tool one under CI=true. Kind `allowed` is never a failure.
skip() {
  local kind="$1" name="$2" reason="$3" result=SKIPPED
  if { [ "$kind" = spdk ] && [ "${GAUR_REQUIRE_SPDK:-0}" = 1 ]; } || { [ "$kind" = tool ] && [ "${CI:-}" = true ]; }; then
    result=FAILED
    reason="must not be skipped here: $reason"
    FAILED=$((FAILED + 1))
  fi
  printf '\n=== %s\n--- %s: %s: %s\n' "$name" "$name" "$result" "$reason"
  record "$name" "$result" 0 "$reason"
}

# The sum over the `test result:` lines of the logs: passed, failed, ignored.
sum_tests() {
  cat "$LOGS"/*.log 2>/dev/null | awk '
    /^test result: / {
      for (i = 2; i <= NF; i++) {
        if ($i == "passed;") passed += $(i - 1)
        if ($i == "failed;") failed += $(i - 1)
        if ($i == "ignored;") ignored += $(i - 1)
      }
    }
    END { print passed + 0, failed + 0, ignored + 0 }'
}

# The table, the sums, and the status of the whole run. The file `result` in the directory of the logs gets the line
# `N passed, N failed`, in which a failed step without a failed test (clippy, say) counts as one failure.
finish_steps() {
  local i passed failed ignored steps_without_test=0 log
  printf '\n%-34s %-8s %6s  %s\n' step result time note
  for i in "${!NAMES[@]}"; do
    printf '%-34s %-8s %4d s  %s\n' "${NAMES[$i]}" "${RESULTS[$i]}" "${TIMES[$i]}" "${NOTES[$i]}"
    if [ "${RESULTS[$i]}" = FAILED ]; then
      log="$LOGS/$(printf '%02d' "$i")-*.log"
      # shellcheck disable=SC2086 # a pattern
      grep -qsE '^test result: .* [1-9][0-9]* failed;' $log || steps_without_test=$((steps_without_test + 1))
    fi
  done
  read -r passed failed ignored < <(sum_tests)
  printf '\ntests: %d passed, %d failed, %d ignored; logs: %s; %d s in all\n' "$passed" "$failed" "$ignored" "$LOGS" "$SECONDS"
  if printf '%s\n' "${RESULTS[@]}" | grep -q SKIPPED; then
    printf 'skipped:\n'
    for i in "${!NAMES[@]}"; do
      if [ "${RESULTS[$i]}" = SKIPPED ]; then printf '  %s: %s\n' "${NAMES[$i]}" "${NOTES[$i]}"; fi
    done
  fi
  printf '%d passed, %d failed\n' "$passed" $((failed + steps_without_test)) >"$LOGS/result"
  if [ "$FAILED" -gt 0 ]; then
    printf '%d steps failed\n' "$FAILED"
    return 1
  fi
}

# ---------------------------------------------------------------------------------------------------------------------
# Tools and SPDK

# Huge pages of 2 MiB for one SPDK process with a malloc bdev of 2 GiB: the bdev, SPDK's own pools, our buffers.
# (What the messages of bdev-adapter and scripts/spdk.sh suggest too.)
# shellcheck disable=SC2034 # used by the scripts that source this
HUGE_PAGES=1536
# shellcheck disable=SC2034 # the same
SPDK_DEVICE='spdk-bdev:Malloc0?config=scripts/spdk-malloc.json'

# True when spdk-sys will find an SPDK; see spdk-sys/build.rs, which looks in this order.
spdk_is_there() {
  [ -n "${SPDK_DIR:-}" ] || [ -e "$(scripts/spdk.sh prefix)/gaur-stamp" ] || pkg-config --exists spdk_bdev 2>/dev/null
}

# Tests under a model checker, in a build of its own (fs-core/src/sync.rs): loom has all schedules of the lock-free parts, shuttle random
# ones of them and of whole operations.
model_checker() {
  local tests=loom_tests
  if [ "$1" = shuttle ]; then tests=shuttle_tests; fi
  step "$1: $tests" env RUSTFLAGS="--cfg $1" CARGO_TARGET_DIR="$(target_dir)/$1" CARGO_PROFILE_TEST_DEBUG=0 \
    cargo test --locked -p fs-core --lib "$tests"
}

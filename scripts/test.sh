#!/usr/bin/env bash
# Tests everything that this machine allows, and says what it left out and why.
#
#   scripts/test.sh            what `make test` runs
#
# It installs what it needs where it may (root and apt): cargo-deny and SPDK go to ${XDG_CACHE_HOME:-$HOME/.cache}/gaur,
# Debian packages where Debian puts them. It reserves 3 GiB of huge pages for SPDK and leaves them reserved.
#
#   GAUR_REQUIRE_SPDK=1        an SPDK step that would be skipped fails instead (set by .ci/run)
#   GAUR_SKIP_SPDK=1           leave SPDK out
#   GAUR_SEED=N                the seed of every randomised test, to replay a failure
#   GAUR_STEP_TIMEOUT=SECONDS  when a step counts as hung (default 3600)

set -uo pipefail
export LC_ALL=C
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

readonly DENY_VERSION=0.20.2
DENY_ROOT="$(cache_dir)/tools/cargo-deny-$DENY_VERSION"
readonly DENY_ROOT
# A part of a real tree, so that the demo takes seconds in a build with debug assertions.
readonly DEMO=(demo --max-files 400 --max-bytes 48MiB --probe-time 300ms)

main() {
  begin_steps test-logs
  check_toolchain
  checks
  default_tests
  spdk_tests
  finish_steps
}

# ---------------------------------------------------------------------------------------------------------------------
# Tools

check_toolchain() {
  have cargo || die "cargo is not on PATH" "install Rust 1.89 or later, with rustup for example"
  have cc || die "no C compiler (cc), which Rust needs for linking" "on Debian: apt-get install gcc"
  note "$(rustc --version), $(nproc) processors"
  # A minimal toolchain has neither; rustup can add them.
  if have rustup && { ! cargo fmt --version || ! cargo clippy --version; } >/dev/null 2>&1; then
    rustup component add rustfmt clippy || true
  fi
}

checks() {
  if cargo fmt --version >/dev/null 2>&1; then
    step "rustfmt" cargo fmt --all -- --check --color never
  else
    skip tool "rustfmt" "this toolchain has no rustfmt (rustup component add rustfmt)"
  fi
  step "documents" scripts/check-docs.sh
  if get_cargo_deny; then
    step "cargo-deny: licences, bans, sources" "$DENY" --locked check --hide-inclusion-graph licenses bans sources
    advisories
  fi
  if cargo clippy --version >/dev/null 2>&1; then
    step "clippy" cargo clippy --locked --all-targets -- -D warnings
  else
    skip tool "clippy" "this toolchain has no clippy (rustup component add clippy)"
  fi
}

# Sets DENY. Built once, unoptimised: that takes half the time, and a check takes seconds all the same.
get_cargo_deny() {
  DENY="$DENY_ROOT/bin/cargo-deny"
  if [ -x "$DENY" ]; then return 0; fi
  if step "cargo-deny: build" env CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$DENY_ROOT.build" \
    cargo install --locked --debug --root "$DENY_ROOT" --version "$DENY_VERSION" cargo-deny; then
    rm -rf "$DENY_ROOT.build"
    return 0
  fi
  return 1
}

# The advisory database is not on the package registry, and not every machine reaches it. A database that cannot be had
# proves nothing, so that is not a pass; an advisory that was found fails.
advisories() {
  local name="cargo-deny: advisories" output
  if output="$(timeout 60 "$DENY" --locked fetch db </dev/null 2>&1)"; then
    step "$name" "$DENY" --locked check --hide-inclusion-graph --disable-fetch advisories
  else
    printf '%s\n' "$output" >"$LOGS/advisories-fetch.txt"
    skip allowed "$name" "the advisory database could not be fetched ($(reason_of "$output"))"
  fi
}

# The most telling line of what a command said.
reason_of() {
  local line
  line="$(printf '%s\n' "$1" | grep -iE 'error|fail|timed|resolve' | tail -n 1 | sed 's/^[[:space:]]*//' | cut -c1-160)"
  printf '%s' "${line:-no answer within a minute}"
}

# ---------------------------------------------------------------------------------------------------------------------
# Without SPDK: no root, no huge pages

default_tests() {
  # The crates of the workspace's default-members: all but spdk-sys. This builds examples and programs too.
  step "tests" cargo test --locked --no-fail-fast
  model_checker loom
  model_checker shuttle
  step "example: quickstart" "$(target_dir)/debug/examples/quickstart"
  step "example: futures" "$(target_dir)/debug/examples/futures"
  # The device is a file in the build directory (or TMPDIR), removed at the end: /tmp may be memory, and small.
  step "demo on a file" env TMPDIR="${TMPDIR:-$(target_dir)}" "$(target_dir)/debug/bench" "${DEMO[@]}"
}

# ---------------------------------------------------------------------------------------------------------------------
# With SPDK

spdk_tests() {
  local features=(--features "bdev-adapter/spdk,bench/spdk")
  local crates=(-p spdk-sys -p bdev-adapter -p fs-core -p bench)
  if [ "${GAUR_SKIP_SPDK:-0}" = 1 ]; then
    skip spdk "SPDK" "GAUR_SKIP_SPDK=1"
    return
  fi
  get_spdk || return
  if cargo clippy --version >/dev/null 2>&1; then
    step "clippy with SPDK" cargo clippy --locked "${crates[@]}" "${features[@]}" --all-targets -- -D warnings
  fi
  if ! get_huge_pages; then
    # What can be had without: it compiles, links, and the bindings agree with the headers.
    step "build with SPDK" cargo test --locked "${crates[@]}" "${features[@]}" --no-run
    step "tests of spdk-sys" cargo test --locked --no-fail-fast -p spdk-sys
    guest_tests
    return
  fi
  # From here on a test that finds no huge pages is a failure, not one that passes because it did nothing.
  step "tests with SPDK" env GAUR_REQUIRE_SPDK=1 cargo test --locked --no-fail-fast "${crates[@]}" "${features[@]}"
  step "demo on an SPDK malloc bdev" "$(target_dir)/debug/bench" "${DEMO[@]}" --device "$SPDK_DEVICE"
  tcp_tests
  guest_tests
}

# SPDK's NVMe driver over TCP, against SPDK's own target on loopback. (Targets that are killed, frozen, slow or false are
# among the tests above.)
tcp_tests() {
  local test=(cargo test --locked "${crates[@]}" "${features[@]}") disk
  disk="$(target_dir)/test-logs/nvmf-disk.img"
  step "NVMe/TCP: conformance" scripts/nvmf.sh with --file "$disk" --size 1024 --block 512 -- \
    env GAUR_REQUIRE_NVME=1 "${test[@]}" --test conformance_nvme --test allocations
  step "NVMe/TCP: model" scripts/nvmf.sh with --file "$disk" -- "${test[@]}" --test model -- --test-threads 1
  step "NVMe/TCP: demo" scripts/nvmf.sh with --file "$disk" -- \
    "$(target_dir)/debug/bench" "${DEMO[@]}" --force --device '{}'
  rm -f "$disk"
}

# SPDK's NVMe driver over PCIe, in a virtual machine with an emulated controller: what was built above, packed. It needs
# neither root nor huge pages of this machine.
guest_tests() {
  if ! may_install && ! { have qemu-system-x86_64 && have cpio && have apt-get; }; then
    skip spdk "tests in a guest" "QEMU, cpio or apt-get is missing, and this user may not install Debian packages"
    return
  fi
  step "guest: image" scripts/guest.sh build || return
  step "guest: pack" scripts/guest-tests.sh pack || return
  step "guest: conformance over NVMe" scripts/guest-tests.sh conformance
  step "guest: demo over NVMe" scripts/guest-tests.sh demo
  step "guest: power cuts" scripts/guest-tests.sh powercut
  step "guest: a lying drive is noticed" scripts/guest-tests.sh liar
  step "guest: stalls, resets, removal" scripts/guest-tests.sh misbehave
}

get_spdk() {
  local name="SPDK: get, build, install"
  if [ -n "${SPDK_DIR:-}" ]; then
    note "SPDK: the one at SPDK_DIR=$SPDK_DIR"
    return 0
  fi
  if may_install; then
    step "$name" scripts/spdk.sh install
    return
  fi
  if spdk_is_there; then return 0; fi
  skip spdk "SPDK" "not installed, and this user may not install Debian packages; run \`make spdk\` as root, or set SPDK_DIR"
  return 1
}

get_huge_pages() {
  local name="SPDK: huge pages" output
  if output="$(scripts/spdk.sh hugepages "$HUGE_PAGES" </dev/null 2>&1)"; then
    printf '\n%s\n' "$output"
    return 0
  fi
  printf '\n%s\n' "$output"
  skip spdk "tests with SPDK" "$(reason_of "$output")"
  skip spdk "demo on an SPDK malloc bdev" "the same"
  return 1
}

main

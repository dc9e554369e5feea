#!/usr/bin/env bash
# `bench compare` in a release build: figures side by side with their peers. With SPDK if it is installed, else on memory.
#
#   scripts/bench.sh [ARGUMENTS]       --list, --only METRIC, --repeats N, --json, ...

set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

have cargo || die "cargo is not on PATH" "install Rust 1.89 or later, with rustup for example"
features=()
if spdk_is_there; then
  # Beside the device under test, rows run programs of SPDK's with 2 GiB of their own, others make a bdev of 5 GiB; without
  # that they are skipped.
  for more in $((1472 + 2560)) 1472 0; do
    scripts/spdk.sh hugepages $((HUGE_PAGES + more)) >&2 && break
  done
  features=(--features spdk)
else
  printf 'SPDK is not installed (make spdk installs it): measuring on memory\n' >&2
fi
cargo build --locked --release -p bench "${features[@]}"
exec "$(target_dir)/release/bench" compare "$@"

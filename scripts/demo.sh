#!/usr/bin/env bash
# The main job, `bench demo`, in a release build.
#
#   scripts/demo.sh file [ARGUMENTS]   on a temporary file in the build directory (or TMPDIR), removed at the end
#   scripts/demo.sh spdk [ARGUMENTS]   on an SPDK malloc bdev of 2 GiB; gets SPDK and huge pages first if it must
#
# ARGUMENTS go to `bench demo`; with `--device URI` it runs there instead.

set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

have cargo || die "cargo is not on PATH" "install Rust 1.89 or later, with rustup for example"
kind="${1:-}"
shift || true
case "$kind" in
  file)
    cargo build --locked --release -p bench
    # The build directory is on a disk; /tmp may be memory, and small.
    export TMPDIR="${TMPDIR:-$(target_dir)}"
    exec "$(target_dir)/release/bench" demo "$@"
    ;;
  spdk)
    spdk_is_there || scripts/spdk.sh install
    scripts/spdk.sh hugepages "$HUGE_PAGES"
    cargo build --locked --release -p bench --features spdk
    case " $* " in
      *" --device "* | *" --device="* | *" -d "*) ;;
      *) set -- --device "$SPDK_DEVICE" "$@" ;;
    esac
    exec "$(target_dir)/release/bench" demo "$@"
    ;;
  *) die "file or spdk?" "$0 file [ARGUMENTS]" "$0 spdk [ARGUMENTS]" ;;
esac

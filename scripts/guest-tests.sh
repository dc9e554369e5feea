#!/usr/bin/env bash
# The tests that want an NVMe controller, in a guest that has one (scripts/guest.sh): SPDK's NVMe driver over PCIe.
#
#   scripts/guest-tests.sh all           builds and packs the programs, runs all that follow, and prints a table
#   scripts/guest-tests.sh build         builds the programs, with SPDK
#   scripts/guest-tests.sh pack          packs them for the guest
#   scripts/guest-tests.sh conformance   the conformance suite on a namespace of 512-byte and one of 4096-byte sectors
#   scripts/guest-tests.sh demo          a small demo
#   scripts/guest-tests.sh powercut [OPTION]...
#                                        power cuts; options are those of scripts/powercut.sh (--cuts 20, --seed 7).
#                                        `all` takes them too
#   scripts/guest-tests.sh liar          power cuts with a drive that lies about flushes: must go red
#   scripts/guest-tests.sh misbehave     commands that stall, resets of the controller under load, and its removal
#
#   GAUR_GUEST_DEVICE=URI   the device in the guest; `%N` becomes the number of the namespace
#
# The parts take the programs as they were packed last. No root, no huge pages of the host.

set -euo pipefail
export LC_ALL=C
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

DEVICE="${GAUR_GUEST_DEVICE:-spdk-nvme:pcie:0000:00:04.0?ns=%N}"
PACK="$(target_dir)/guest-pack.cpio"
readonly DEVICE PACK
# Emulation is some ten times slower than the machine.
readonly CONFORMANCE_LIMIT_S=600 DEMO_LIMIT_S=300 MISBEHAVE_LIMIT_S=240
# Where a drive begins to stall, and how long a command takes there (bdev-adapter/tests/nvme_pcie.rs knows).
readonly STALLS_FROM=$((32 << 20)) STALL_TIME=4500ms

IMAGES="$(mktemp -d "${TMPDIR:-$(target_dir)}/gaur-guest-disks.XXXXXX")"
# A path for a socket may be 107 bytes long, so not below the build directory.
SOCKETS="$(mktemp -d "${TMPDIR:-/tmp}/gaur-guest-sockets.XXXXXX")"
DRIVE_PID=''

cleanup() {
  local pid
  # QEMU removes its file when it ends by itself.
  for pid in $(cat "$SOCKETS/qemu.pid" 2>/dev/null) $DRIVE_PID; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$IMAGES" "$SOCKETS"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

device() { printf '%s' "${DEVICE//%N/$1}"; }

# A sparse image of $2 in $IMAGES/$1.
image() {
  truncate -s "$2" "$IMAGES/$1"
  printf '%s' "$IMAGES/$1"
}

# Features and crates are those of scripts/test.sh, so that nothing is built twice.
readonly CRATES=(-p spdk-sys -p bdev-adapter -p fs-core -p bench) FEATURES=(--features "bdev-adapter/spdk,bench/spdk")

# The test program $1, as cargo names it: the build directory may hold others of that name, with other features or older.
test_program() {
  local path
  path="$(cargo test --locked "${CRATES[@]}" "${FEATURES[@]}" --test "$1" --no-run --message-format json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)"
  [ -n "$path" ] || die "the test program $1 is not built" "$0 build"
  printf '%s' "$path"
}

build() {
  spdk_is_there || die "SPDK is not installed" "make spdk"
  cargo test --locked "${CRATES[@]}" "${FEATURES[@]}" --no-run
}

pack() {
  local conformance misbehave
  conformance="$(test_program conformance_nvme)"
  misbehave="$(test_program nvme_pcie)"
  [ -x "$(target_dir)/debug/bench" ] || die "there is no $(target_dir)/debug/bench"
  # The demo's files are sources of this project: real ones, and everybody has them.
  scripts/guest.sh pack "$PACK" --program "$conformance=conformance" --program "$misbehave=misbehave" --program "$(target_dir)/debug/bench" \
    --tree fs-core/src=files/fs-core --tree bdev-adapter/src=files/bdev-adapter \
    --file scripts/guest-nvme.json=nvme.json
}

need_pack() { [ -e "$PACK" ] || pack; }

conformance() {
  need_pack
  local namespace
  for namespace in 1 2; do
    note "namespace $namespace"
    scripts/guest.sh run --pack "$PACK" --disk "$(image small 128M)" --disk "$(image large 128M),4096" \
      --time-limit "$CONFORMANCE_LIMIT_S" -- \
      env GAUR_REQUIRE_NVME=1 "GAUR_NVME_URI=$(device "$namespace")" conformance --test-threads=1
  done
}

demo() {
  need_pack
  scripts/guest.sh run --pack "$PACK" --disk "$(image small 16M)" --disk "$(image demo 256M),4096" \
    --time-limit "$DEMO_LIMIT_S" -- \
    bench demo --device "$(device 2)" --import /files --max-files 100 --max-bytes 8MiB --probe-time 500ms
}

# QEMU 7.2 takes the FUA bit of a write and ignores it.
cut_device() { printf '%s&fua=flush' "$(device 1)"; }

powercut() {
  need_pack
  scripts/powercut.sh --pack "$PACK" --device "$(cut_device)" "$@"
}

# A test that cannot fail proves nothing: with flushes that do nothing, something must be missed within a few cuts.
liar() {
  need_pack
  local log="$IMAGES/liar.log" seed
  if scripts/powercut.sh --pack "$PACK" --device "$(cut_device)" --lie --cuts 6 "$@" >"$log" 2>&1; then
    cat "$log"
    die "six cuts of a drive that lies about its flushes, and nothing was missed"
  fi
  cat "$log"
  grep -qE 'FAILED: .*(LOST|cannot mount|is not round|the check found)' "$log" || die "it failed, but not because something was missed"
  note "noticed, as it must be"
  seed="$(sed -n 's/.*replay with --seed \([0-9]*\)$/\1/p' "$log" | head -n 1)"
  rm -rf "$(target_dir)/guest-logs/powercut-$seed"
}

misbehave() {
  need_pack
  stalls
  removal
}

# A drive that takes its time for some commands, which is noticed: they are aborted, which QEMU's controller does not do, and
# then the controller is reset.
stalls() {
  local waited=0 log="$IMAGES/drive.log" status=0
  note "commands that stall, and resets"
  "$(target_dir)/debug/bench" powercut drive --image "$(image stalls 64M)" --socket "$SOCKETS/drive" \
    --stall-from "$STALLS_FROM" --stall-for "$STALL_TIME" >"$log" 2>&1 </dev/null &
  DRIVE_PID=$!
  until [ -S "$SOCKETS/drive" ]; do
    waited=$((waited + 1))
    [ "$waited" -lt 500 ] || die "the drive does not start: $(cat "$log")"
    sleep 0.02
  done
  guest_misbehaves "GAUR_NVME_STALLS_FROM=$STALLS_FROM" --disk "nbd:unix:$SOCKETS/drive" || status=$?
  wait "$DRIVE_PID" || status=$?
  DRIVE_PID=
  cat "$log"
  return "$status"
}

# The controller is pulled out when the test says so on the console: QEMU tells the guest's kernel (ACPI), which takes it away
# from the process and lets it go.
removal() {
  local log guest status=0
  note "removal"
  log="$(target_dir)/guest-logs/removal-$$.log"
  mkdir -p "$(target_dir)/guest-logs"
  : >"$log"
  guest_misbehaves GAUR_NVME_REMOVAL=1 --disk "$(image removal 64M)" --monitor "$SOCKETS/monitor" --log "$log" &
  guest=$!
  until grep -q '^gaur-test: remove the device' "$log" || ! kill -0 "$guest" 2>/dev/null; do sleep 0.05; done
  # Opened for reading too, so that nobody waits for a QEMU that has ended.
  if [ -p "$SOCKETS/monitor.in" ]; then printf 'device_del nvme0\n' 1<>"$SOCKETS/monitor.in"; fi
  wait "$guest" || status=$?
  if [ "$status" -eq 0 ]; then rm -f "$log"; fi
  return "$status"
}

# The tests of a device that misbehaves, with a setting for them and options for the guest.
guest_misbehaves() {
  local setting="$1"
  shift
  scripts/guest.sh run --pack "$PACK" --pid-file "$SOCKETS/qemu.pid" --time-limit "$MISBEHAVE_LIMIT_S" "$@" -- \
    env "$setting" "GAUR_NVME_URI=$(device 1)" misbehave --test-threads=1 --nocapture
}

all() {
  begin_steps guest-test-logs
  step "guest: image" scripts/guest.sh build
  step "guest: programs" "$0" build
  step "guest: pack" "$0" pack
  step "guest: conformance over NVMe" "$0" conformance || true
  step "guest: demo over NVMe" "$0" demo || true
  step "guest: power cuts" "$0" powercut "$@" || true
  step "guest: a lying drive is noticed" "$0" liar || true
  step "guest: stalls, resets, removal" "$0" misbehave || true
  finish_steps
}

case "${1:-}" in
  all | build | pack | conformance | demo | powercut | liar | misbehave) "$@" ;;
  *)
    sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"
    [ "${1:-}" = --help ] || exit 2
    ;;
esac

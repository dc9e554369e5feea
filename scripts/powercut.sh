#!/usr/bin/env bash
# Power cuts: a guest writes to an NVMe drive and syncs for ever; QEMU is killed at some moment; what was acknowledged must
# be there.
#
#   scripts/powercut.sh [OPTION]...
#
#   --pack FILE     what `guest.sh pack` made of a `bench` built with SPDK
#   --device URI    the device in the guest (default spdk-nvme:pcie:0000:00:04.0)
#   --cuts N        how often (default 3)
#   --seed N        of the workload, of the moments, and of what survives in the drive's cache (default: random, printed)
#   --size SIZE     of the drive (default 128M: small, so that blocks come round and are used again)
#   --sector BYTES  of the drive, 512 or 4096 (default 512)
#   --lie           the drive acknowledges flushes and FUA without doing them. The run must go red; if it does not, the
#                   test is worth nothing
#
# Three of four cuts come at a command that the drive counts, as likely at one as at another; the rest at some time.
#
# The drive is `bench powercut drive`: it keeps completed writes in a cache, until a flush. When QEMU is killed it sees its
# connection end, loses the cache but for a part drawn from the seed, and tears writes at sectors. (A killed QEMU over a plain
# image proves less: whatever reached the host's page cache is still there, flushed or not.)
#
# Each cut but the first begins with what the last one left: the guest mounts it, checks it, compares every byte with what
# the seed says, and goes on writing. After the last cut it only verifies.
#
# The seed replays workload, delays and draws; not the moment to the microsecond. When something is wrong, the image and
# the consoles of all boots stay.

set -euo pipefail
export LC_ALL=C
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# A cut comes at most so long after the first acknowledgement.
readonly DELAY_MS_MAX=3000
readonly READY_LIMIT_S=120
# A cut comes at most so many writes and flushes after a boot. Making the filesystem takes some.
readonly COMMANDS_MAX=300 COMMANDS_TO_FORMAT=40

PACK='' CUTS=3 SEED='' SIZE=128M SECTOR=512 LIE=() CUT_AFTER=()
# QEMU 7.2 takes the FUA bit of a write and ignores it.
DEVICE='spdk-nvme:pcie:0000:00:04.0?fua=flush'
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h)
      sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --lie)
      LIE=(--lie)
      shift
      continue
      ;;
    --pack | --device | --cuts | --seed | --size | --sector) [ $# -ge 2 ] || die "$1 needs a value" ;;
    *) die "what is $1?" "$0 --help" ;;
  esac
  case "$1" in
    --pack) PACK="$2" ;;
    --device) DEVICE="$2" ;;
    --cuts) CUTS="$2" ;;
    --seed) SEED="$2" ;;
    --size) SIZE="$2" ;;
    --sector) SECTOR="$2" ;;
  esac
  shift 2
done
[ -n "$PACK" ] || die "--pack is missing" "scripts/guest.sh pack pack.cpio --program target/debug/bench"
BENCH="$(target_dir)/debug/bench"
[ -x "$BENCH" ] || die "there is no $BENCH" "cargo build -p bench"
SEED="${SEED:-$((($(date +%s%N) / 1000) % 1000000007))}"
RANDOM=$((SEED % 32768))

WORK="$(target_dir)/guest-logs/powercut-$SEED"
rm -rf "$WORK"
mkdir -p "$WORK"
readonly IMAGE="$WORK/drive.img"
# A path for a socket may be 107 bytes long, so not below the build directory.
SOCKETS="$(mktemp -d "${TMPDIR:-/tmp}/gaur-powercut.XXXXXX")"
DRIVE_PID='' GUEST_PID=''
truncate -s "$SIZE" "$IMAGE"

cleanup() {
  kill_qemu
  if [ -n "$GUEST_PID" ]; then kill "$GUEST_PID" 2>/dev/null || true; fi
  if [ -n "$DRIVE_PID" ]; then kill "$DRIVE_PID" 2>/dev/null || true; fi
  rm -rf "$SOCKETS"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

kill_qemu() {
  local pid
  pid="$(cat "$SOCKETS/qemu.pid" 2>/dev/null || true)"
  rm -f "$SOCKETS/qemu.pid"
  if [ -n "$pid" ]; then kill -KILL "$pid" 2>/dev/null || true; fi
}

fail() {
  printf 'powercut: FAILED: %s\n' "$1"
  printf 'powercut: replay with --seed %s; image and consoles: %s\n' "$SEED" "$WORK"
  exit 1
}

# Starts drive and guest for boot $1, with the rest as the guest's command. The console goes to $LOG.
boot() {
  local number="$1" waited=0
  shift
  LOG="$WORK/boot-$number.log"
  : >"$LOG"
  "$BENCH" powercut drive --image "$IMAGE" --socket "$SOCKETS/drive" --seed "$((SEED + number))" --sector "$SECTOR" \
    "${LIE[@]}" "${CUT_AFTER[@]}" >"$WORK/drive-$number.log" 2>&1 </dev/null &
  DRIVE_PID=$!
  until [ -S "$SOCKETS/drive" ]; do
    waited=$((waited + 1))
    [ "$waited" -lt 500 ] || fail "the drive does not start: $(cat "$WORK/drive-$number.log")"
    sleep 0.02
  done
  scripts/guest.sh run --pack "$PACK" --disk "nbd:unix:$SOCKETS/drive,$SECTOR" --time-limit 300 --log "$LOG" \
    --pid-file "$SOCKETS/qemu.pid" -- bench powercut "$@" >"$WORK/guest-$number.log" 2>&1 </dev/null &
  GUEST_PID=$!
}

# The guest's status, after drive and guest have ended.
ended() {
  local status=0
  wait "$GUEST_PID" || status=$?
  GUEST_PID=
  wait "$DRIVE_PID" || fail "the drive failed: $(cat "$WORK/drive-$1.log")"
  DRIVE_PID=
  return "$status"
}

# The last acknowledged round on the console. A line that was cut off does not count.
acknowledged() { tr -d '\r' <"$LOG" | sed -n '/^powercut: durable [0-9]*$/ s/.* //p' | tail -n 1; }

# A last line without its end would pass for a shorter number.
drop_unfinished_line() {
  if [ -s "$LOG" ] && [ "$(tail -c 1 "$LOG" | wc -l)" -eq 0 ]; then sed -i '$d' "$LOG"; fi
}

# Waits until file $2 of boot $1 has a line that begins with $3.
wait_for() {
  local began=$SECONDS
  until grep -q "^$3" "$2"; do
    if ! kill -0 "$GUEST_PID" 2>/dev/null; then fail "boot $1 ended by itself: $(end_of_console)"; fi
    [ $((SECONDS - began)) -lt "$READY_LIMIT_S" ] || fail "boot $1: no '$3' within $READY_LIMIT_S s: $(end_of_console)"
    sleep 0.02
  done
}

end_of_console() { grep -v '^gaur-guest:\|reboot:' "$LOG" | tail -n 3 | tr '\n\r' '; '; }

sleep_ms() { sleep "$(printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)))"; }

acked=0 syncs=0 beyond=0 began=$SECONDS
printf 'powercut: %d cuts, %s, sectors of %s bytes, replay with --seed %s\n' "$CUTS" "$DEVICE" "$SECTOR" "$SEED"

# The round that the last boot found, or nothing when the cut came before it could say so.
verified() { sed -n 's/^powercut: verified \([0-9]*\) .*/\1/p' "$LOG"; }

# What the console of a boot says, into the sums. What was found on the medium is durable as well.
count() {
  local found now
  found="$(verified)"
  now="$(acknowledged)"
  beyond=$((beyond + ${found:-$acked} - acked))
  acked="${found:-$acked}"
  syncs=$((syncs + ${now:-$acked} - acked))
  acked="${now:-$acked}"
}

for cut in $(seq 1 "$CUTS"); do
  begin=(--acked "$acked")
  at=$((1 + RANDOM % COMMANDS_MAX)) delay=$((RANDOM * DELAY_MS_MAX / 32768))
  if [ "$cut" -eq 1 ]; then begin=(--format) at=$((at + COMMANDS_TO_FORMAT)); fi
  CUT_AFTER=(--cut-after "$at") moment="at command $at"
  if [ $((RANDOM % 4)) -eq 0 ]; then CUT_AFTER=() moment="after $delay ms"; fi
  boot "$cut" write --device "$DEVICE" --seed "$SEED" "${begin[@]}"
  if [ ${#CUT_AFTER[@]} -gt 0 ]; then
    wait_for "$cut" "$WORK/drive-$cut.log" 'drive: '
  else
    wait_for "$cut" "$LOG" 'powercut: durable '
    sleep_ms "$delay"
  fi
  kill_qemu
  status=0
  ended "$cut" || status=$?
  [ "$status" -eq 126 ] || fail "boot $cut ended by itself, status $status: $(end_of_console)"
  drop_unfinished_line
  count
  printf '  cut %d %s: %s; acknowledged: %d\n' "$cut" "$moment" "$(tail -n 1 "$WORK/drive-$cut.log")" "$acked"
done
CUT_AFTER=()
last=$((CUTS + 1))
boot "$last" verify --device "$DEVICE" --seed "$SEED" --acked "$acked"
ended "$last" || fail "the last verification: $(end_of_console)"
count
printf 'powercut: %d cuts, %d syncs acknowledged, none lost; %d more were whole without being acknowledged; %d s\n' \
  "$CUTS" "$syncs" "$beyond" $((SECONDS - began))
rm -rf "$WORK"

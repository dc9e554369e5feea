#!/usr/bin/env bash
# Runs SPDK's NVMe-oF target with one subsystem over NVMe/TCP on loopback, for tests and measurements.
#
#   scripts/nvmf.sh run [--file PATH] [--size MIB] [--block BYTES] [--port N] [--core N]
#   scripts/nvmf.sh uri [--port N]
#   scripts/nvmf.sh with [OPTIONS OF run]... -- COMMAND...
#
# `run` stays in the foreground, as nvmf_tgt itself (kill it, or press Ctrl-C); it prints "listening" when it can be
# connected to. `uri` prints the device URI for Gaur. `with` runs a command beside a target, with that URI in GAUR_NVME_URI and
# GAUR_DEVICE, and for `{}` among its arguments; the target goes with it. What it serves:
#
#   --file PATH    an aio bdev over this file, made with --size if it does not exist; its content survives the target
#   (none)         a malloc bdev
#   --size MIB     default 256
#   --block BYTES  default 4096
#   --port N       default 4420
#   --core N       the CPU that it keeps busy (default: the last)
#   --delay US     the time that every I/O takes, in microseconds
#   --rpc PATH     where the target's RPC socket is (default: a temporary name)
#   --config PATH  all of that from an SPDK configuration of your own; "listening" is said once --port accepts
#
# Example:
#
#   scripts/nvmf.sh run --file disk.img --size 1024 &
#   cargo run --release --features spdk -p bench -- demo --device "$(scripts/nvmf.sh uri)"

set -euo pipefail
export LC_ALL=C
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
trap - INT TERM

readonly NQN=nqn.2016-06.io.spdk:gaur

main() {
  local command="${1:-}" file='' size=256 block=4096 port=4420 core delay=0 config='' rpc=''
  core=$(($(nproc) - 1))
  [ "$#" -gt 0 ] && shift
  while [ "$#" -gt 0 ]; do
    case "$1" in
      --file) file="$2" ;;
      --size) size="$2" ;;
      --block) block="$2" ;;
      --port) port="$2" ;;
      --core) core="$2" ;;
      --delay) delay="$2" ;;
      --config) config="$2" ;;
      --rpc) rpc="$2" ;;
      --)
        shift
        break
        ;;
      *) die "unknown option '$1'" "see the head of scripts/nvmf.sh" ;;
    esac
    shift 2 || die "an option needs a value"
  done
  case "$command" in
    run) run ;;
    with) with "$@" ;;
    uri) printf 'spdk-nvme:tcp:127.0.0.1:%d/%s\n' "$port" "$NQN" ;;
    *)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      [ "$command" = --help ] || [ "$command" = -h ] || exit 2
      ;;
  esac
}

program() {
  local prefix dir
  for prefix in "${SPDK_DIR:-}" "$(scripts/spdk.sh prefix)"; do
    for dir in "$prefix/bin" "$prefix/build/bin"; do
      if [ -x "$dir/nvmf_tgt" ]; then printf '%s' "$dir/nvmf_tgt" && return; fi
    done
  done
  die "there is no nvmf_tgt" "run \`make spdk\`, or set SPDK_DIR to an SPDK with its programs"
}

with() {
  [ "$#" -gt 0 ] || die "there is no command after --"
  local uri log target status=0 argument command=()
  uri="$(printf 'spdk-nvme:tcp:127.0.0.1:%d/%s' "$port" "$NQN")"
  for argument in "$@"; do command+=("${argument//\{\}/$uri}"); done
  log="$(mktemp)"
  run >"$log" 2>&1 &
  target=$!
  # shellcheck disable=SC2064 # now is right
  trap "kill -9 $target 2>/dev/null; rm -f '$log'" EXIT
  until grep -q '^listening$' "$log"; do
    kill -0 "$target" 2>/dev/null || { cat "$log" >&2 && die "the target did not start"; }
    sleep 0.1
  done
  GAUR_NVME_URI="$uri" GAUR_DEVICE="$uri" "${command[@]}" || status=$?
  [ "$status" -eq 0 ] || cat "$log" >&2
  exit "$status"
}

run() {
  local work bdev lowest=Disk0
  program >/dev/null
  work="$(mktemp -d)"
  if [ -n "$file" ]; then
    [ -e "$file" ] || truncate -s "${size}M" "$file"
    bdev=$(printf '{"method":"bdev_aio_create","params":{"name":"%s","filename":"%s","block_size":%d}}' \
      "$lowest" "$(realpath "$file")" "$block")
  else
    bdev=$(printf '{"method":"bdev_malloc_create","params":{"name":"%s","num_blocks":%d,"block_size":%d}}' \
      "$lowest" $((size * 1048576 / block)) "$block")
  fi
  if [ "$delay" -gt 0 ]; then
    bdev=$(printf '%s,\n{"method":"bdev_delay_create","params":{"base_bdev_name":"%s","name":"Slow0",
      "avg_read_latency":%d,"p99_read_latency":%d,"avg_write_latency":%d,"p99_write_latency":%d}}' \
      "$bdev" "$lowest" "$delay" "$delay" "$delay" "$delay")
    lowest=Slow0
  fi
  cat >"$work/config.json" <<JSON
{ "subsystems": [
  { "subsystem": "bdev", "config": [ $bdev ] },
  { "subsystem": "nvmf", "config": [
    { "method": "nvmf_create_transport", "params": { "trtype": "TCP", "max_queue_depth": 128 } },
    { "method": "nvmf_create_subsystem",
      "params": { "nqn": "$NQN", "allow_any_host": true, "serial_number": "GAUR0001", "max_namespaces": 4 } },
    { "method": "nvmf_subsystem_add_ns",
      "params": { "nqn": "$NQN", "namespace": { "nsid": 1, "bdev_name": "$lowest",
        "nguid": "00112233445566778899AABBCCDDEEFF" } } },
    { "method": "nvmf_subsystem_add_listener", "params": { "nqn": "$NQN", "listen_address":
      { "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "$port" } } } ] } ] }
JSON
  if [ -n "$config" ]; then cp "$config" "$work/config.json"; fi
  BASHPID_OF_TARGET="$BASHPID"
  # Says when it can be connected to, and takes the files away; gives up with the target.
  (
    for _ in $(seq 600); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo listening && break; fi
      kill -0 "$BASHPID_OF_TARGET" 2>/dev/null || break
      sleep 0.05
    done
    rm -rf "$work" "/dev/shm/nvmf_trace.$port"
  ) &
  # No files that a killed target would leave behind: neither in hugetlbfs nor, with its traces, in /dev/shm.
  # Memory for the bdev is taken as it is needed: what is reserved beforehand is of no use to it where it is in pieces, and
  # the bdev would take as much again.
  exec "$(program)" --json "$work/config.json" -r "${rpc:-$work.sock}" -m "[$core]" -s 128 \
    --huge-unlink --num-trace-entries 16 --no-pci --silence-noticelog -i "$port"
}

main "$@"

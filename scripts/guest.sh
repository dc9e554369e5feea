#!/usr/bin/env bash
# A small virtual machine with an emulated NVMe controller, for SPDK's NVMe driver over PCIe on machines without a drive.
#
#   scripts/guest.sh build
#       makes kernel and base image from Debian packages, once; a second run does nothing
#   scripts/guest.sh pack OUT [--program PATH[=NAME]]... [--tree DIR[=NAME]]... [--file PATH=NAME]...
#       packs programs with their shared libraries (found by name in the guest's PATH), directory trees and files
#   scripts/guest.sh run [OPTION]... -- COMMAND [ARGUMENT]...
#       boots, runs the command in the guest, prints its console and ends with its exit status
#
# Options of `run`:
#   --pack FILE           what `pack` made; may be given several times
#   --disk FILE[,BYTES]   a namespace of the controller 0000:00:04.0, with sectors of 512 (default) or 4096 bytes: the first
#                         is namespace 1, and so on. FILE is a raw image, or nbd:unix:SOCKET
#   --time-limit SECONDS  after which the guest hangs (default 300)
#   --log FILE            where the console goes; default: a file that stays only when the run fails
#   --pid-file FILE       where QEMU's process id is written, for who wants to cut the power
#   --monitor PATH        a pipe PATH.in is made that takes commands of QEMU's monitor, for who wants to pull the controller
#                         out: `device_del nvme0`; the answers come from PATH.out
#   --huge-pages N        of 2 MiB, for SPDK in the guest (default 256)
#   --memory MIB          of the guest (default 1536)
#
# Exit status of `run`: the command's; 124 when the time limit passed; 125 when the guest could not be prepared; 126 when it
# ended without a word (a kernel panic, a killed QEMU).
#
# Examples:
#   truncate -s 256M /tmp/disk.img
#   scripts/guest.sh pack /tmp/pack.cpio --program target/debug/bench
#   scripts/guest.sh run --pack /tmp/pack.cpio --disk /tmp/disk.img -- bench mkfs --device spdk-nvme:pcie:0000:00:04.0
#
# How it works: QEMU emulates processor and controller (no KVM, no root, no hardware). The kernel is Debian's for clouds,
# unpacked and not installed. The initramfs is a row of archives: a base (busybox, two kernel modules, guest-init.sh), the
# packs, and the command. Everything lives in ${XDG_CACHE_HOME:-$HOME/.cache}/gaur/guest.

set -euo pipefail
export LC_ALL=C
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Counts changes to how the base image is made, beside those of guest-init.sh.
readonly RECIPE=1
readonly KERNEL_PACKAGE=linux-image-cloud-amd64
# What must be installed; kernel and busybox are only unpacked.
readonly PACKAGES=(qemu-system-x86 cpio)
GUEST_CACHE="$(cache_dir)/guest"
readonly GUEST_CACHE

WORK=
trap '[ -z "$WORK" ] || rm -rf "$WORK"' EXIT

usage() { sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"; }

# ---------------------------------------------------------------------------------------------------------------------
# Packages and the base image

image_dir() {
  local key
  key="$(sha256sum scripts/guest-init.sh | cut -c1-12)"
  printf '%s/%s-%s' "$GUEST_CACHE" "$RECIPE" "$key"
}

is_built() { [ -e "$(image_dir)/complete" ]; }

tools_are_there() { have qemu-system-x86_64 && have cpio; }

# The package lists of a fresh machine are empty.
apt_update() { apt-get -o Acquire::Retries=3 update >"$1" 2>&1 </dev/null || true; }

install_tools() {
  tools_are_there && return
  may_install || die "QEMU or cpio is missing, and this user may not install Debian packages. Run:" \
    "sudo apt-get update && sudo apt-get install -y --no-install-recommends ${PACKAGES[*]}" "and then this command again"
  note "installing ${PACKAGES[*]}"
  apt_update "$WORK/apt.log"
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${PACKAGES[@]}" \
    >>"$WORK/apt.log" 2>&1 </dev/null || {
    tail -n 20 "$WORK/apt.log" >&2
    die "apt-get could not install ${PACKAGES[*]}"
  }
}

# The package that the kernel's package of no content depends on: linux-image-VERSION-cloud-amd64.
kernel_package() {
  apt-cache depends --no-recommends --no-suggests "$KERNEL_PACKAGE" 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}

# Downloads and unpacks a Debian package into $WORK/root. apt checks it against Debian's keys.
unpack() {
  (cd "$WORK" && apt-get -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$1" >>"$WORK/apt.log" 2>&1 </dev/null) || {
    tail -n 20 "$WORK/apt.log" >&2
    die "apt-get could not download $1"
  }
  dpkg-deb -x "$WORK/$1"_*.deb "$WORK/root"
}

fetch_packages() {
  local kernel
  if ! have apt-get || ! have dpkg-deb; then
    die "kernel and busybox of the guest come from Debian packages, and this machine has no apt-get"
  fi
  kernel="$(kernel_package)"
  if [ -z "$kernel" ] && is_root; then
    apt_update "$WORK/apt.log"
    kernel="$(kernel_package)"
  fi
  [ -n "$kernel" ] || die "apt knows no $KERNEL_PACKAGE" "sudo apt-get update" "and then this command again"
  note "$kernel and busybox-static, from this machine's Debian mirror"
  unpack "$kernel"
  unpack busybox-static
}

# A kernel module into the base image, unpacked where Debian packs it.
add_module() {
  local file
  file="$(find "$WORK/root" -name "$1.ko*" | head -n 1)"
  case "$file" in
    *.ko) cp "$file" "$WORK/base/modules/" ;;
    *.ko.xz) xz -dc "$file" >"$WORK/base/modules/$1.ko" ;;
    *.ko.zst) zstd -dcq "$file" >"$WORK/base/modules/$1.ko" ;;
    *) die "the kernel package has no module $1" ;;
  esac
}

# Writes the tree $1 as an archive that the kernel can unpack to $2.
archive() {
  (cd "$1" && find . -print0 | sort -z | cpio --null --create --format=newc --owner=0:0 --quiet) >"$2.new"
  mv "$2.new" "$2"
}

make_base() {
  local busybox image
  mkdir -p "$WORK/base"/{bin,modules,dev}
  busybox="$(find "$WORK/root" -path '*bin/busybox' -type f | head -n 1)"
  cp "$busybox" "$WORK/base/bin/busybox"
  add_module uio
  add_module uio_pci_generic
  cp scripts/guest-init.sh "$WORK/base/init"
  chmod 755 "$WORK/base/init"
  mkdir -p "$WORK/image"
  archive "$WORK/base" "$WORK/image/base.cpio"
  cp "$WORK/root"/boot/vmlinuz-* "$WORK/image/vmlinuz"
  touch "$WORK/image/complete"
  image="$(image_dir)"
  rm -rf "$image"
  mv "$WORK/image" "$image"
}

build() {
  if tools_are_there && is_built; then
    note "the guest image is there: $(image_dir)"
    return
  fi
  mkdir -p "$GUEST_CACHE"
  exec 9>"$GUEST_CACHE/lock"
  flock 9
  WORK="$(mktemp -d "$GUEST_CACHE/work.XXXXXX")"
  install_tools
  if ! is_built; then
    fetch_packages
    make_base
  fi
  note "the guest image: $(image_dir)"
  flock -u 9
}

# ---------------------------------------------------------------------------------------------------------------------
# Packs

# Every shared library of a program, and the one that pthread_cancel loads when it is first called.
libraries_of() {
  ldd "$1" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }'
  ldconfig -p 2>/dev/null | awk '$1 == "libgcc_s.so.1" && /x86-64/ { print $NF; exit }'
}

add_program() {
  local path="${1%%=*}" name="${1#*=}" library loader
  [ -f "$path" ] || die "there is no program $path"
  name="${name##*/}"
  mkdir -p "$WORK/pack/program" "$WORK/pack/lib"
  # Debug information would be most of the image.
  strip --strip-debug -o "$WORK/pack/program/$name" "$path" 2>/dev/null || cp "$path" "$WORK/pack/program/$name"
  chmod 755 "$WORK/pack/program/$name"
  ldd "$path" >/dev/null 2>&1 || return 0 # a static one, or a script
  if ldd "$path" | grep -q 'not found'; then die "$path lacks shared libraries" "$(ldd "$path" | grep 'not found')"; fi
  while read -r library; do cp -Lu "$library" "$WORK/pack/lib/"; done < <(libraries_of "$path")
  loader="$(ldd "$path" | awk '$1 ~ /^\/.*ld-linux/ { print $1; exit }')"
  mkdir -p "$WORK/pack$(dirname "$loader")"
  cp -Lu "$loader" "$WORK/pack$loader"
}

pack() {
  local out="${1:-}"
  [ -n "$out" ] || die "pack what into which file?" "$0 --help"
  have cpio || die "cpio is missing" "$0 build"
  shift
  WORK="$(mktemp -d "${TMPDIR:-/tmp}/gaur-pack.XXXXXX")"
  mkdir -p "$WORK/pack"
  while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "$1 needs a value"
    case "$1" in
      --program) add_program "$2" ;;
      --tree)
        [ -d "${2%%=*}" ] || die "there is no directory ${2%%=*}"
        mkdir -p "$WORK/pack/${2#*=}"
        cp -rL "${2%%=*}/." "$WORK/pack/${2#*=}/"
        ;;
      --file)
        mkdir -p "$(dirname "$WORK/pack/${2#*=}")"
        cp -L "${2%%=*}" "$WORK/pack/${2#*=}"
        ;;
      *) die "pack does not know $1" "$0 --help" ;;
    esac
    shift 2
  done
  archive "$WORK/pack" "$out"
}

# ---------------------------------------------------------------------------------------------------------------------
# Running

# A word for the guest's shell, which knows single quotes like every shell.
quoted() { printf "'%s' " "${1//\'/\'\\\'\'}"; }

# What is different in every run: the command, and how much to reserve.
make_command() {
  local word
  mkdir -p "$WORK/command"
  for word in "$@"; do quoted "$word"; done >"$WORK/command/command"
  printf '\n' >>"$WORK/command/command"
  printf 'HUGE_PAGES=%s\n' "$HUGE" >"$WORK/command/settings"
  archive "$WORK/command" "$WORK/command.cpio"
}

# QEMU's words for the disks: one controller, a namespace each.
disk_arguments() {
  local disk file sector number=0
  QEMU_DISKS=(-device "nvme,id=nvme0,serial=gaur,addr=4")
  for disk in "$@"; do
    number=$((number + 1))
    file="${disk%,*}" sector=512
    case "$disk" in *,512 | *,4096) sector="${disk##*,}" ;; *) file="$disk" ;; esac
    case "$file" in
      nbd:*) ;;
      *) [ -f "$file" ] || die "there is no disk image $file" "make one: truncate -s 256M $file" ;;
    esac
    QEMU_DISKS+=(-drive "file=$file,if=none,id=disk$number,format=raw,cache=writeback,discard=unmap")
    QEMU_DISKS+=(-device "nvme-ns,drive=disk$number,bus=nvme0,nsid=$number,logical_block_size=$sector,physical_block_size=$sector")
  done
}

run() {
  local packs=() disks=() limit=300 log='' keep=yes pid_file='' memory=1536 status=0 image tail monitor=()
  HUGE=256
  while [ $# -gt 0 ]; do
    if [ "$1" = -- ]; then
      shift
      break
    fi
    [ $# -ge 2 ] || die "$1 needs a value"
    case "$1" in
      --pack) packs+=("$2") ;;
      --disk) disks+=("$2") ;;
      --time-limit) limit="$2" ;;
      --log) log="$2" ;;
      --pid-file) pid_file="$2" ;;
      --monitor)
        mkfifo "$2.in" "$2.out"
        monitor=(-chardev "pipe,id=monitor,path=$2" -mon "chardev=monitor,mode=readline")
        ;;
      --huge-pages) HUGE="$2" ;;
      --memory) memory="$2" ;;
      *) die "run does not know $1" "$0 --help" ;;
    esac
    shift 2
  done
  [ $# -gt 0 ] || die "which command is the guest to run?" "$0 --help"
  { tools_are_there && is_built; } || build
  image="$(image_dir)"
  WORK="$(mktemp -d "${TMPDIR:-/tmp}/gaur-guest.XXXXXX")"
  if [ -z "$log" ]; then
    mkdir -p "$(target_dir)/guest-logs"
    log="$(mktemp "$(target_dir)/guest-logs/$(date +%Y%m%d-%H%M%S)-XXXXXX.log")"
    keep=no
  fi
  make_command "$@"
  cat "$image/base.cpio" "${packs[@]}" "$WORK/command.cpio" >"$WORK/initrd"
  QEMU_DISKS=()
  disk_arguments "${disks[@]}"
  : >"$log"
  # Under a group of its own, so that a signal for us ends QEMU too. The pid file says which process to kill for a cut.
  setsid --wait timeout --foreground --kill-after=5 "$limit" qemu-system-x86_64 \
    -accel tcg,thread=multi -cpu max -smp 2 -m "$memory" -nodefaults -vga none -display none -no-reboot \
    -kernel "$image/vmlinuz" -initrd "$WORK/initrd" ${pid_file:+-pidfile "$pid_file"} \
    -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on" \
    -serial "file:$log" "${monitor[@]}" "${QEMU_DISKS[@]}" </dev/null &
  CHILD=$!
  tail -n +1 -f -s 0.1 --pid="$CHILD" "$log" 2>/dev/null &
  tail=$!
  wait "$CHILD" || status=$?
  CHILD=
  wait "$tail" || true
  status="$(outcome "$status" "$log")"
  case "$status" in
    0) ;;
    124) printf 'guest.sh: the guest was not done after %s s\n' "$limit" >&2 ;;
    126) printf 'guest.sh: the guest ended without saying how\n' >&2 ;;
  esac
  if [ "$status" -ne 0 ]; then
    printf 'guest.sh: exit status %s; the console: %s\n' "$status" "$log" >&2
  elif [ "$keep" = no ]; then
    rm -f "$log"
  fi
  return "$status"
}

# The status of a run, from QEMU's own ($1) and the console ($2).
outcome() {
  local said
  if [ "$1" -eq 124 ] || { [ "$1" -eq 137 ] && ! grep -q '^gaur-guest: exit' "$2"; }; then
    printf '%s' "$([ "$1" -eq 124 ] && echo 124 || echo 126)"
    return
  fi
  said="$(tr -d '\r' <"$2" | sed -n 's/^gaur-guest: exit \([0-9]*\)$/\1/p' | tail -n 1)"
  printf '%s' "${said:-126}"
}

case "${1:-}" in
  build) build ;;
  pack)
    shift
    pack "$@"
    ;;
  run)
    shift
    run "$@"
    ;;
  -h | --help | help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac

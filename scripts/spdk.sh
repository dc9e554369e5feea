#!/usr/bin/env bash
# Gets, verifies, builds and installs the SPDK that Gaur is tested with, and prepares the machine to run it.
#
#   scripts/spdk.sh install        get, verify, build, install; a second run does nothing, within a second
#   scripts/spdk.sh prefix         print the install prefix (what SPDK_DIR would be set to)
#   scripts/spdk.sh hugepages N    see to it that N huge pages of 2 MiB are free and that hugetlbfs is mounted
#
# Where it comes from: Debian has no SPDK package, but its `ceph` source package carries a complete SPDK 20.07 with the
# DPDK it needs, and Debian builds its own ceph with it. apt fetches that source package from the Debian mirror that this
# machine's own apt sources name, and checks it against Debian's archive keys; there is no host name in this script.
#
# Where it goes: ${XDG_CACHE_HOME:-$HOME/.cache}/gaur/spdk-20.07, outside of any checkout. `spdk-sys` looks there by
# itself. The prefix is made complete elsewhere and renamed into place, so an interrupted run leaves either nothing or
# all of it. SPDK installed in some other way: set SPDK_DIR to its prefix and leave this script alone.
#
# What it does not do: it never turns off a signature check, never changes the machine's apt configuration, and installs
# Debian packages only as root (else it prints the line to run).

set -euo pipefail
export LC_ALL=C

readonly SPDK_RELEASE=20.07
# Counts changes to how SPDK is built or laid out. A prefix with another stamp is built again.
readonly RECIPE=2
# The Debian suite whose `ceph` source package is used. (The mirrors no longer have bookworm's.)
readonly SUITE=trixie
readonly SOURCE_PACKAGE=ceph

readonly CACHE="${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/gaur"
readonly PREFIX="$CACHE/spdk-$SPDK_RELEASE"
readonly WORK="$CACHE/spdk-$SPDK_RELEASE.work"
readonly LOG="$CACHE/spdk-$SPDK_RELEASE.log"
readonly STAMP="gaur spdk $SPDK_RELEASE recipe $RECIPE"

# To build it, and (the -dev packages) to link against it; libclang is what spdk-sys generates its bindings with.
readonly PACKAGES=(
  build-essential pkg-config python3 meson ninja-build nasm procps xz-utils ca-certificates
  libaio-dev liburing-dev libnuma-dev uuid-dev libssl-dev libfuse3-dev libclang-dev
)
readonly TEST_PROGRAMS=(test/bdev/bdevperf test/blobfs/mkfs test/blobfs/fuse)
readonly DISK_MIB_NEEDED=1000

# ---------------------------------------------------------------------------------------------------------------------
# Talking

STEP=0
readonly STEPS=7
step() { STEP=$((STEP + 1)); printf '[%d/%d] %s\n' "$STEP" "$STEPS" "$*"; }
note() { printf '      %s\n' "$*"; }
die() {
  printf 'spdk.sh: error: %s\n' "$1" >&2
  shift
  for line in "$@"; do printf '  %s\n' "$line" >&2; done
  exit 1
}

# Runs a command with its output in the log; on failure shows the end of the log and stops.
logged() {
  local what="$1"
  shift
  printf '\n=== %s: %s\n' "$what" "$*" >>"$LOG"
  if ! "$@" >>"$LOG" 2>&1 </dev/null; then
    printf -- '--- last lines of %s ---\n' "$LOG" >&2
    tail -n 30 "$LOG" >&2
    die "$what failed" "the whole log: $LOG"
  fi
}

# Like `logged`, and prints a line every ten seconds, so that a long build is seen to live.
logged_long() {
  local what="$1" beat
  (
    seconds=0
    # The sleep may outlive us by some seconds: it must hold neither the lock nor the caller's pipe.
    while sleep 10 >/dev/null 2>&1 9>&-; do
      seconds=$((seconds + 10))
      note "$what: $seconds s, $(grep -cE '^ +(CC|CXX|LIB|LINK) |^\[[0-9]+/[0-9]+\]' "$LOG" || true) build steps"
    done
  ) 9>&- &
  beat=$!
  # shellcheck disable=SC2064 # $beat is meant to be expanded now
  trap "kill $beat 2>/dev/null || true" EXIT
  logged "$@"
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  trap - EXIT
}

# ---------------------------------------------------------------------------------------------------------------------
# install

# The files of a prefix with their sizes: what the stamp file records and what a later run compares.
manifest() { (cd "$1" && find bin dpdk include lib -type f -printf '%p %s\n' | sort); }

prefix_is_complete() {
  [ -f "$PREFIX/gaur-stamp" ] || return 1
  [ "$(head -n 1 "$PREFIX/gaur-stamp")" = "$STAMP" ] || return 1
  cmp -s <(tail -n +2 "$PREFIX/gaur-stamp") <(manifest "$PREFIX" 2>/dev/null)
}

missing_packages() {
  local package
  for package in "${PACKAGES[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || printf '%s ' "$package"
  done
}

apt_update() {
  local try
  # Another apt may hold the lists' lock, which (unlike dpkg's) apt does not wait for.
  for try in 1 2 3 4 5 6; do
    if apt-get update >>"$LOG" 2>&1 </dev/null; then return 0; fi
    sleep $((try * 2))
  done
  return 1
}

apt_install() {
  logged "apt-get install" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y \
    --no-install-recommends "$@"
}

install_packages() {
  local missing
  missing="$(missing_packages)"
  if [ -z "$missing" ]; then
    note "all there"
    return
  fi
  note "missing: $missing"
  if [ "$(id -u)" -ne 0 ]; then
    die "these Debian packages are missing, and only root may install them. Run:" \
      "sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing" \
      "and then this command again"
  fi
  apt_update || note "apt-get update failed (see $LOG); trying with the package lists that are there"
  # shellcheck disable=SC2086 # a list of words
  apt_install $missing
}

# apt with sources, lists and cache of our own; the machine's apt is not touched.
own_apt() {
  local tool="$1"
  shift
  "$tool" -o Dir::Etc::sourcelist="$WORK/apt/sources.list" -o Dir::Etc::sourceparts=- \
    -o Dir::State::Lists="$WORK/apt/lists" -o Dir::Cache="$WORK/apt/cache" -o APT::Get::AllowUnauthenticated=false \
    -o Acquire::AllowInsecureRepositories=false -o Acquire::AllowWeakRepositories=false "$@"
}

# The repositories of the machine's own apt sources that look like a Debian archive (in either file format: apt itself
# reads them), this release's first. An archive serves all suites under one address.
debian_mirrors() {
  local codename
  # shellcheck source=/dev/null
  codename="$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")"
  # shellcheck disable=SC2016 # apt expands these
  apt-get indextargets --no-release-info --format '$(RELEASE)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' \
    2>>"$LOG" | awk -F'|' -v codename="$codename" '
      $2 != "main" || $1 !~ /^[a-z]+$/ || seen[$3]++ { next }
      $1 == codename { print "0 " $3; next }
      { print "1 " $3 }' | sort -s -k1,1 | cut -d' ' -f2
}

archive_keyring() {
  local file
  for file in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
    if [ -r "$file" ]; then
      printf '%s' "$file"
      return
    fi
  done
  die "Debian's archive keys are missing. Run:" "sudo apt-get install -y debian-archive-keyring"
}

# Reads the package index of $SUITE from mirror $1 into our own lists. apt checks it against Debian's archive keys.
try_mirror() {
  local mirror="$1" output="$WORK/apt/update.out"
  rm -rf "$WORK/apt"
  mkdir -p "$WORK/apt/lists/partial" "$WORK/apt/cache/archives/partial"
  printf 'deb-src [signed-by=%s] %s %s main\n' "$(archive_keyring)" "$mirror" "$SUITE" >"$WORK/apt/sources.list"
  own_apt apt-get -o Acquire::Retries=3 update --error-on=any >"$output" 2>&1 </dev/null && return 0
  cat "$output" >>"$LOG"
  if grep -q NO_PUBKEY "$output" && [ -z "${KEYRING_RENEWED:-}" ]; then
    # A Debian 12 installed before $SUITE was released does not know its key yet. The key comes as an update of this
    # release, signed with keys that the machine does know.
    KEYRING_RENEWED=yes
    if [ "$(id -u)" -ne 0 ]; then
      die "this machine's Debian archive keys are older than $SUITE. Run:" \
        "sudo apt-get update && sudo apt-get install -y debian-archive-keyring" "and then this command again"
    fi
    note "the archive keys here are older than $SUITE: updating debian-archive-keyring"
    apt_update || true
    apt_install debian-archive-keyring
    try_mirror "$mirror"
    return
  fi
  return 1
}

fetch_source() {
  local mirror mirrors found=
  mkdir -p "$WORK/download"
  mapfile -t mirrors < <(debian_mirrors)
  [ "${#mirrors[@]}" -gt 0 ] || die "no Debian archive in this machine's apt sources" \
    "add one (main), or install SPDK yourself and set SPDK_DIR to its prefix"
  for mirror in "${mirrors[@]}"; do
    if try_mirror "$mirror"; then
      found="$mirror"
      break
    fi
    note "$mirror: no sources of $SUITE that verify (see the log); trying the next"
  done
  [ -n "$found" ] || die "none of this machine's Debian mirrors gives sources of $SUITE that verify" \
    "tried: ${mirrors[*]}" "what apt said: $LOG"
  note "from $found (the mirror in this machine's apt sources)"
  # apt verifies index and archive by hash from the signed release file; a partial download is continued.
  (
    cd "$WORK/download"
    logged_long "download" own_apt apt-get -o Acquire::Retries=3 source --tar-only --download-only \
      "$SOURCE_PACKAGE/$SUITE"
  )
  TARBALL="$(find "$WORK/download" -maxdepth 1 -name "${SOURCE_PACKAGE}_*.orig.tar.xz" -printf '%T@ %p\n' |
    sort -rn | head -n 1 | cut -d' ' -f2-)"
  [ -s "${TARBALL:-}" ] || die "apt reported success but left no source archive in $WORK/download"
  note "$(basename "$TARBALL"), signature chain and SHA-256 checked by apt"
}

extract_source() {
  rm -rf "$WORK/src"
  mkdir -p "$WORK/src"
  logged "extract" tar -xJf "$TARBALL" -C "$WORK/src" --strip-components=3 --wildcards '*/src/spdk/*'
  [ -f "$WORK/src/include/spdk/version.h" ] || die "$(basename "$TARBALL") has no SPDK under src/spdk"
  local major minor
  major="$(awk '$1 == "#define" && $2 == "SPDK_VERSION_MAJOR" { print $3 }' "$WORK/src/include/spdk/version.h")"
  minor="$(awk '$1 == "#define" && $2 == "SPDK_VERSION_MINOR" { print $3 }' "$WORK/src/include/spdk/version.h")"
  [ "$(printf '%02d.%02d' "$major" "$minor")" = "$SPDK_RELEASE" ] ||
    die "this $SOURCE_PACKAGE carries SPDK $major.$minor, and this script knows how to build $SPDK_RELEASE"
}

# shellcheck disable=SC2030,SC2031 # the environment is meant for the subshell alone
build() {
  local arch_options=()
  # A prefix may be copied to another machine, so no -march=native; x86-64-v2 is what DPDK needs at least (SSE4.2).
  if [ "$(uname -m)" = x86_64 ]; then arch_options=(--target-arch=x86-64-v2); fi
  # HAVE_ARC4RANDOM: otherwise SPDK's iscsi.c defines a function that newer C libraries have.
  # PATH: DPDK's build runs python3 and meson, and must find Debian's before any that the user has elsewhere.
  (
    cd "$WORK/src"
    export PATH="/usr/sbin:/usr/bin:/sbin:/bin" CFLAGS=-DHAVE_ARC4RANDOM
    unset MAKEFLAGS MFLAGS MAKELEVEL DESTDIR CXXFLAGS LDFLAGS CPPFLAGS
    logged "configure" ./configure --prefix="$PREFIX" "${arch_options[@]}" --disable-tests --disable-unit-tests \
      --without-vhost --without-virtio --without-isal --with-uring --with-fuse
    logged_long "make" make -j"$(nproc)"
    # Of SPDK's tests only the programs that the bench compares with (all of them would need CUnit).
    for program in "${TEST_PROGRAMS[@]}"; do
      logged "make $program" make -C "$program" -j"$(nproc)"
    done
  )
}

# Puts a complete prefix together beside the old one, and swaps them by rename.
# shellcheck disable=SC2030,SC2031 # as above
install_prefix() {
  local stage="$WORK/stage" root program
  rm -rf "$stage"
  mkdir -p "$stage"
  (
    cd "$WORK/src"
    export PATH="/usr/sbin:/usr/bin:/sbin:/bin" CFLAGS=-DHAVE_ARC4RANDOM
    unset MAKEFLAGS MFLAGS MAKELEVEL CXXFLAGS LDFLAGS CPPFLAGS
    logged "make install" make install DESTDIR="$stage"
  )
  root="$stage$PREFIX"
  [ -d "$root/lib" ] || die "make install put nothing at $root/lib" "log: $LOG"
  mkdir -p "$root/dpdk/lib" "$root/bin"
  cp "$WORK/src/dpdk/build/lib/"librte_*.a "$root/dpdk/lib/"
  # Tools that SPDK builds but does not install: the raw figures and the BlobFS peer of the bench come from them.
  while read -r program name; do
    [ -x "$WORK/src/$program" ] || die "SPDK's build left no $program" "log: $LOG"
    install -m 755 "$WORK/src/$program" "$root/bin/$name"
  done <<-'LIST'
	build/bin/nvmf_tgt nvmf_tgt
	test/bdev/bdevperf/bdevperf bdevperf
	test/blobfs/mkfs/mkfs blobfs_mkfs
	test/blobfs/fuse/fuse blobfs_fuse
	LIST
  # Installed under other names than SPDK's documentation uses.
  ln -sf spdk_nvme_perf "$root/bin/perf"
  ln -sf spdk_nvme_identify "$root/bin/identify"
  # SPDK and DPDK are BSD-licensed; their terms stay with the binaries.
  install -m 644 "$WORK/src/LICENSE" "$root/LICENSE.spdk"
  install -m 644 "$WORK/src/dpdk/license/README" "$root/LICENSE.dpdk"
  { printf '%s\n' "$STAMP"; manifest "$root"; } >"$stage/stamp"
  mv "$stage/stamp" "$root/gaur-stamp"
  rm -rf "$WORK/old"
  if [ -e "$PREFIX" ]; then mv "$PREFIX" "$WORK/old"; fi
  mv "$root" "$PREFIX"
}

try_it() {
  local library
  for library in spdk_bdev spdk_bdev_malloc spdk_bdev_aio spdk_bdev_uring spdk_nvme spdk_event_bdev spdk_blobfs; do
    [ -s "$PREFIX/lib/lib$library.a" ] || die "the finished prefix has no lib$library.a" "log: $LOG"
  done
  [ -s "$PREFIX/dpdk/lib/librte_eal.a" ] || die "the finished prefix has no DPDK" "log: $LOG"
  logged "run" "$PREFIX/bin/spdk_tgt" -v
  prefix_is_complete || die "the prefix does not match its own stamp" "log: $LOG"
}

check_room() {
  local free_mib
  free_mib="$(df -Pm "$CACHE" | awk 'NR == 2 { print $4 }')"
  note "needs $DISK_MIB_NEEDED MiB while it builds ($free_mib MiB free) and keeps 60 of them; downloads 160 MB;"
  note "takes about two minutes on two cores. Log: $LOG"
  [ "$free_mib" -ge "$DISK_MIB_NEEDED" ] || die "not enough room at $CACHE: $free_mib MiB free" \
    "make room, or set XDG_CACHE_HOME to a directory on a larger disk"
}

command_install() {
  if prefix_is_complete && [ -z "$(missing_packages)" ]; then
    printf 'SPDK %s is installed: %s\n' "$SPDK_RELEASE" "$PREFIX"
    return
  fi
  if ! command -v apt-get dpkg-query >/dev/null; then
    die "this script knows Debian only" \
      "install SPDK $SPDK_RELEASE or later yourself and set SPDK_DIR to its prefix"
  fi
  mkdir -p "$CACHE"
  # One at a time; the lock goes away with the process, however it ends.
  exec 9>"$CACHE/spdk.lock"
  if ! flock -n 9; then
    note "another run is at work; waiting for it"
    flock 9
  fi
  : >"$LOG"
  local began=$SECONDS
  step "room and time"
  check_room
  step "Debian packages"
  install_packages
  if prefix_is_complete; then
    printf 'SPDK %s is installed: %s\n' "$SPDK_RELEASE" "$PREFIX"
    return
  fi
  step "source: Debian's $SOURCE_PACKAGE/$SUITE, which carries SPDK $SPDK_RELEASE"
  fetch_source
  step "extract"
  extract_source
  step "build"
  build
  step "install to $PREFIX"
  install_prefix
  step "check"
  try_it
  rm -rf "$WORK"
  printf 'SPDK %s is installed: %s (%d s)\n' "$SPDK_RELEASE" "$PREFIX" "$((SECONDS - began))"
}

# ---------------------------------------------------------------------------------------------------------------------
# hugepages

readonly HUGE_SYSFS=/sys/kernel/mm/hugepages/hugepages-2048kB

huge_mounts() { awk '$3 == "hugetlbfs" { print $2 }' /proc/mounts; }
huge() { cat "$HUGE_SYSFS/$1"; }
huge_free() { echo $(($(huge free_hugepages) - $(huge resv_hugepages))); }

mount_hugetlbfs() {
  if [ -n "$(huge_mounts)" ]; then return; fi
  [ "$(id -u)" -eq 0 ] || die "hugetlbfs is not mounted, and only root may mount it. Run:" \
    "sudo $0 hugepages $1"
  mkdir -p /dev/hugepages
  mount -t hugetlbfs -o pagesize=2M nodev /dev/hugepages || die "cannot mount hugetlbfs at /dev/hugepages" \
    "in a container: run it with the host's /dev/hugepages mounted"
  note "mounted hugetlbfs at /dev/hugepages"
}

# A killed SPDK process leaves its page files, and they hold the pages. A file goes when its process is gone and nobody
# holds DPDK's lock on it (the second for processes in other containers, which are not seen here).
remove_stale_files() {
  local mount file pid removed=0
  while read -r mount; do
    for file in "$mount"/spdk_pid*map_*; do
      [ -e "$file" ] || continue
      pid="${file##*/spdk_pid}"
      pid="${pid%%map_*}"
      case "$pid" in '' | *[!0-9]*) continue ;; esac
      if [ ! -d "/proc/$pid" ] && flock -n -x "$file" true 2>/dev/null && rm -f "$file" 2>/dev/null; then
        removed=$((removed + 1))
      fi
    done
  done < <(huge_mounts)
  if [ "$removed" -gt 0 ]; then note "removed $removed page files of SPDK processes that are gone"; fi
}

command_hugepages() {
  local want="${1:-}" used total available_mib
  case "$want" in '' | *[!0-9]*) die "hugepages needs a count of 2 MiB pages" "example: $0 hugepages 1536" ;; esac
  [ -d "$HUGE_SYSFS" ] || die "this kernel has no huge pages of 2 MiB"
  mount_hugetlbfs "$want"
  remove_stale_files
  if [ "$(huge_free)" -lt "$want" ]; then
    [ "$(id -u)" -eq 0 ] || die "$(huge_free) huge pages are free, $want are wanted, and only root may reserve more. Run:" \
      "sudo $0 hugepages $want"
    used=$(($(huge nr_hugepages) - $(huge_free)))
    total=$((used + want))
    available_mib=$(($(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo) / 1024))
    [ $(((want - $(huge_free)) * 2)) -lt "$available_mib" ] ||
      die "$want huge pages are $((want * 2)) MiB, and $available_mib MiB of memory are available"
    echo "$total" >"$HUGE_SYSFS/nr_hugepages" || die "cannot write $HUGE_SYSFS/nr_hugepages"
    if [ "$(huge_free)" -lt "$want" ]; then
      # Memory is there but in pieces: let go of the page cache, have the kernel put free memory together, ask again.
      sync
      echo 3 >/proc/sys/vm/drop_caches || true
      { echo 1 >/proc/sys/vm/compact_memory; } 2>/dev/null || true
      echo "$total" >"$HUGE_SYSFS/nr_hugepages"
    fi
    [ "$(huge_free)" -ge "$want" ] || die "the kernel gave only $(huge_free) of $want huge pages: memory is too fragmented" \
      "stop what uses memory, or boot with hugepages=$total on the kernel's command line"
  fi
  printf 'huge pages of 2 MiB: %s free of %s, hugetlbfs at %s\n' "$(huge_free)" "$(huge nr_hugepages)" \
    "$(huge_mounts | head -n 1)"
}

# ---------------------------------------------------------------------------------------------------------------------

case "${1:-}" in
  install) command_install ;;
  prefix) printf '%s\n' "$PREFIX" ;;
  hugepages) command_hugepages "${2:-}" ;;
  *)
    sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac

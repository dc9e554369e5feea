#!/bin/busybox sh
# shellcheck shell=dash
# PID 1 of the guest that scripts/guest.sh boots: prepares the machine for SPDK, runs /command, says how it ended on the
# console, and switches the machine off. Every NVMe controller is taken from the kernel's driver and given to
# uio_pci_generic.

/bin/busybox mkdir -p /proc /sys /dev /tmp /bin /sbin /dev/shm
/bin/busybox --install -s /bin
export PATH=/program:/bin LD_LIBRARY_PATH=/lib HOME=/tmp TMPDIR=/tmp LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/hugepages /dev/shm /run
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t hugetlbfs hugetlbfs /dev/hugepages
exec </dev/null >/dev/console 2>&1
stty -onlcr -F /dev/console 2>/dev/null

finish() {
  echo "gaur-guest: exit $1"
  # The line must leave the serial port before the power goes.
  sync
  poweroff -f
  sleep 60
}

# shellcheck source=/dev/null
. /settings
echo "$HUGE_PAGES" >/proc/sys/vm/nr_hugepages
got="$(cat /proc/sys/vm/nr_hugepages)"
if [ "$got" -lt "$HUGE_PAGES" ]; then
  echo "gaur-guest: only $got of $HUGE_PAGES huge pages"
  finish 125
fi

for module in uio uio_pci_generic; do insmod "/modules/$module.ko" || finish 125; done
for device in /sys/bus/pci/devices/*; do
  case "$(cat "$device/class")" in 0x010802) ;; *) continue ;; esac
  address="${device##*/}"
  if [ -e "$device/driver/unbind" ]; then echo "$address" >"$device/driver/unbind"; fi
  ids="$(cat "$device/vendor") $(cat "$device/device")"
  echo "$ids" >/sys/bus/pci/drivers/uio_pci_generic/new_id 2>/dev/null ||
    echo "$address" >/sys/bus/pci/drivers/uio_pci_generic/bind
  driver="$(readlink "$device/driver")"
  if [ "${driver##*/}" != uio_pci_generic ]; then
    echo "gaur-guest: $address is not with uio_pci_generic, but with '${driver##*/}'"
    finish 125
  fi
done

# Through a pipe, so that programs do not take the console for somebody's terminal.
{
  sh /command
  echo "$?" >/run/status
} 2>&1 | cat
finish "$(cat /run/status)"

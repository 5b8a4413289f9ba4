#!/bin/busybox sh
# prologue.sh - how every guest of ours begins: initramfs.py puts it in front of the guest's script.
# Speaks in lines "GUEST word key=value ..." on the serial console. Loads the modules in
# /modules/order but for those that the kernel's argument millpond.later=NAME names.

busybox=/bin/busybox
$busybox --install -s /bin
export PATH=/bin

say() { echo "GUEST $*"; }
fail() { say "failed $*"; sync; poweroff -f; }

wait_for_disk() { # its modules probe it in the background
    tries=0
    until [ -b /dev/vda ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || fail "no /dev/vda"
        usleep 100000
    done
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
say "alive"
arguments=" $(cat /proc/cmdline) "
case "$arguments" in *" millpond.boot=probe "*) poweroff -f ;; esac
while read -r module; do
    case "$arguments" in *" millpond.later=${module%.ko} "*) continue ;; esac
    insmod "/modules/$module" || fail "insmod $module"
done < /modules/order


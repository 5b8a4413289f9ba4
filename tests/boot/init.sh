#!/bin/busybox sh
# init.sh - the first program of a guest that boots Debian from /dev/vda: modules, root, systemd.

busybox=/bin/busybox
$busybox --install -s /bin
export PATH=/bin

fail() { echo "GUEST failed $*"; poweroff -f; }

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
    insmod "/modules/$module" || fail "insmod $module"
done < /modules/order
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || fail "no /dev/vda"
    usleep 100000
done
mount -t ext4 /dev/vda /mnt || fail "mount"
mount --move /dev /mnt/dev
mount --move /sys /mnt/sys
mount --move /proc /mnt/proc
exec switch_root /mnt /sbin/init

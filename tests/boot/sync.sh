#!/bin/busybox sh
# sync.sh - the first and only program of a guest that writes to /dev/vda and syncs it once.

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
echo "GUEST disk cache=$(tr ' ' - < /sys/block/vda/queue/write_cache)"
yes millpond | dd of=/dev/vda bs=4096 count=8 iflag=fullblock conv=fsync 2> /dev/null || fail "dd"
echo "GUEST synced"
# Nothing after this moment counts: the device is not closed, so nobody flushes it later.
sleep 3600

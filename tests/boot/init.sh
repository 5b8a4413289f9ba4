# init.sh - the first program of a guest that boots Debian from /dev/vda, behind prologue.sh.

wait_for_disk
mount -t ext4 /dev/vda /mnt || fail "mount"
mount --move /dev /mnt/dev
mount --move /sys /mnt/sys
mount --move /proc /mnt/proc
exec switch_root /mnt /sbin/init

# init.sh - the only program of the demo's guest, behind prologue.sh.
# Mounts the volume, checks every checksum on it, then (first boot) writes new files and syncs
# them, or (second boot) checks those too. Speaks in lines "GUEST word key=value ..." on the
# serial console; any failure is a line "GUEST failed ..." and the guest still powers off.

wait_for_disk
say "kernel version=$(uname -r) disk_bytes=$(($(cat /sys/block/vda/size) * 512))"
mount -t ext4 /dev/vda /mnt || fail "mount"
cd /mnt || fail "cd"

verify() { # manifest, what
    if ! sha256sum -c "$1" > /tmp.log 2>&1; then
        grep -v ': OK$' /tmp.log | head -n 5
        fail "checksums of $2"
    fi
    say "verified what=$2 files=$(wc -l < "$1")"
}

case "$arguments" in
*" millpond.boot=first "*)
    verify SHA256SUMS image
    mkdir new || fail "mkdir"
    i=0
    while [ $i -lt 400 ]; do
        i=$((i + 1))
        echo "file $i, written before the cache was killed" > "new/small-$i" || fail "write"
    done
    dd if=/dev/urandom of=new/random bs=65536 count=128 2> /dev/null || fail "write"
    head -n 2000 SHA256SUMS | cut -c67- > /list
    cpio -o -H newc < /list > new/copy.cpio 2> /dev/null || fail "write"
    find new -type f | sort | xargs sha256sum > NEW.SHA256SUMS || fail "sums"
    sync
    say "written files=$(wc -l < NEW.SHA256SUMS) kib=$(du -sk new | cut -f1)"
    ;;
*" millpond.boot=second "*)
    verify SHA256SUMS image
    verify NEW.SHA256SUMS new
    ;;
*) fail "unknown boot" ;;
esac

df -k /mnt | { read -r _; read -r _ _ used _; say "used kib=$used"; }
cd / || fail "cd"
umount /mnt || fail "umount"
say "done"
poweroff -f

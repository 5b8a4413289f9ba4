# init.sh - the first program of a guest that runs a script of this checkout, behind prologue.sh.
# The host's root, read-only over 9p, is the guest's root, with RAM over it for what is written;
# /dev/vda is a scratch disk. The command is the kernel's argument millpond.run, the checkout's
# place is millpond.root. The last line is "GUEST ended code=N"; then the guest powers off.
# Modules that are not loaded here (millpond.later=NAME) are for the script: /run/modules.

mkdir -p /lower /ram /host
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /lower || fail "9p"
mount -t tmpfs tmpfs /ram
mkdir /ram/upper /ram/work
layers=lowerdir=/lower,upperdir=/ram/upper,workdir=/ram/work
mount -t overlay -o "$layers" overlay /host || fail "overlay"
mount -t tmpfs tmpfs /host/run
mkdir -p /host/run/tmp /host/run/lock /host/run/modules
cp /modules/* /host/run/modules/
mount --move /proc /host/proc
mount --move /sys /host/sys
mount --move /dev /host/dev
ip link set lo up
for word in $(cat /host/proc/cmdline); do
    case "$word" in
    millpond.run=*) run=${word#millpond.run=} ;;
    millpond.argument=*) words="$words ${word#millpond.argument=}" ;;
    millpond.root=*) root=${word#millpond.root=} ;;
    esac
done
echo 10 > /host/proc/sys/kernel/hung_task_timeout_secs 2> /dev/null
# busybox has the bare root of the archive behind it: chroot is enough for a throw-away guest.
chroot /host /bin/sh -c "
    export PATH=$root/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    export HOME=/run TMPDIR=/run/tmp PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
    export PYTHONPATH=$root/tests PYTHONUNBUFFERED=1 LANG=C.UTF-8
    cd / && exec $root/.venv/bin/python $root/tests/kernel/inside/$run $words
"
say "ended code=$?"
poweroff -f

#!/bin/busybox sh
# A guest: does what it is told on the disk `ctl`, and says what came of it on its console.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/tools/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
. /commands.sh

for module in /lib/modules/*.ko; do insmod "$module"; done
wait_for_disk ctl >/dev/null && mount_tools || {
    echo "no disk for commands, or none with tools"
    poweroff -f
}
# Orders from before the boot are not for this guest.
last=0
next_order && last=$number
echo "GUEST-UP"
while :; do
    if next_order; then
        last=$number
        if (eval "$command") >/tmp/out 2>&1; then
            echo "DONE $number ok $(tail -n 1 /tmp/out)"
        else
            echo "DONE $number failed $(tail -n 3 /tmp/out | tr '\n' ' ')"
        fi
    else
        sleep 0.2
    fi
done

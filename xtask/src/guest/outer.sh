#!/bin/busybox sh
# The outer machine: loads KVM and runs the guests that /runs lists, one after the other.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in /lib/modules/*.ko; do insmod "$module"; done
while read -r number kernel mode processors scenario; do
    truncate -s 64M /tmp/disk
    echo "RUN-BEGIN $number"
    timeout 400 /opt/boot "/opt/vmlinuz-$kernel" "/opt/initrd-$kernel" \
        "console=ttyS0 panic=-1 loglevel=4 mitigations=off scenario=$scenario" \
        /tmp/disk "$processors" "$mode" </dev/null 2>&1
    echo "RUN-END $number $?"
    rm /tmp/disk
done </runs
poweroff -f

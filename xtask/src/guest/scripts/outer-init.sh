#!/bin/busybox sh
# The emulated machine: loads KVM, finds the laboratory's folders, and runs the laboratory.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t debugfs debug /sys/kernel/debug
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o size=90% tmp /tmp
for module in /lib/modules/*.ko; do insmod "$module"; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose lab /lab
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=none out /out
# Programs with libraries find them where they expect them.
for folder in lib/x86_64-linux-gnu lib64 usr; do
    mount --bind "/lab/tools/$folder" "/$folder"
done
ip link set lo up
LAB=/lab OUT=/out WORK=/tmp/work sh /lab/scripts/lab.sh
echo "OUTER-END $?"
dmesg >/out/dmesg
poweroff -f

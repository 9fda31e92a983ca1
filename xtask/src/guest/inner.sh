#!/bin/busybox sh
# A guest: does what its command line asks for, and prints a line for each scenario.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
scenario=$(sed -n 's/.*scenario=\([a-z]*\).*/\1/p' /proc/cmdline)

say() { echo "RESULT $*"; }
# check NAME COMMAND...: the command's end decides; its last line says what was seen.
check() {
    name=$1
    shift
    if "$@" >/tmp/out 2>&1; then say "$name ok $(tail -n 1 /tmp/out)"; else
        say "$name failed $(tail -n 3 /tmp/out | tr '\n' ' ')"
    fi
}
wait_for_disk() {
    tries=0
    while [ ! -b /dev/sda ] && [ $tries -lt 300 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    [ -b /dev/sda ]
}
insert() { for module in /lib/modules/*.ko; do insmod "$module" 2>/dev/null; done; }

boot() { wait_for_disk && dmesg | grep -o 'Vmbus version:5.3'; }
file_system() {
    mkfs.ext4 -q /dev/sda && mount -t ext4 /dev/sda /mnt || return 1
    head -c 8388608 /dev/urandom >/mnt/file && md5sum /mnt/file >/tmp/sum && umount /mnt || return 1
    e2fsck -fn /dev/sda >/dev/null 2>&1 || return 1
    mount -t ext4 /dev/sda /mnt && md5sum -c /tmp/sum && umount /mnt
}
# Every block in random order, then all of them read back: fio would take a block for wrong that it reads
# before it has written it.
verified_io() {
    fio --name=verify --filename=/dev/sda --size=64m --rw=randwrite --bs=4k --direct=1 \
        --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --thread --clocksource=clock_gettime --output-format=terse >/tmp/fio 2>&1 || {
        cat /tmp/fio
        return 1
    }
    awk -F';' '{ print $6 / 1024 " MiB read, " $47 / 1024 " MiB written" }' /tmp/fio | tail -n 1
}
driver_reload() {
    rmmod hv_storvsc || return 1
    [ ! -b /dev/sda ] || return 1
    insmod /lib/modules/*-hv_storvsc.ko && wait_for_disk || return 1
    dd if=/dev/sda of=/dev/null bs=64k count=16 iflag=direct 2>&1 | tail -n 1
}

insert
case $scenario in
work)
    check boot boot
    check ext4 file_system
    check fio verified_io
    check reload driver_reload
    poweroff -f
    ;;
reboot)
    check boot boot
    reboot -f
    ;;
crash)
    check boot boot
    echo 1 >/proc/sys/kernel/sysrq
    echo c >/proc/sysrq-trigger
    ;;
esac

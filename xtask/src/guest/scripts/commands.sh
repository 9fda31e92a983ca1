# What a guest can be told to do. The last line of a command's output is what its console shows; what is
# to be seen at once goes to the console directly.

# next_order: whether there is a command that has not been done, in $command; its number is in $number.
# The number stands behind it, too: a command that is just being written is not whole.
next_order() {
    dd if="$(find_disk ctl)" of=/tmp/order bs=4096 skip=16 count=1 iflag=direct 2>/dev/null || return 1
    { read -r number && read -r command && read -r again; } </tmp/order
    [ "$number" ] && [ "$number" = "$again" ] && [ "$number" -gt "$last" ]
}
# announce WORDS: says something at once.
announce() { echo "$*" >/dev/console; }

# ---- Disks

# find_disk NAME, wait_for_disk NAME: the device of the disk of this name.
find_disk() {
    for disk in /sys/block/sd* /sys/block/vd*; do
        for file in "$disk/device/vpd_pg80" "$disk/serial"; do
            [ -r "$file" ] || continue
            # The name stands behind a header of four bytes, or alone.
            if tr -d '\0' <"$file" | grep -aqE "^[^a-z]*$1 *\$"; then
                echo "/dev/${disk##*/}"
                return
            fi
        done
    done
    return 1
}
wait_for_disk() { patience find_disk "$1" >/dev/null && find_disk "$1"; }
wait_until_gone() { patience is_gone "$1"; }
is_gone() { ! find_disk "$1" >/dev/null; }
# patience COMMAND: until it succeeds, for half a minute.
patience() {
    tries=0
    until "$@"; do
        [ $tries -lt 300 ] || return 1
        tries=$((tries + 1))
        sleep 0.1
    done
}

# Programs with libraries find them where they expect them.
mount_tools() {
    device=$(wait_for_disk tools) && mount -t ext4 -o ro "$device" /tools || return 1
    for folder in lib/x86_64-linux-gnu lib64 usr; do mount --bind "/tools/$folder" "/$folder"; done
}
unmount_tools() { umount /lib/x86_64-linux-gnu /lib64 /usr /tools; }

version() { dmesg | grep -o 'Vmbus version:5.3'; }

file_system() {
    disk=$(find_disk data) || return 1
    mkfs.ext4 -qF "$disk" && mount -t ext4 "$disk" /mnt || return 1
    head -c 8388608 /dev/urandom >/mnt/file && md5sum /mnt/file >/tmp/sum && umount /mnt || return 1
    e2fsck -fn "$disk" >/dev/null 2>&1 || return 1
    mount -t ext4 "$disk" /mnt && md5sum -c /tmp/sum && umount /mnt
}

# verified_io DISK SIZE: every block in random order, 32 at a time, then all of them read back. (fio would
# take a block for wrong that it reads before it has written it.)
verified_io() {
    fio --name=verify --filename="$(find_disk "$1")" --size="$2" --rw=randwrite --bs=4k \
        --direct=1 --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --thread --clocksource=clock_gettime --output-format=terse >/tmp/fio 2>&1 || {
        cat /tmp/fio
        return 1
    }
    awk -F';' '{ print $6 / 1024 " MiB read, " $47 / 1024 " MiB written" }' /tmp/fio | tail -n 1
}
# passes DISK SIZE: that, again and again, until there is another order.
passes() {
    pass=0
    announce "PASS begins"
    until next_order; do
        verified_io "$1" "$2" || return 1
        pass=$((pass + 1))
        announce "PASS $pass"
    done
    echo "$pass passes"
}
# ticks: signs of life, until there is another order.
ticks() {
    until next_order; do
        announce "TICK"
        sleep 0.2
    done
}

# A disk that comes and goes, while there is I/O on another and on itself.
hot_plug() {
    rm -f /tmp/enough
    (until [ -e /tmp/enough ]; do verified_io data 8m >/tmp/beside 2>&1 || exit 1; done) &
    beside=$!
    announce "MARK ready for extra"
    device=$(wait_for_disk extra) || return 1
    head -c 8388608 /dev/urandom >/tmp/extra
    dd if=/tmp/extra of="$device" bs=64k oflag=direct 2>/dev/null && sync || return 1
    dd if="$device" bs=64k count=128 iflag=direct 2>/dev/null | cmp - /tmp/extra || return 1
    (while dd if="$device" of=/dev/null bs=64k count=128 iflag=direct; do :; done) >/dev/null 2>&1 &
    reader=$!
    announce "MARK extra in use"
    wait_until_gone extra || return 1
    wait $reader
    touch /tmp/enough
    wait $beside || { cat /tmp/beside; return 1; }
    md5sum </tmp/extra | cut -d ' ' -f 1
}

driver_remove() {
    # Whoever still listens has its libraries there.
    killall socat 2>/dev/null && patience no_socat
    unmount_tools && rmmod hv_storvsc && is_gone data
}
no_socat() { ! pidof socat >/dev/null; }
driver_insert() {
    insmod /lib/modules/*-hv_storvsc.ko && wait_for_disk data && wait_for_disk ctl && mount_tools
}
driver_reload() {
    driver_remove && driver_insert || return 1
    dd if="$(find_disk data)" of=/dev/null bs=64k count=64 iflag=direct 2>&1 | tail -n 1
}
# driver_loop TIMES
driver_loop() {
    loop=0
    while [ $loop -lt "$1" ]; do
        driver_remove && driver_insert || return 1
        loop=$((loop + 1))
        announce "LOOP $loop"
    done
    verified_io data 4m
}

# write_synced: files of 1 MiB, each known to the host once it is on the disk.
write_synced() {
    disk=$(find_disk data) && mkfs.ext4 -qF "$disk" && mount -t ext4 "$disk" /mnt || return 1
    file=0
    while [ $file -lt 80 ]; do
        file=$((file + 1))
        head -c 1048576 /dev/urandom >"/mnt/$file"
        (cd /mnt && md5sum $file >>sums) && sync || return 1
        announce "SYNCED $file"
    done
}
# check_synced COUNT: so many of them are there.
check_synced() {
    disk=$(find_disk data) && mount -t ext4 "$disk" /mnt || return 1
    head -n "$1" /mnt/sums >/tmp/sums
    (cd /mnt && md5sum -c /tmp/sums >/dev/null) && [ "$(wc -l </tmp/sums)" = "$1" ] || return 1
    umount /mnt && e2fsck -fn "$disk" || return 1
}
# keep_file: a mounted file system with a file; file_is_kept: it still is, and can be written.
keep_file() {
    disk=$(find_disk data) && mkfs.ext4 -qF "$disk" && mount -t ext4 "$disk" /mnt || return 1
    head -c 8388608 /dev/urandom >/mnt/file && md5sum /mnt/file >/tmp/sum
}
file_is_kept() {
    md5sum -c /tmp/sum || return 1
    head -c 8388608 /dev/urandom >/mnt/more && md5sum /mnt/more >/tmp/more && umount /mnt || return 1
    disk=$(find_disk data) && e2fsck -fn "$disk" && mount -t ext4 "$disk" /mnt || return 1
    md5sum -c /tmp/sum && md5sum -c /tmp/more
}

# ---- Sockets

# On port 1024 a shell; on 1025 each word comes back; on 1026 all comes back once its end has come.
listen() {
    socat -t 60 VSOCK-LISTEN:1024,reuseaddr,fork EXEC:sh </dev/null >/dev/null 2>&1 &
    socat -t 60 VSOCK-LISTEN:1025,reuseaddr,fork,backlog=128 PIPE </dev/null >/dev/null 2>&1 &
    socat -t 60 VSOCK-LISTEN:1026,reuseaddr,fork SYSTEM:'cat >/tmp/kept; cat /tmp/kept' </dev/null >/dev/null 2>&1 &
    patience listens
}
listens() { [ "$(pidof socat | wc -w)" = 3 ]; }
# call PORT BYTES: to a port of the host, which sends everything back once it has all.
call() {
    head -c "$2" /dev/urandom >/tmp/sent
    socat -t 60 - "VSOCK-CONNECT:2:$1" </tmp/sent >/tmp/returned && cmp /tmp/sent /tmp/returned
}
# calls PORT TIMES: ten at a time. Linux gives a connection two seconds, which may be too few where time is
# slow: then once more, and it is said how often.
calls() {
    called=0
    rm -f /tmp/again.*
    while [ $called -lt "$2" ]; do
        in_flight=
        for one in 0 1 2 3 4 5 6 7 8 9; do
            (is_answered "$1" "$called.$one" || {
                touch "/tmp/again.$called.$one"
                is_answered "$1" "$called.$one"
            }) &
            in_flight="$in_flight $!"
        done
        for each in $in_flight; do wait "$each" || return 1; done
        called=$((called + 10))
    done
    echo "$called connections, $(find /tmp -name 'again.*' | wc -l) of them at the second try"
}
is_answered() { [ "$(echo "$2" | socat -t 60 - "VSOCK-CONNECT:2:$1")" = "$2" ]; }
# refused PORT: nobody listens there.
refused() { ! echo | socat -t 60 - "VSOCK-CONNECT:2:$1" 2>/tmp/why && tail -n 1 /tmp/why; }

# ---- Counts

# reads DEPTH COUNT: random reads of 4 KiB.
reads() {
    fio --name=reads --filename="$(find_disk data)" --size=64m --rw=randread --bs=4k --direct=1 \
        --norandommap --number_ios="$2" --ioengine=libaio --iodepth="$1" --thread \
        --clocksource=clock_gettime --output-format=terse >/tmp/fio 2>&1 || {
        cat /tmp/fio
        return 1
    }
}
# count_reads DEPTH FEW MANY: the marks stand where the host is to count.
count_reads() {
    reads "$1" 64 || return 1
    mark "reads-$1-0"
    reads "$1" "$2" || return 1
    mark "reads-$1-1"
    reads "$1" "$3" || return 1
    mark "reads-$1-2"
}
# mark NAME: says what this guest has counted itself, and leaves the host time to do so.
mark() {
    announce "MARK $1 interrupts=$(device_interrupts) signals=$(signals)"
    sleep 3
}
# Interrupts of the VMBus, or of the virtio disk `data`.
device_interrupts() {
    awk '/HYP:|virtio2-req/ { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+$/) sum += $i } END { print sum + 0 }' \
        /proc/interrupts
}
# Signals to the host, over all channels.
signals() {
    cat /sys/bus/vmbus/devices/*/channels/*/events 2>/dev/null | awk '{ sum += $1 } END { print sum + 0 }'
}

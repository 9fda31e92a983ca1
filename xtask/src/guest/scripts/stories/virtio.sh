# The same reads on QEMU's virtio-blk: what ours are held against.

story() {
    scenario virtio-blk
    disk data 64M
    dd if=/dev/urandom of="$WORK/data" bs=1M count=64 conv=notrunc 2>/dev/null
    launch qemu-system-x86_64 -M q35,accel=kvm -cpu host -smp 1 -m 256 -nodefaults -display none \
        -L "$LAB/tools/usr/share/qemu" -L "$LAB/tools/usr/share/seabios" \
        -chardev "file,id=console,path=$logs/console.1" -serial chardev:console \
        -kernel "$LAB/guests/$kernel/vmlinuz" -initrd "$LAB/guests/$kernel/initrd-virtio" \
        -append "$COMMAND_LINE" -no-reboot \
        -drive "if=none,id=ctl,format=raw,file=$WORK/ctl" -device virtio-blk-pci,drive=ctl,serial=ctl \
        -drive "if=none,id=tools,format=raw,readonly=on,file=$LAB/tools.img" \
        -device virtio-blk-pci,drive=tools,serial=tools \
        -drive "if=none,id=data,format=raw,file=$WORK/data" -device virtio-blk-pci,drive=data,serial=data
    up
    count_reads virtio-blk
    pass "counted"
    tell "poweroff -f"
    ends 60 0
}

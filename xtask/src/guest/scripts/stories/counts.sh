# What reads cost.

story() {
    scenario counts
    disk data 64M
    dd if=/dev/urandom of="$WORK/data" bs=1M count=64 conv=notrunc 2>/dev/null
    boot --disk "$WORK/data,id=data"
    up
    count_reads "$synic"
    pass "counted"
    tell poweroff -f
    ends 60 0
}

# The VMM is killed while its guest writes, and started anew.

story() {
    disk data 128M
    scenario killed
    boot --disk "$WORK/data,id=data"
    up
    tell write_synced
    await 600 "SYNCED 5"
    sleep "0.$((RANDOM % 10))"
    kill -9 "$(cat "$WORK/pid")"
    patience 60 ended || die "it was killed and goes on"
    synced=$(heard_times SYNCED)

    boot --disk "$WORK/data,id=data"
    up
    must 120 check_synced "$synced"
    tell poweroff -f
    ends 60 0
    e2fsck -fn "$WORK/data" >"$logs/e2fsck" 2>&1 || die "$(tail -n 1 "$logs/e2fsck")"
    pass "$synced synced files are whole; $said"
}

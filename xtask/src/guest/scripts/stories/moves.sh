# Moves: a guest is saved and restored in a new process, while it works, while it rests, while it stands.

story() {
    disk data 64M
    scenario fio-moved
    boot --disk "$WORK/data,id=data"
    up
    tell passes data 64m
    passes=$order
    await 300 "PASS 1"
    move
    work_on
    move --zstd
    work_on
    move "" --lazy
    work_on
    move --zstd --lazy
    work_on
    move
    tell true
    await 300 "DONE $passes "
    said=$(answer "$passes")
    case $said in ok*) pass "5 moves, ${said#ok }" ;; *) die "$said" ;; esac

    scenario save-idle
    must 60 sync
    sleep 3
    save "$WORK/saved"
    note IDLE "256 $(saved_bytes)"
    restore "$WORK/saved"
    must 60 verified_io data 8m
    pass "$(saved_bytes) bytes of 256 MiB"

    scenario save-paused
    tell ticks
    ticks=$order
    await 60 TICK
    control pause
    before=$(heard_times TICK)
    sleep 3
    [ "$(heard_times TICK)" = "$before" ] || die "it was paused and went on"
    save "$WORK/saved"
    restore "$WORK/saved"
    control resume
    patience 60 ticks_after "$before" || die "it does not go on"
    tell true
    await 60 "DONE $ticks ok"
    pass "went on after $before signs of life"

    scenario restored-twice
    must 60 keep_file
    save "$WORK/saved"
    cp "$WORK/data" "$WORK/data.saved"
    for time in 1 2; do
        cp "$WORK/data.saved" "$WORK/data"
        restore "$WORK/saved"
        must 120 file_is_kept
        tell poweroff -f
        ends 60 0
    done
    pass "the file is there both times"

    scenario restore-refused
    mv "$WORK/data" "$WORK/elsewhere"
    restore "$WORK/saved"
    patience 60 ended || die "it was restored without its disk"
    [ "$(cat "$WORK/status")" != 0 ] || die "status 0 without its disk"
    grep -q "$WORK/data" "$logs/events.$vm" || die "the disk is not named: $(last_event)"
    why=$(last_event)
    restore "$WORK/saved" --disk "data=$WORK/elsewhere"
    must 60 true
    pass "$why"
}

# move SAVE RESTORE: with these options.
move() {
    # shellcheck disable=SC2086 # an option, or none
    save "$WORK/saved" $1
    restore "$WORK/saved" $2
}
work_on() { sleep "$((RANDOM % 3)).$((RANDOM % 10))"; }
saved_bytes() { echo $(($(du -sk "$WORK/saved" | cut -f 1) * 1024)); }
ticks_after() { [ "$(heard_times TICK)" -gt "$1" ]; }

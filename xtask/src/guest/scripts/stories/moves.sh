# Moves: a guest is saved and restored in a new process, while it works, while it rests, while it stands.

story() {
    disk data 64M
    slow_disk slow 64M
    in_flight=0
    scenario fio-moved
    boot --disk "$WORK/data,id=data" --disk "$OUT/slow/slow,id=slow" --allow "$OUT"
    up
    tell passes slow 64m
    passes=$order
    await 300 "PASS begins"
    work_on
    move
    work_on
    move --zstd
    work_on
    move "" --lazy
    work_on
    move --zstd
    work_on
    move "" --lazy
    heard "DONE $passes " && die "it was over before the last move: $(answer "$passes")"
    tell true
    await 600 "DONE $passes "
    said=$(answer "$passes")
    case $said in ok*) ;; *) die "$said" ;; esac
    [ $in_flight -gt 0 ] || die "no request was in flight in any of 5 moves"
    pass "5 moves with $in_flight requests in flight; ${said#ok }"

    scenario save-idle
    must 60 sync
    sleep 3
    save "$WORK/saved"
    note IDLE "$(saved memory_bytes) $(saved memory_written_bytes)"
    again
    must 120 verified_io data 8m
    pass "$(($(saved memory_written_bytes) >> 20)) of $(($(saved memory_bytes) >> 20)) MiB written"

    scenario save-paused
    tell ticks
    ticks=$order
    await 60 TICK
    control pause
    before=$(heard_times TICK)
    sleep 3
    [ "$(heard_times TICK)" = "$before" ] || die "it was paused and went on"
    save "$WORK/saved"
    again
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
        again
        must 120 file_is_kept
        tell poweroff -f
        ends 60 0
    done
    pass "the file is there both times"

    scenario restore-refused
    mv "$WORK/data" "$WORK/elsewhere"
    again
    patience 60 ended || die "it was restored without its disk"
    [ "$(cat "$WORK/status")" != 0 ] || die "status 0 without its disk"
    grep -q "$WORK/data" "$logs/events.$vm" || die "the disk is not named: $(last_event)"
    why=$(last_event)
    again --disk "data=$WORK/elsewhere"
    must 60 true
    pass "$why"
}

# move SAVE RESTORE: with these options.
move() {
    # shellcheck disable=SC2086 # an option, or none
    save "$WORK/saved" ${1:-}
    in_flight=$((in_flight + $(saved in_flight)))
    # shellcheck disable=SC2086
    again ${2:-}
}
# again ARGUMENTS: what was saved. The folder of the slow disk is allowed as a whole: a network file system
# keeps no inode that a rule for one file could be tied to.
again() { restore "$WORK/saved" --allow "$OUT" "$@"; }
work_on() { sleep "$((RANDOM % 3)).$((RANDOM % 10))"; }
ticks_after() { [ "$(heard_times TICK)" -gt "$1" ]; }

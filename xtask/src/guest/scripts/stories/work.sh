# A day's work: a guest boots, works on its disk, gets another and loses it, talks, and is shut down.

story() {
    disk data 128M
    scenario boot
    boot --disk "$WORK/data,id=data"
    up
    must 60 version
    pass "$said"

    check ext4 600 file_system
    check fio 600 verified_io data 64m
    apart hot_plug
    apart sockets
    check reload 120 driver_reload

    scenario shutdown
    control shutdown
    await 60 "MARK shut down"
    ends 60 0
    pass "powered off"
}

hot_plug() {
    scenario hot-plug
    disk extra 8M
    tell hot_plug
    await 60 "MARK ready for extra"
    control add-disk --disk "$WORK/extra,id=extra"
    await 120 "MARK extra in use"
    sleep 1
    control remove-disk --id extra
    told 120 || die "$said"
    sum=$(md5sum <"$WORK/extra" | cut -d ' ' -f 1)
    if [ "$sum" = "$said" ]; then pass "8 MiB arrived"; else fail "the image has $sum, not $said"; fi
}

sockets() {
    scenario hvsock-guest
    must 30 listen
    answer=$(echo 'echo $((6 * 7))' | converse 1024)
    [ "$answer" = 42 ] || die "a shell was asked for 6 * 7 and said: $answer"
    head -c 1048576 /dev/urandom >"$WORK/sent"
    converse 1026 <"$WORK/sent" >"$WORK/returned" || die "no conversation with port 1026"
    cmp "$WORK/sent" "$WORK/returned" || die "1 MiB came back changed"
    answer=$(echo | converse 1027) && die "nobody listens on port 1027, and yet: $answer"
    pass "1 MiB there and back, its end first"

    scenario hvsock-host
    background socat -t 60 "UNIX-LISTEN:$WORK/vsock_2000,fork,backlog=128" PIPE
    background socat -t 60 "UNIX-LISTEN:$WORK/vsock_2001,fork" SYSTEM:"cat >$WORK/kept; cat $WORK/kept"
    patience 60 [ -S "$WORK/vsock_2001" ]
    must 90 call 2001 1048576
    must 60 refused 2002
    pass "1 MiB there and back; a port without listener: $said"

    scenario hvsock-100
    must 180 calls 2000 50
    at=0
    again=0
    while [ $at -lt 50 ]; do
        at=$((at + 1))
        comes_back $at && continue
        again=$((again + 1))
        comes_back $at || die "connection $at failed"
    done
    pass "from the guest $said; to it $at connections, $again of them at the second try"
}
comes_back() { [ "$(echo "number $1" | converse 1025)" = "number $1" ]; }

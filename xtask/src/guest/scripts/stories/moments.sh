# Moments: a guest is saved and restored while it boots, and while its driver opens and closes channels.

story() {
    disk data 64M
    scenario save-booting
    moments=
    boot --disk "$WORK/data,id=data"
    while [ "$(echo "$moments" | wc -w)" -lt 5 ] && ! heard GUEST-UP; do moment; done
    up
    must 60 verified_io data 4m
    pass "saved at$moments"

    scenario save-opening
    moments=
    tell driver_loop 6
    loop=$order
    await 60 "LOOP 1"
    while [ "$(echo "$moments" | wc -w)" -lt 5 ] && ! heard "DONE $loop "; do moment; done
    told 120 || die "$said"
    pass "saved at$moments; $said"
}

moment() {
    after=$((RANDOM % 2)).$((RANDOM % 10))
    sleep $after
    moments="$moments $(cut -d ' ' -f 1 /proc/uptime)"
    save "$WORK/saved"
    restore "$WORK/saved"
}

# Resets: by the guest, by the host's request, and by a crash. Each time the bus is unloaded and found again.

story() {
    disk data 64M
    on_reset=restart
    boot --disk "$WORK/data,id=data"
    scenario reboot
    up
    tell reboot -f
    up
    must 60 version
    pass "$said"

    scenario host-reboot
    control reboot
    await 60 "MARK reboot"
    up
    must 60 version
    pass "$said"

    scenario crash
    must 60 'echo 1 >/proc/sys/kernel/sysrq'
    tell 'echo c >/proc/sysrq-trigger'
    patience 60 crash_reported || die "the crash was not reported: $(last_event)"
    up
    must 60 version
    pass "$(grep -i crash "$logs/events.$vm" | tail -n 1)"
    tell poweroff -f
    ends 60 0
}

crash_reported() { grep -qi 'crash' "$logs/events.$vm"; }

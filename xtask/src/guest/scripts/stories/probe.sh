# Whether a guest boots here at all.

story() {
    scenario boots
    boot
    up
    tell poweroff -f
    ends 60 0
    pass
}

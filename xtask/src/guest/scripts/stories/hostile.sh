# A guest that writes nonsense to every MSR, posts and signals at random, unmaps its rings and resets in the
# middle of it all: another one after each reset, for a while, in both ways.

story() {
    scenario hostile
    disk data 64M
    told=
    "$LAB/bin/hostile" "$WORK/guest" || die "no hostile guest could be made"
    for synic in kernel user; do
        step "hostile, $synic"
        launch kmcl vm run --kernel "$WORK/guest" --memory 64M --cpus 1 --synic $synic \
            --disk "$WORK/data,id=data" --on-reset restart --console "$logs/console.$((vm + 1))" \
            --control "$WORK/control" --vsock "$WORK/vsock"
        patience 60 resets_or_ended 3
        sleep 10
        ended && die "$synic: the VM ended with status $(cat "$WORK/status"): $(last_event)"
        kilobytes=$(sed -n 's/^RssAnon:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$(cat "$WORK/pid")/status")
        [ "$kilobytes" -lt 65536 ] || die "$synic: the VMM has $kilobytes KiB"
        control info
        kill -TERM "$(cat "$WORK/pid")"
        ends 60 0
        told="$told $synic: $(resets) resets, $(actions) thousand actions, $kilobytes KiB;"
    done
    pass "${told# }"
}
resets() { grep -c restarted "$logs/events.$vm"; }
resets_or_ended() { [ "$(resets)" -ge "$1" ] || ended; }
# The guest says . for each 4096 of them.
actions() { echo $(($(tr -dc . <"$logs/console.$vm" | wc -c) * 4)); }

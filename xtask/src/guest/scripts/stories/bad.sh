# Command lines that cannot be obeyed: each is refused with one line that names the culprit.

story() {
    scenario bad-command-lines
    vmlinuz=$LAB/guests/$kernel/vmlinuz
    initrd=$LAB/guests/$kernel/initrd
    disk data 64M
    head -c 1000000 /dev/zero >"$WORK/zeros"
    count=0
    refused "$WORK/nothing" --kernel "$WORK/nothing"
    refused "$WORK/zeros" --kernel "$WORK/zeros"
    refused "$WORK" --kernel "$WORK"
    refused "$WORK/nothing" --kernel "$vmlinuz" --initrd "$WORK/nothing"
    refused "$WORK/nothing" --kernel "$vmlinuz" --initrd "$initrd" --disk "$WORK/nothing,id=data"
    refused "memory" --kernel "$vmlinuz" --initrd "$initrd" --memory 1M
    refused "memory" --kernel "$vmlinuz" --initrd "$initrd" --memory 1000T
    refused "memory" --kernel "$vmlinuz" --initrd "$initrd" --memory much
    refused "processors" --kernel "$vmlinuz" --initrd "$initrd" --cpus 0
    refused "processors" --kernel "$vmlinuz" --initrd "$initrd" --cpus 17
    refused "/dev/kvm" --kernel "$vmlinuz" --initrd "$initrd" # where there is none
    refused "$WORK/nothing" restore --from "$WORK/nothing"
    pass "$count refused"
}

# refused TEXT ARGUMENTS
refused() {
    text=$1
    shift
    count=$((count + 1))
    step "bad command line $count: $*"
    command=run
    [ "$1" = restore ] && command=restore && shift
    launch without_kvm_if_asked "$text" timeout 60 kmcl vm $command --synic "$synic" "$@"
    patience 90 ended || die "not refused in time: $*"
    status=$(cat "$WORK/status")
    case $status in 2 | 3 | 5) ;; *) die "status $status: $*: $(last_event)" ;; esac
    grep -qi -- "$text" "$logs/events.$vm" || die "no word of $text: $(last_event)"
    grep -q panicked "$logs/events.$vm" && die "panicked: $*"
    echo "$*: $(last_event)"
}
without_kvm_if_asked() {
    asked=$1
    shift
    if [ "$asked" = /dev/kvm ]; then
        unshare -m sh -c 'mount -t tmpfs none /dev && exec "$@"' sh "$@"
    else
        "$@"
    fi
}

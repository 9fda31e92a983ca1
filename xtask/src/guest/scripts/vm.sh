# Words for the stories: VMs, what their guests are told and say, and what is made known of it.
#
# A guest is given its commands on a disk of their own, one at a time: a sector that the script writes and
# the guest reads past all caches. That needs nothing but storage, and goes on over a save and restore. It
# is none of the first sectors, by which a saved VM knows its disks again. What the guest says is in its
# console.

# ---- What is made known

# note KIND WORDS: a line of the results.
note() {
    kind=$1
    shift
    echo "$kind $run $*" >>"$OUT/results"
}
# step WORDS: what is done now, to be told if nothing comes after it.
step() {
    echo "$(cut -d ' ' -f 1 /proc/uptime) $*"
    note STEP "$*"
}
# scenario NAME: what follows belongs to this scenario.
scenario() {
    scenario=$1
    step "$1"
}
# pass WORDS, fail WORDS: the scenario's end, with what was seen.
pass() {
    note RESULT "$scenario ok $*"
    scenario=
}
fail() {
    note RESULT "${scenario:-story} failed $*"
    scenario=
}
# die WORDS: the story cannot go on, or what runs `apart`.
die() {
    fail "$*"
    exit 1
}

# apart COMMAND: what follows does not depend on it.
apart() { ("$@"); }

begin_story() {
    echo 0 >"$WORK/order"
    vm=0
    ups=0
    on_reset=exit
    scenario=
    disk ctl 1M
}
# end_story: whatever the story has left running.
end_story() {
    for pid in "$WORK"/pid "$WORK"/background.*; do
        [ -e "$pid" ] && kill -9 "$(cat "$pid")" 2>/dev/null
    done
    [ ! -e "$WORK/pid" ] || patience 60 ended # and nothing of it comes into the next story
    rm -rf "$OUT/slow"
}
# background COMMAND: until the story ends.
background() {
    "$@" </dev/null >/dev/null 2>&1 &
    echo $! >"$WORK/background.$!"
}

# ---- VMs

# disk NAME SIZE: an empty disk.
disk() {
    rm -f "$WORK/$1"
    truncate -s "$2" "$WORK/$1"
}
# slow_disk NAME SIZE: the same where requests take their time, so that some are in flight at any moment.
slow_disk() {
    mkdir -p "$OUT/slow"
    truncate -s "$2" "$OUT/slow/$1"
}
# boot ARGUMENTS: a VM of this run's kernel with the disks that every guest has; ARGUMENTS are added.
boot() {
    # shellcheck disable=SC2046 # an option, or none
    launch kmcl vm run $(huge_pages) \
        --kernel "$LAB/guests/$kernel/vmlinuz" --initrd "$LAB/guests/$kernel/initrd" \
        --cmdline "$COMMAND_LINE" --memory 256M --cpus "$cpus" --synic "$synic" \
        --disk "$WORK/ctl,id=ctl" --disk "$LAB/tools.img,ro,id=tools,controller=1" \
        --console "$logs/console.$((vm + 1))" \
        --control "$WORK/control" --vsock "$WORK/vsock" --allow "$WORK" --on-reset "$on_reset" "$@"
    patience 60 serves_or_ended
}
# huge_pages: the option, where there are enough of them for two guests.
huge_pages() { [ "$(cat /proc/sys/vm/nr_hugepages)" -lt 256 ] || echo --huge-pages; }
COMMAND_LINE="console=ttyS0 panic=-1 loglevel=4 mitigations=off"
# restore FOLDER ARGUMENTS: a VM that was saved.
restore() {
    from=$1
    shift
    launch kmcl vm restore --from "$from" --synic "$synic" \
        --console "$logs/console.$((vm + 1))" \
        --control "$WORK/control" --vsock "$WORK/vsock" --allow "$WORK" "$@"
    patience 60 serves_or_ended
}
# launch COMMAND: a program that runs a VM, in the background; its messages are kept.
launch() {
    vm=$((vm + 1))
    rm -f "$WORK/pid" "$WORK/status" "$WORK/control"
    {
        "$@" </dev/null >"$logs/events.$vm" 2>&1 &
        echo $! >"$WORK/pid.part"
        mv "$WORK/pid.part" "$WORK/pid"
        wait $!
        echo $? >"$WORK/status"
    } &
    until [ -e "$WORK/pid" ]; do sleep 0.1; done
}
ended() { [ -e "$WORK/status" ]; }
serves_or_ended() { [ -S "$WORK/control" ] || ended; }
# control COMMAND ARGUMENTS: a word to the VM; what it answers is kept.
control() {
    word=$1
    shift
    answer=$(kmcl vm "$word" --control "$WORK/control" "$@" 2>&1) ||
        die "kmcl vm $word: status $?: $(echo "$answer" | tail -n 1)"
    echo "kmcl vm $word: $answer"
}
# save FOLDER ARGUMENTS: and the VM's end.
save() {
    rm -rf "$1"
    control save --json --to "$@"
    note SAVED "$(saved freeze_us) $(saved saved_us) $(saved memory_bytes) $(saved memory_written_bytes)"
    ends 60 0
}
# saved FIELD: what was said of the last save.
saved() { echo "$answer" | sed -n "s/.*\"$1\": *\([0-9]*\).*/\1/p"; }
# ends LIMIT STATUS: the VM ends by itself, with this exit status.
ends() {
    step "the VM's end"
    patience "$1" ended || die "the VM did not end"
    [ "$(cat "$WORK/status")" = "$2" ] ||
        die "the VM ended with status $(cat "$WORK/status"), not $2: $(last_event)"
}
last_event() { tail -n 1 "$logs/events.$vm"; }

# patience LIMIT COMMAND: until the command succeeds; fails after LIMIT seconds.
patience() {
    until_then=$(($(now) + $1))
    shift
    until "$@"; do
        [ "$(now)" -lt "$until_then" ] || return 1
        sleep 0.2
    done
}
now() { cut -d . -f 1 /proc/uptime; }

# ---- Guests

# heard TEXT: whether a guest of this run has said it. Counted, heard_times.
heard() { cat "$logs"/console.* 2>/dev/null | grep -aqF -- "$1"; }
heard_times() { cat "$logs"/console.* 2>/dev/null | grep -aocF -- "$1"; }
heard_or_over() { heard "$1" || ended || heard "DONE $order failed"; }
# await LIMIT TEXT: until a guest says it.
await() {
    patience "$1" heard_or_over "$2" || die "the guest has not said \"$2\" in $1 s"
    heard "$2" && return
    ended && die "the VM ended with status $(cat "$WORK/status"): $(last_event)"
    die "the guest has not said \"$2\" but $(answer "$order")"
}
# tell COMMAND: a command for the guest; does not wait.
tell() {
    order=$(($(cat "$WORK/order") + 1))
    echo $order >"$WORK/order"
    step "told: $*"
    printf '%s\n%s\n%s\n' "$order" "$*" "$order" |
        dd of="$WORK/ctl" bs=4096 seek=16 conv=notrunc,sync 2>/dev/null
}
# told LIMIT: until the guest has done what it was told last; its last line is in $said.
told() {
    await "$1" "DONE $order "
    said=$(answer "$order")
    verdict=${said%% *}
    said=${said#"$verdict"}
    said=${said# }
    [ "$verdict" = ok ]
}
# answer ORDER: what the guest has said to it.
answer() { cat "$logs"/console.* | tr -d '\r' | sed -n "s/.*DONE $1 //p" | tail -n 1; }
# ask LIMIT COMMAND: both. must LIMIT COMMAND: and the story ends if it fails.
ask() {
    limit=$1
    shift
    tell "$@"
    told "$limit"
}
must() { ask "$@" || die "$said"; }
# check NAME LIMIT COMMAND: a scenario that is one command.
check() {
    scenario "$1"
    shift
    if ask "$@"; then pass "$said"; else fail "$said"; fi
}
# up: the guest is ready to be told, once more if it was before.
up() {
    ups=$((ups + 1))
    step "boot"
    patience 600 up_or_ended || die "the guest has not come up"
    is_up || die "the VM ended with status $(cat "$WORK/status"): $(last_event)"
}
is_up() { [ "$(heard_times GUEST-UP)" -ge $ups ]; }
up_or_ended() { is_up || ended; }

# converse PORT: what comes in goes to a port of the guest, up to its end; what the guest answers comes out.
converse() {
    {
        echo "CONNECT $1"
        cat
    } | socat -t 60 - "UNIX-CONNECT:$WORK/vsock" | {
        read -r answer
        case $answer in "OK "*) cat ;; *) return 1 ;; esac
    }
}

# ---- Counts

FEW=1000
MANY=9000
# count_reads NAME: what reads of 4 KiB cost, one at a time and 32: KVM's counts and the guest's, between
# marks, for a few reads and for many. The difference is free of what beginning and ending costs.
count_reads() {
    note READS "$FEW $MANY"
    for depth in 1 32; do
        tell "count_reads $depth $FEW $MANY"
        for at in 0 1 2; do
            await 600 "MARK reads-$depth-$at "
            sleep 1
            note COUNT "$1 $depth $at $(kvm_counts) $(guest_counts "reads-$depth-$at")"
            histograms "$logs/exits-$depth-$at"
        done
        told 60 || die "$said"
    done
}
# The counts of the VM that runs, over all its processors.
kvm_counts() {
    for file in exits io_exits mmio_exits halt_exits irq_exits irq_injections hypercalls; do
        echo "$file=$(cat /sys/kernel/debug/kvm/"$(cat "$WORK/pid")"-*/$file)"
    done | tr '\n' ' '
}
guest_counts() {
    cat "$logs"/console.* | tr -d '\r' | grep -ao "MARK $1 .*" | tail -n 1 | cut -d ' ' -f 3-
}
# histograms FILE: what the exits since the last time were for, where the kernel can tell. For people.
histograms() {
    for event in kvm_exit=exit_reason kvm_msr=write,ecx.hex kvm_hv_hypercall=code; do
        folder=/sys/kernel/debug/tracing/events/kvm/${event%%=*}
        [ -e "$folder/hist" ] && grep hitcount "$folder/hist" >"$1-${event%%=*}"
        for sign in '!' ''; do
            echo "${sign}hist:keys=${event#*=}" >"$folder/trigger"
        done
    done 2>/dev/null
    return 0
}

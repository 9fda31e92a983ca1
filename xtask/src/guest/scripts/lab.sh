# The host's side of the laboratory: runs the stories that $LAB/runs lists, each with a VM of its own,
# and writes what came of them to $OUT/results.
#
# LAB: the folder with kernels, RAM disks, programs and scripts. OUT: results, and the logs of every run.
# WORK: disks, sockets and saved VMs.

PATH=$LAB/bin:$PATH:$LAB/tools/bin
. "$LAB/scripts/vm.sh"

while read -r run kernel synic cpus story <&3; do
    logs=$OUT/logs/$run-$story
    mkdir -p "$logs" "$WORK"
    echo "RUN $run" >>"$OUT/results"
    (
        . "$LAB/scripts/stories/$story.sh"
        begin_story
        story
    ) >"$logs/lab" 2>&1
    end_story
    rm -rf "$WORK"
    echo "END $run" >>"$OUT/results"
done 3<"$LAB/runs"

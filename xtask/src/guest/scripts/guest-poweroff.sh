#!/bin/busybox sh
# What the kernel calls when the host has asked for a shutdown. init is a script: it ends here.
echo "MARK shut down" >/dev/console
sync
umount -a 2>/dev/null
/bin/busybox poweroff -f

#!/bin/busybox sh
# What the kernel calls when the host has asked for a reboot.
echo "MARK reboot" >/dev/console
sync
umount -a 2>/dev/null
/bin/busybox reboot -f

# $1: what L1 left: the backups as they were before one of them was booted, and the mirror that Linux ended on.
cd "$1"
qemu-img rebase -q -u -f qcow2 -F qcow2 -b full.qcow2 inc.qcow2
for image in full inc mirror; do check "check-$image" qemu-img check -q "$image.qcow2"; done
qemu-img convert -O raw mirror.qcow2 mirror.raw
check mirror-fsck e2fsck -fn mirror.raw
check mirror-holds test "$(debugfs -R 'cat /etc/motd' mirror.raw 2>/dev/null)" = "hello from the backing file"
qemu-img convert -O raw inc.qcow2 inc.raw
# a disk that was pulled out in the middle of things: the journal is replayed, and then all is well
e2fsck -fy inc.raw >/dev/null 2>&1
check backup-fsck e2fsck -fn inc.raw

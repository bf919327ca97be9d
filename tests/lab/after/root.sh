# $1: what L1 left. The image is clean, ext4 too, and the file that Linux wrote is whole.
cd "$1"
check check qemu-img check -q root.qcow2
qemu-img convert -O raw root.qcow2 flat.raw
check compare qemu-img compare -q root.qcow2 flat.raw
check fsck e2fsck -fn flat.raw
debugfs -R "dump /big big" flat.raw 2>/dev/null
check data test "$(md5sum big | cut -c1-32)" = "$(cat sum)"
check motd test "$(debugfs -R 'cat /etc/motd' flat.raw 2>/dev/null)" = changed
check backing-untouched test "$(debugfs -R 'cat /etc/motd' root.raw 2>/dev/null)" = "hello from the backing file"

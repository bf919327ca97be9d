# $1: what L1 left of the image that was in use at the kill. Leaks are allowed (and repaired), errors are not; every synced file is there.
cd "$1"
qemu-img check -q kill.qcow2; status=$?
check check test $status = 0 -o $status = 3
check repair qemu-img check -q -r leaks kill.qcow2
check clean qemu-img check -q kill.qcow2
qemu-img convert -O raw kill.qcow2 flat.raw
e2fsck -fy flat.raw >fsck.log 2>&1
check fsck test $? -le 1
while read -r number sum; do
  [ "$number" = "$(tail -n 1 synced | cut -d' ' -f1)" ] || [ "$((number % 3))" = 2 ] || continue   # l2/kill.sh removes some
  rm -f got; debugfs -R "dump /f$number got" flat.raw 2>/dev/null
  [ ! -s got ] || [ "$(md5sum got | cut -c1-32)" = "$sum" ] || echo "FAIL kill-file-$number: not what was synced"
done <synced
last=$(tail -n 1 synced); rm -f got; debugfs -R "dump /f${last%% *} got" flat.raw 2>/dev/null
check last-file test "$(md5sum got | cut -c1-32)" = "${last##* }"

# fio verifies files on ext4 on /dev/vda until the power button is pressed. Programs are on /dev/vdb.
mkdir -p /tools; mount -t ext4 -o ro /dev/vdb /tools || echo "FAIL mount"
mount -t ext4 /dev/vda /mnt || echo "FAIL mount root"
mount --bind /dev /tools/dev; mount -t proc none /tools/proc; mount -t sysfs none /tools/sys
mount -t tmpfs none /tools/tmp; mount --bind /mnt /tools/mnt
for event in /sys/class/input/event*/device/name; do
  if [ "$(cat "$event")" = "Power Button" ]; then dev=/dev/input/$(echo "$event" | cut -d/ -f5); fi
done
(dd if="$dev" bs=24 count=1 of=/tmp/ev 2>/dev/null; touch /tmp/stop) &
cat >/tools/tmp/job <<'T'
[global]
directory=/mnt
direct=1
ioengine=libaio
verify=crc32c
verify_fatal=1
verify_backlog=64
[small]
size=10m
io_size=4m
rw=randwrite
bssplit=4k/60:8k/40
iodepth=8
[mixed]
size=14m
io_size=8m
rw=randwrite
bsrange=4k-128k
blockalign=4k
iodepth=4
T
echo "T-BEGIN"
pass=0
while [ ! -e /tmp/stop ]; do
  pass=$((pass + 1))
  chroot /tools /bin/fio --eta=never --randseed=$pass --output=/tmp/out /tmp/job; status=$?
  if [ $status != 0 ] || grep -qi "verify.*fail" /tools/tmp/out; then echo "T-FIO failed in pass $pass: $status"; tail -n 30 /tools/tmp/out; break; fi
  echo "pass $pass"
done
echo "T-PASSES $pass"
umount /tools/mnt; umount /mnt; sync

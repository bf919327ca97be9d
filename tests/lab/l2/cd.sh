# What a guest does with a CD drive and SCSI disks. No udev here: uevents go to a file.
wait_for() { i=0; until eval "$1"; do i=$((i + 1)); [ $i -lt 600 ] || { echo "FAIL waited for $1"; return; }; sleep 0.1; done; }
field() { sed 's/ *$//' "$1"; }
wait_for '[ -e /sys/block/sr0 ] && [ -e /sys/block/sda ]'
uevent sh -c 'env >>/tmp/uevents' &
uevents=$!
# the tray obeys the script, not whoever opens the device
echo 0 >/proc/sys/dev/cdrom/autoclose
echo 500 >/sys/block/sr0/events_poll_msecs
echo "T-CD $(field /sys/block/sr0/device/vendor) $(field /sys/block/sr0/device/model)"
echo "T-SUM $(md5sum </dev/sr0)"
serial=$(dd if=/sys/block/sda/device/vpd_pg80 bs=1 skip=4 2>/dev/null)
echo "T-DISK $(field /sys/block/sda/device/vendor) $(field /sys/block/sda/device/model) $serial $(cat /sys/block/sda/size) $(cat /sys/block/sda/queue/rotational)"
dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null
dd if=/tmp/r of=/dev/sda bs=64k seek=16 oflag=direct conv=fsync,notrunc 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/sda of=/tmp/s bs=64k skip=16 count=128 iflag=direct 2>/dev/null; cmp /tmp/r /tmp/s && echo "T-WRITE ok"
echo "T-CACHE $(cat /sys/block/sda/queue/write_cache)"
echo "T-MODE $(cat /sys/class/scsi_disk/*/provisioning_mode)"
blkdiscard /dev/sda; echo "T-DISCARD done"
echo "T-WAIT plug"
wait_for '[ -e /sys/block/sdb ]'
dd if=/tmp/r of=/dev/sdb bs=64k oflag=direct conv=fsync,notrunc 2>/dev/null
dd if=/dev/sdb of=/tmp/s bs=64k count=128 iflag=direct 2>/dev/null; cmp /tmp/r /tmp/s && same=ok
echo "T-PLUGGED $(cat /sys/block/sdb/size) $same"
wait_for '[ ! -e /sys/block/sdb ]'
echo "T-UNPLUGGED"
wait_for '[ "$(cat /sys/block/sda/size)" != 131072 ]'
echo "T-RESIZED $(cat /sys/block/sda/size)"
# whoever has it open keeps the tray locked
exec 5</dev/sr0
echo "T-LOCKED"
wait_for 'grep -q DISK_EJECT_REQUEST=1 /tmp/uevents'
echo "T-EJECT-REQUEST"
# the last one to close it opens the tray
echo 1 >/proc/sys/dev/cdrom/autoeject
exec 5<&-
echo 0 >/proc/sys/dev/cdrom/autoeject
wait_for '! dd if=/dev/sr0 of=/dev/null bs=2048 count=1 2>/dev/null'
: >/tmp/uevents
echo "T-EJECTED"
wait_for 'grep -q DISK_MEDIA_CHANGE=1 /tmp/uevents && dd if=/dev/sr0 of=/dev/null bs=2048 count=1 2>/dev/null'
echo "T-CHANGED $(md5sum </dev/sr0)"
wait_for '! dd if=/dev/sr0 of=/dev/null bs=2048 count=1 2>/dev/null'
echo "T-EMPTY"
sleep 3
dd if=/dev/sr0 of=/dev/null bs=2048 count=1 2>/dev/null || echo "T-CLOSED empty"
kill $uevents

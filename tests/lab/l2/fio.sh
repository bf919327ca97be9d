# fio with verification on /dev/vda, twice: while the host resizes the disk, and while it takes snapshots. Programs are on /dev/vdb.
mkdir -p /tools; mount -t ext4 -o ro /dev/vdb /tools || echo "FAIL mount"
mount --bind /dev /tools/dev; mount -t proc none /tools/proc; mount -t sysfs none /tools/sys
mount -t tmpfs none /tools/tmp
cat >/tools/tmp/job <<'T'
[global]
filename=/dev/vda
direct=1
ioengine=libaio
verify=crc32c
verify_fatal=1
verify_backlog=64
[small]
offset=0
size=14m
io_size=6m
rw=randwrite
bssplit=512/20:4k/50:8k/20:12k/10
iodepth=8
[mixed]
offset=14m
size=18m
io_size=14m
rw=randwrite
bsrange=4k-256k
blockalign=4k
iodepth=4
[trim]
offset=32m
size=12m
io_size=8m
rw=randtrimwrite
bs=64k
[order]
offset=44m
size=12m
rw=write
bs=1m
T
# pass NAME SEED: all four jobs at once, each checks what it wrote
pass() {
  echo "T-BEGIN $1"
  chroot /tools /bin/fio --eta=never --randseed="$2" --output=/tmp/out --loops="${3:-1}" /tmp/job; status=$?
  [ $status = 0 ] && ! grep -qi "verify.*fail\|err=[ 0]*[1-9]" /tools/tmp/out && echo "T-FIO-$1 ok" || { echo "T-FIO-$1 failed: $status"; tail -n 30 /tools/tmp/out; }
  grep -E "^ *(read|write|trim)|READ:|WRITE:|TRIM:" /tools/tmp/out
}
echo "T-QUEUES $(ls /sys/block/vda/mq | wc -l)"
pass resize 7 2
echo "T-SIZE $(($(cat /sys/block/vda/size) / 2048))"
# the space that came while it ran
dd if=/dev/urandom of=/tmp/new bs=1M count=8 2>/dev/null
dd if=/tmp/new of=/dev/vda bs=1M seek=100 oflag=direct conv=fsync,notrunc 2>/dev/null
dd if=/dev/vda of=/tmp/again bs=1M skip=100 count=8 iflag=direct 2>/dev/null
cmp /tmp/new /tmp/again && echo "T-GROWN ok"
echo "T-NEW $(md5sum /tmp/new | cut -c1-32)"
pass snapshot 11 2
# what fio left alone still comes from the compressed base
echo "T-BASE $(dd if=/dev/vda bs=1M skip=56 count=8 iflag=direct 2>/dev/null | md5sum | cut -c1-32)"
sync
echo "T-READY"
sleep 4
blkdiscard -o $((100 << 20)) -l $((8 << 20)) /dev/vda; blkdiscard -o 0 -l $((56 << 20)) /dev/vda && sync && echo "T-DISCARDED"

# fio verifies what it wrote, on two queues of an overlay whose base is compressed, while the disk grows and snapshots are taken.
machine 384M 2 fio "" >/tmp/c
cat >>/tmp/c <<'T'
[[drive]]
if = "none"
id = "d0"
file = "/fio.qcow2"
format = "qcow2"
discard = "unmap"
node-name = "disk0"
[[device]]
driver = "virtio-blk-pci"
id = "v0"
drive = "d0"
num-queues = 2
[[drive]]
if = "none"
id = "tools"
file = "/dev/vdb"
format = "raw"
read-only = true
[[device]]
driver = "virtio-blk-pci"
drive = "tools"
T
vm_start </tmp/c
check fio-starts con_wait "T-BEGIN resize" 120
qmp_open
for mib in 72 80 88 96 104 112; do
  : >/tmp/qmp.out; qmp "{\"execute\":\"block_resize\",\"arguments\":{\"device\":\"d0\",\"size\":$((mib << 20))}}"
  qmp_wait '"return"' || fail "resize-$mib: $(cat /tmp/qmp.out)"
  grep -q "T-FIO-resize" /tmp/con && up "fio ended before the resize to $mib MiB" || resized=$mib
  sleep 1
done
up "resized to $resized MiB while fio ran"
check fio-resize con_wait "T-FIO-resize ok" 400
check resized-under-fio [ "${resized:-0}" -ge 80 ]
check guest-sees-size con_wait "T-SIZE 112" 30
check grown con_wait "T-GROWN ok" 60
check fio-snapshot-starts con_wait "T-BEGIN snapshot" 60
for n in 1 2 3 4 5; do
  sleep 1
  : >/tmp/qmp.out
  qmp "{\"execute\":\"blockdev-snapshot-sync\",\"arguments\":{\"device\":\"d0\",\"snapshot-file\":\"/snap$n.qcow2\",\"format\":\"qcow2\"}}"
  qmp_wait '"return"' || fail "snapshot-$n: $(cat /tmp/qmp.out)"
  grep -q "T-FIO-snapshot" /tmp/con && up "fio ended before snapshot $n" || taken=$n
done
check fio-snapshot con_wait "T-FIO-snapshot ok" 400
check snapshots-under-fio [ "${taken:-0}" -ge 2 ]
check base-untouched con_wait "T-BASE $(cat /base.md5)" 30
check ready con_wait "T-READY" 30
before=$(du -k /snap5.qcow2 | cut -f1)
check discards con_wait "T-DISCARDED" 60
check fio-off vm_exit 0
after=$(du -k /snap5.qcow2 | cut -f1)
up "the active image took $before KiB, after the discard $after KiB"
check discard-shrinks [ "$after" -lt 2048 ]
grep "T-" /tmp/con
sed -n 's/.*T-NEW \([0-9a-f]*\).*/\1/p' /tmp/con >/out/new
mv /fio.qcow2 /fio-base.qcow2 /snap*.qcow2 /out/

# Linux works on its disk and verifies it, while that is backed up, snapshotted, committed and mirrored by a QMP client on the
# machine outside (host/jobs.py). Then the backup boots.
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
# minivmm's monitor listens on the loopback interface only
printf '#!/bin/sh\nexec nc 127.0.0.1 %s\n' $QMP >/bridge; chmod +x /bridge
nc -ll -p 4445 -e /bridge &
machine 384M 2 jobs "" >/tmp/c
cat >>/tmp/c <<'T'
[[drive]]
if = "none"
id = "d0"
file = "/jobs.qcow2"
format = "qcow2"
node-name = "disk0"
[[device]]
driver = "virtio-blk-pci"
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
check fio-begins con_wait "T-BEGIN" 120
check passes con_wait "T-PASSES" 700
check off vm_exit 0
check fio-verified sh -c '! grep -q "T-FIO failed" /tmp/con'
up "$(grep T-PASSES /tmp/con)"
[ -s /tmp/err ] && cat /tmp/err
cp /full.qcow2 /inc.qcow2 /mirror.qcow2 /out/
# the full backup with the incremental one on top, as a disk to boot from
machine 256M 1 root "" >/tmp/c
cat >>/tmp/c <<'T'
[[blockdev]]
driver = "qcow2"
node-name = "restored"
file = { driver = "file", filename = "/inc.qcow2" }
backing = { driver = "qcow2", read-only = true, file = { driver = "file", filename = "/full.qcow2", read-only = true } }
[[device]]
driver = "virtio-blk-pci"
drive = "restored"
T
vm_start </tmp/c
check backup-boots con_wait "T-ROOT ok" 120
check backup-writes con_wait "T-WRITE ok" 60
check backup-off vm_exit 0

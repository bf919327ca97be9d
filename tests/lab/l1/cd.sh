# A SCSI controller with a CD drive and a disk: data, discard, a unit that comes and goes, resize, and who may open the tray.
for name in a b; do yes "what is on the medium $name" | head -c 1048576 >/tmp/$name.iso; done
suma=$(md5sum </tmp/a.iso | cut -c1-32); sumb=$(md5sum </tmp/b.iso | cut -c1-32)
truncate -s 64M /tmp/d0; truncate -s 16M /tmp/d1
machine 256M 2 cd "" >/tmp/c
cat >>/tmp/c <<'T'
[[device]]
driver = "virtio-scsi-pci"
id = "scsi0"
[[drive]]
if = "none"
media = "cdrom"
id = "cd"
file = "/tmp/a.iso"
format = "raw"
[[device]]
driver = "scsi-cd"
id = "cd0"
drive = "cd"
[[drive]]
if = "none"
id = "d0"
file = "/tmp/d0"
format = "raw"
discard = "unmap"
[[device]]
driver = "scsi-hd"
id = "sd0"
drive = "d0"
serial = "SCSI-1"
rotation_rate = 1
scsi-id = 1
[[blockdev]]
driver = "raw"
node-name = "n1"
file = { driver = "file", filename = "/tmp/d1" }
T
vm_start </tmp/c
ask() { : >/tmp/qmp.out; qmp "$1"; qmp_wait '"return"\|"error"'; }
says() { grep -q "$1" /tmp/qmp.out; }
check cd-found con_wait "T-CD MINIVMM CD-ROM" 120
check cd-read con_wait "T-SUM $suma" 30
check disk-found con_wait "T-DISK MINIVMM HARDDISK SCSI-1 131072 0"
check disk-write con_wait "T-WRITE ok" 60
check disk-flushes con_wait "T-CACHE write back"
check disk-unmap con_wait "T-MODE unmap"
check discard con_wait "T-DISCARD done" 60
check discard-frees [ "$(du -k /tmp/d0 | cut -f1)" -lt 256 ]
qmp_open
check waits con_wait "T-WAIT plug" 30
ask '{"execute":"device_add","arguments":{"driver":"scsi-hd","id":"sd1","drive":"n1","scsi-id":1,"lun":1,"serial":"SCSI-2"}}'
check plugged con_wait "T-PLUGGED 32768 ok" 60
ask '{"execute":"device_del","arguments":{"id":"sd1"}}'
check deleted qmp_wait "DEVICE_DELETED"
check unplugged con_wait "T-UNPLUGGED" 60
ask '{"execute":"blockdev-del","arguments":{"node-name":"n1"}}'
check node-free says '"return"'
ask '{"execute":"block_resize","arguments":{"device":"d0","size":83886080}}'
check resized con_wait "T-RESIZED 163840" 60
check locks con_wait "T-LOCKED" 60
ask '{"execute":"query-block"}'
check locked says '"locked": *true'
ask '{"execute":"eject","arguments":{"id":"cd0"}}'
check eject-refused says "is locked and force was not specified"
check eject-request con_wait "T-EJECT-REQUEST" 60
check guest-ejects qmp_wait "DEVICE_TRAY_MOVED"
check tray-open says '"tray-open": *true'
check ejected con_wait "T-EJECTED" 60
ask '{"execute":"blockdev-change-medium","arguments":{"id":"cd0","filename":"/tmp/b.iso","format":"raw"}}'
check changed says '"tray-open": *false'
check change-seen con_wait "T-CHANGED $sumb" 60
ask '{"execute":"eject","arguments":{"id":"cd0"}}'
check eject says '"return"'
check empty con_wait "T-EMPTY" 60
ask '{"execute":"blockdev-close-tray","arguments":{"id":"cd0"}}'
check still-empty con_wait "T-CLOSED empty" 60
check cd-off vm_exit 0
check quiet sh -c '! grep -i "i/o error.*sda\|reset\b.*scsi\|abort\|hung\|stall" /tmp/con'
grep "T-" /tmp/con

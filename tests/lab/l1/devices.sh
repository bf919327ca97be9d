# Network over a tap, the random number generator, disk identity, discard, clock; then a reboot, and the power button.
ip tuntap add dev tap0 mode tap 2>/dev/null || tunctl -t tap0 >/dev/null
ip addr add 10.9.0.1/24 dev tap0; ip link set tap0 up
truncate -s 64M /tmp/d1
machine 256M 2 devices "" >/tmp/c
cat >>/tmp/c <<'T'
[[drive]]
if = "none"
id = "d1"
file = "/tmp/d1"
format = "raw"
discard = "unmap"
[[device]]
driver = "virtio-blk-pci"
drive = "d1"
serial = "SERIAL-1"
num-queues = 2
[[netdev]]
type = "tap"
id = "n0"
ifname = "tap0"
[[device]]
driver = "virtio-net-pci"
netdev = "n0"
mac = "52:54:00:12:34:56"
[[device]]
driver = "virtio-rng-pci"
T
vm_start </tmp/c
check net-ping con_wait "T-PING ok" 120
check net-mac con_wait "T-MAC 52:54:00:12:34:56"
check net-bulk con_wait "T-BULK ok" 60
check hwrng con_wait "T-RNG ok"
check disk-serial con_wait "T-SERIAL SERIAL-1"
check disk-queues con_wait "T-QUEUES 2"
check disk-write con_wait "T-DISK ok"
check disk-discard con_wait "T-DISCARD done"
check rtc con_wait "T-RTC ok"
check reboot con_wait "T-REBOOTED" 120
qmp_open
check stop-starts con_wait "tick 5" 60
: >/tmp/qmp.out; qmp '{"execute":"stop"}'; check stop qmp_wait '"STOP"'
a=$(grep -c tick /tmp/con); sleep 2; b=$(grep -c tick /tmp/con)
check stopped [ $((b - a)) -le 1 ]
qmp '{"execute":"cont"}'; check cont qmp_wait '"RESUME"'
check clock-runs con_wait "tick $((b + 8))" 60
check clock-sane sh -c '! grep -i "stall\|lockup\|hung" /tmp/con'
: >/tmp/qmp.out; qmp '{"execute":"system_powerdown"}'
check powerdown-event qmp_wait '"POWERDOWN"'
check powerdown con_wait "T-POWERBUTTON" 60
check off vm_exit 0
check shutdown-event qmp_wait '"guest-shutdown"'
grep T- /tmp/con
check discard-frees [ "$(du -k /tmp/d1 | cut -f1)" -lt 4096 ]

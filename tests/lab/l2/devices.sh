if grep -q REBOOTED /dev/vda; then
  echo T-REBOOTED
  # no acpid here: the button's input event says that the host asked for power-off
  for event in /sys/class/input/event*/device/name; do
    if [ "$(cat "$event")" = "Power Button" ]; then dev=/dev/input/$(echo "$event" | cut -d/ -f5); fi
  done
  ( dd if="$dev" bs=24 count=1 of=/tmp/ev 2>/dev/null; echo T-POWERBUTTON; poweroff -f ) &
  i=0; while [ $i -lt 600 ]; do i=$((i + 1)); echo "tick $i"; sleep 0.2; done
fi
ip link set lo up; ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
ping -c 3 -W 5 10.9.0.1 >/dev/null && echo "T-PING ok"
ping -c 20 -i 0.02 -s 8000 -W 5 10.9.0.1 >/dev/null && echo "T-BULK ok"
echo "T-MAC $(cat /sys/class/net/eth0/address)"
[ "$(cat /sys/class/misc/hw_random/rng_current)" = virtio_rng.0 ] && [ "$(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c)" = 256 ] && echo "T-RNG ok"
echo "T-SERIAL $(cat /sys/block/vda/serial)"; echo "T-QUEUES $(ls /sys/block/vda/mq | wc -l)"
dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null
dd if=/tmp/r of=/dev/vda bs=64k seek=16 oflag=direct conv=fsync,notrunc 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda of=/tmp/s bs=64k skip=16 count=128 iflag=direct 2>/dev/null; cmp /tmp/r /tmp/s && echo "T-DISK ok"
blkdiscard /dev/vda 2>&1; echo "T-DISCARD done"
now=$(date +%s); [ "$now" -gt 1700000000 ] && [ -e /sys/class/rtc/rtc0/time ] && echo "T-RTC ok $(cat /sys/class/rtc/rtc0/date)"
echo REBOOTED | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null
reboot -f

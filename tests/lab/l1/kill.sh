# kill -9 of minivmm while Linux writes: what was synced is there afterwards.
machine 256M 2 kill "" >/tmp/c
cat >>/tmp/c <<'T'
[[drive]]
if = "virtio"
file = "/kill.qcow2"
format = "qcow2"
T
vm_start </tmp/c
con_wait "T-SYNCED 12" 180 && ok kill-writes || fail kill-writes
sleep 0.7
kill -9 $VM; wait $VM
sed -n 's/.*T-SYNCED \([0-9]* [0-9a-f]\{32\}\).*/\1/p' /tmp/con >/out/synced
tail -n 1 /out/synced; cp /kill.qcow2 /kill.raw /out/
up "the same image boots again"
vm_start </tmp/c
check kill-remounts con_wait "T-MOUNTED" 120
kill -9 $VM; wait $VM

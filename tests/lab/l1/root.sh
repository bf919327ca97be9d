# Root on ext4 in a qcow2 with a raw backing file: boots, writes, syncs, powers off.
machine 256M 2 root "" >/tmp/c
cat >>/tmp/c <<'T'
[[drive]]
if = "virtio"
file = "/root.qcow2"
format = "qcow2"
T
vm_start </tmp/c
check root-mounts con_wait "T-ROOT ok" 120
check root-writes con_wait "T-WRITE ok" 60
check root-poweroff vm_exit 0
grep T- /tmp/con
sum=$(sed -n 's/.*T-SUM \([0-9a-f]*\).*/\1/p' /tmp/con); echo "$sum" >/out/sum
mv /root.qcow2 /out/; mv /root.raw /out/

# $1: what L1 left: the base, the overlay and five snapshots. All are clean, and the chain holds what the guest wrote.
cd "$1"
# relative names: the chain was made in another directory
for n in 1 2 3 4 5; do qemu-img rebase -q -u -f qcow2 -F qcow2 -b "$([ $n = 1 ] && echo fio || echo snap$((n - 1))).qcow2" "snap$n.qcow2"; done
for image in fio-base fio snap1 snap2 snap3 snap4 snap5; do check "check-$image" qemu-img check -q "$image.qcow2"; done
sum() { qemu-img convert -O raw "$1" flat.raw && dd if=flat.raw bs=1M skip="$2" count=8 2>/dev/null | md5sum | cut -c1-32; }
check new-space test "$(sum snap4.qcow2 100)" = "$(cat new || echo none)"
check discarded-reads-zero test "$(sum snap5.qcow2 100)" = "$(head -c 8M /dev/zero | md5sum | cut -c1-32)"

# Stock Linux to init: by PVH and as bzImage, on 1 and 4 processors, in 256 MiB and in 5 GiB, and off again by ACPI.
for shape in "256M 1" "256M 4" "5G 1" "5G 4"; do
  set -- $shape
  up "vmlinux, $1, $2 vCPUs"
  machine "$1" "$2" boot "" >/tmp/c; vm_start </tmp/c
  check "init-$1-$2cpu" con_wait "L2-INIT boot .* cpus $2 "
  check "poweroff-$1-$2cpu" vm_exit 0
  grep L2-INIT /tmp/con
done
kib=$(sed -n 's/.*mem \([0-9]*\) kB.*/\1/p' /tmp/con)
check "5GiB-is-there" [ "${kib:-0}" -gt 4900000 ]
check clock-kvm grep -q "clock kvm-clock\|clock tsc" /tmp/con
check no-acpi-errors sh -c '! grep -i "ACPI.*error\|ACPI BIOS\|firmware bug" /tmp/con'
up "bzImage, Debian's own command line"
machine 256M 1 boot "" /vmlinuz | sed 's/^cmdline.*/cmdline = "console=ttyS0 quiet lab=boot"/' >/tmp/c; vm_start </tmp/c
check init-bzimage con_wait "L2-INIT boot" 240
check poweroff-bzimage vm_exit 0

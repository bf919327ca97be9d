# lib.sh: what the L1 scripts share (busybox sh). A check prints `ok NAME` or `FAIL NAME: why`; `run` counts those lines.
FAST="console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on net.ifnames=0"
ip link set lo up
QMP=4444
up() { read -r now _ </proc/uptime; echo "[$now] $*"; }
ok() { echo "ok $*"; }
fail() { echo "FAIL $*"; }

# check NAME COMMAND…: runs the command; the check passes when it does
check() {
  name=$1; shift
  if "$@"; then ok "$name"; else fail "$name: $*"; fi
}

# vm_start [minivmm options]: starts minivmm with the config on standard input; its console goes to /tmp/con, its messages to /tmp/err
vm_start() {
  cat >/tmp/vm.toml
  rm -f /tmp/con /tmp/qmp.out; : >/tmp/con; : >/tmp/qmp.out
  /minivmm "$@" /tmp/vm.toml >/tmp/std 2>/tmp/err &
  VM=$!
}

# con_wait PATTERN [SECONDS]: waits until the console shows it
con_wait() {
  tries=$((${2:-90} * 10))
  while ! grep -q "$1" /tmp/con; do
    tries=$((tries - 1))
    if [ $tries -le 0 ] || ! kill -0 "$VM" 2>/dev/null; then
      grep -q "$1" /tmp/con && return 0
      echo "console has no '$1':"; tail -n 15 /tmp/con; tail -n 5 /tmp/err
      return 1
    fi
    sleep 0.1
  done
}

# vm_exit STATUS [SECONDS]: waits for minivmm's end and compares its status
vm_exit() {
  tries=$((${2:-60} * 10))
  while kill -0 "$VM" 2>/dev/null; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { echo "minivmm still runs"; tail -n 5 /tmp/con; kill -9 "$VM"; wait "$VM"; return 1; }
    sleep 0.1
  done
  wait "$VM"; status=$?
  [ "$status" = "$1" ] || { echo "minivmm ended with $status"; tail -n 15 /tmp/con; cat /tmp/err; return 1; }
}

# qmp_open: connects to the monitor; then qmp 'JSON' sends and qmp_wait PATTERN waits for a line
qmp_open() {
  rm -f /tmp/qmp.in; mkfifo /tmp/qmp.in; : >/tmp/qmp.out
  nc 127.0.0.1 $QMP </tmp/qmp.in >>/tmp/qmp.out &
  exec 3>/tmp/qmp.in
  qmp '{"execute":"qmp_capabilities"}'
  qmp_wait '"return"'
}
qmp() { echo "$1" >&3; }
qmp_wait() {
  tries=$((${2:-30} * 10))
  while ! grep -q "$1" /tmp/qmp.out; do
    tries=$((tries - 1)); [ $tries -gt 0 ] || { echo "QMP said no '$1':"; cat /tmp/qmp.out; return 1; }
    sleep 0.1
  done
}

# the two tables every scenario starts with; $1 MiB (or with suffix), $2 cpus, $3 lab=NAME, $4 more command line, $5 kernel
machine() {
  cat <<T
[machine]
memory = "$1"
cpus = $2
[boot]
kernel = "${5:-/vmlinux}"
initrd = "/l2.cpio"
cmdline = "$FAST lab=$3 $4"
[[serial]]
file = "/tmp/con"
[[qmp]]
tcp = "127.0.0.1:$QMP"
T
}

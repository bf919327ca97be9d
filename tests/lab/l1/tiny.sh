# The tiny guest on an ordinary KVM: the first run, then everything else that it can do.
mkdir -p /tmp/f; cp -r /fixtures/* /tmp/f/
/minivmm /tmp/f/hello.toml </dev/null >/tmp/std 2>&1; status=$?
cat /tmp/std
check tiny-exit [ $status = 0 ]
check tiny-verified grep -q verified /tmp/std

# tiny 'COMMAND LINE' 'EXPECTED' [options]
tiny() {
  mode=$1 expected=$2; shift 2
  timeout 60 /minivmm --set "boot.cmdline=\"$mode\"" "$@" /tmp/f/hello.toml </dev/null >/tmp/std 2>&1; status=$?
  if [ $status = 0 ] && grep -q "$expected" /tmp/std; then ok "tiny-$mode"; else fail "tiny-$mode: status $status"; cat /tmp/std; fi
}
tiny cf8 "verified"
tiny "timer" "10 timer interrupts by deadline"
tiny "timer count-down" "10 timer interrupts by count"
tiny "timer xapic" "10 timer interrupts by"
tiny "smp" "4 processors" --set machine.cpus=4
tiny "smp xapic" "4 processors" --set machine.cpus=4
tiny "msix" "10 disk interrupts"
tiny "msix xapic" "10 disk interrupts"
tiny "rtc" "rtc 20"
tiny "reset" "back again"
tiny "crash" "back again"
tiny "blkbench depth=32 count=500" "500 requests, 0 errors"
tiny "blkverify count=50" "50 rounds, 0 bad"

# The tiny guest of the first run, on an ordinary KVM.
mkdir -p /tmp/f; cp -r /fixtures/* /tmp/f/
/minivmm /tmp/f/hello.toml </dev/null >/tmp/std 2>&1; status=$?
cat /tmp/std
check tiny-exit [ $status = 0 ]

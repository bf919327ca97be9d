# The serial console on standard input and output, through pipes: type, paste, Ctrl-A, quit.
machine 256M 1 console "" | sed 's/^file = "\/tmp\/con"/stdio = true/' >/tmp/vm.toml
rm -f /tmp/in; mkfifo /tmp/in; : >/tmp/con
/minivmm /tmp/vm.toml </tmp/in >/tmp/con 2>/tmp/err &
VM=$!
exec 4>/tmp/in
check console-up con_wait CONSOLE-READY
echo "hello there" >&4
check console-short con_wait "GOT-SHORT <hello there>"
# As long as Linux's line discipline takes at once.
long=$(seq 1 1000 | tr '\n' . | cut -c1-3500)
echo "$long" >&4
check console-long con_wait "GOT-LONG 3500 $(echo "$long" | md5sum | cut -d' ' -f1)"
# Linux's own Ctrl-V takes the meaning out of what follows.
printf 'x\026\001\001y\n' >&4
check console-ctrl-a con_wait "GOT-HEX 780179"
con_wait CONSOLE-QUIT
printf '\001x' >&4
check console-quit vm_exit 0

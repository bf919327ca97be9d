# Broken and foreign kernels: a clear error that names the file, before any processor runs.
head -c 4096 /vmlinuz >/tmp/short; head -c 1000000 /vmlinuz >/tmp/cut; echo hello >/tmp/text; : >/tmp/empty
head -c 2000000 /vmlinux >/tmp/cutelf
for bad in short cut text empty cutelf missing; do
  machine 256M 1 boot "" /tmp/$bad >/tmp/bad.toml
  /minivmm /tmp/bad.toml >/tmp/o 2>&1; status=$?
  check "refuses-$bad" [ $status = 1 ]
  check "names-$bad" grep -q "^minivmm: .*/tmp/$bad" /tmp/o
  cat /tmp/o
done

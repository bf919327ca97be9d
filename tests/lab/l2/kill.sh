mount -t ext4 /dev/vda /mnt && echo T-MOUNTED
i=0
while :; do
  i=$((i + 1))
  dd if=/dev/urandom of=/mnt/f$i bs=64k count=7 2>/dev/null; [ $i -gt 4 ] && [ $((i % 3)) = 0 ] && rm -f /mnt/f$((i - 4))
  sync; echo "T-SYNCED $i $(md5sum /mnt/f$i | cut -c1-32)"
done

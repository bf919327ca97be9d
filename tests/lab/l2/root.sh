mount -t ext4 /dev/vda /mnt && [ "$(cat /mnt/etc/motd)" = "hello from the backing file" ] && echo "T-ROOT ok"
mount -t proc none /mnt/proc; mount -t devtmpfs none /mnt/dev
chroot /mnt /bin/busybox sh -c '
dd if=/dev/urandom of=/big bs=1M count=12 2>/dev/null; rm -f /old; echo changed >/etc/motd; sync; sync
echo "T-SUM $(md5sum /big | cut -c1-32)"; [ "$(cat /etc/motd)" = changed ] && echo "T-WRITE ok"'
umount /mnt/proc /mnt/dev; umount /mnt; sync

# What is typed comes back; a long line without loss; Ctrl-A by typing it twice.
stty -echo
echo "CONSOLE-READY"
read -r line; echo "GOT-SHORT <$line>"
read -r line; echo "GOT-LONG ${#line} $(echo "$line" | md5sum | cut -d' ' -f1)"
read -r line; echo "GOT-HEX $(echo -n "$line" | od -An -tx1 | tr -d ' ')"
echo "CONSOLE-QUIT"
sleep 100

dmesg | grep -i "acpi.*error\|firmware bug"; true

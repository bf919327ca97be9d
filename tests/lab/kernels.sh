#!/bin/bash
# kernels.sh: the stock Debian cloud kernel, unpacked into $LAB_CACHE/cloud (vmlinuz, vmlinux, modules/, KVER). Nothing is installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/minivmm-lab}/cloud
[ ! -f "$cache/KVER" ] || exit 0
mkdir -p "$cache"
cd "$cache"
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
[ -n "$package" ] || { echo "kernels.sh: apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
ls "${package}"_*.deb >/dev/null 2>&1 || apt-get download "$package" 2>/dev/null
rm -rf unpacked modules
mkdir unpacked modules
dpkg-deb -x "${package}"_*.deb unpacked
version=${package#linux-image-}
version=${version%-unsigned}
mv "unpacked/boot/vmlinuz-$version" vmlinuz
mkdir -p modules/lib
[ -d unpacked/usr/lib/modules ] && mv unpacked/usr/lib/modules modules/lib/ || mv unpacked/lib/modules modules/lib/
rm -rf unpacked
depmod -b modules "$version"
python3 "$here/extract-vmlinux.py" vmlinuz vmlinux
echo "$version" >KVER

//! A network namespace for a test, and the host's end of an interface in it.

use std::io;
use std::net::Ipv4Addr;

/// Runs `f` in a network namespace of its own; says so and skips without the right to.
pub fn in_namespace(f: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: a plain system call; it moves this thread only.
        let alone = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        if alone && std::path::Path::new("/dev/net/tun").exists() {
            f();
        } else {
            eprintln!("skipped: needs root and /dev/net/tun (run it with sudo; modprobe tun)");
        }
    })
    .join()
    .unwrap();
}

fn inet(addr: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: a sockaddr_in is a sockaddr of the same size; zero bytes are a value of both.
    unsafe {
        let mut sin: libc::sockaddr_in = std::mem::zeroed();
        sin.sin_family = libc::AF_INET as u16;
        sin.sin_addr.s_addr = u32::from(addr).to_be();
        std::mem::transmute(sin)
    }
}

/// Gives interface `name` an address in a /24 and sets it up; `peer` has the address `mac`.
/// Returns the interface's own hardware address.
pub fn configure(name: &str, addr: Ipv4Addr, peer: Ipv4Addr, mac: [u8; 6]) -> [u8; 6] {
    let ok = |result: i32| assert!(result >= 0, "{name}: {}", io::Error::last_os_error());
    // SAFETY: ioctls on a socket that is closed here, each with the structure that it reads or
    // writes; zero bytes are a value of those.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        ok(socket);
        let mut req: libc::ifreq = std::mem::zeroed();
        for (to, from) in req.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        req.ifr_ifru.ifru_addr = inet(addr);
        ok(libc::ioctl(socket, libc::SIOCSIFADDR, &req));
        req.ifr_ifru.ifru_addr = inet(Ipv4Addr::new(255, 255, 255, 0));
        ok(libc::ioctl(socket, libc::SIOCSIFNETMASK, &req));
        req.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        ok(libc::ioctl(socket, libc::SIOCSIFFLAGS, &req));
        let mut arp: libc::arpreq = std::mem::zeroed();
        arp.arp_pa = inet(peer);
        arp.arp_ha.sa_family = 1; // ARPHRD_ETHER
        for (to, from) in arp.arp_ha.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        arp.arp_flags = 6; // ATF_COM | ATF_PERM
        arp.arp_dev[..16].copy_from_slice(&req.ifr_name);
        ok(libc::ioctl(socket, libc::SIOCSARP, &arp));
        ok(libc::ioctl(socket, libc::SIOCGIFHWADDR, &mut req));
        libc::close(socket);
        std::array::from_fn(|n| req.ifr_ifru.ifru_hwaddr.sa_data[n] as u8)
    }
}

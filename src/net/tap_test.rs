use super::*;
use crate::virtio::testing::kit::{netns::in_namespace, until};
use std::io::ErrorKind;
use std::os::fd::FromRawFd;

const TYPE: u16 = 0x88b5; // for local experiments (IEEE 802)

fn no_fd(_: &str) -> Result<OwnedFd> {
    panic!("no fd was named")
}

fn tap(name: &str) -> TapOptions {
    TapOptions { ifname: Some(name.into()), script: Some("no".into()), ..Default::default() }
}

/// Sets the interface up and returns a packet socket on it that sees frames of [`TYPE`].
fn host_end(name: &str) -> OwnedFd {
    // SAFETY: plain system calls with structures that live in this frame; zero bytes are a value of
    // each; the socket is owned by the result.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0);
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let mut req: libc::ifreq = std::mem::zeroed();
        for (to, from) in req.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        req.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        assert_eq!(libc::ioctl(socket, libc::SIOCSIFFLAGS, &req), 0, "{}", io::Error::last_os_error());
        assert_eq!(libc::ioctl(socket, libc::SIOCGIFINDEX, &mut req), 0);
        let mut addr: libc::sockaddr_ll = std::mem::zeroed();
        addr.sll_family = libc::AF_PACKET as u16;
        addr.sll_protocol = TYPE.to_be();
        addr.sll_ifindex = req.ifr_ifru.ifru_ifindex;
        let len = size_of_val(&addr) as u32;
        assert_eq!(libc::bind(socket, (&raw const addr).cast(), len), 0);
        OwnedFd::from_raw_fd(socket)
    }
}

fn frame(n: u8) -> Vec<u8> {
    let mut f = vec![0u8; 60];
    f[..6].fill(0xff);
    f[6..12].copy_from_slice(&[2, 0, 0, 0, 0, n]);
    f[12..14].copy_from_slice(&TYPE.to_be_bytes());
    f[14..].fill(n);
    f
}

/// The next frame of our type that the tap has, without its header.
fn receive(tap: &Tap) -> Vec<u8> {
    let mut buf = vec![0xaau8; super::super::netdev::MAX_FRAME];
    until(|| match tap.recv(&mut IovMut::from_slice(&mut buf)) {
        Ok(n) => {
            assert_eq!(buf[0], 0, "flags of a whole frame");
            let f = buf[VNET_HDR..n].to_vec();
            (f[12..14] == TYPE.to_be_bytes()).then_some(f)
        }
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::WouldBlock);
            None
        }
    })
}

fn exchange(tap: &Tap) {
    let host = host_end(tap.name());
    tun::write_frame(host.as_fd(), &Iov::from_slice(&frame(1))).unwrap();
    assert_eq!(receive(tap), frame(1));

    let mut sent = vec![0u8; VNET_HDR];
    sent.extend(frame(2));
    until(|| tap.send(&Iov::from_slice(&sent)).ok());
    let mut buf = vec![0u8; 2000];
    let n = until(|| tun::read_frame(host.as_fd(), &mut IovMut::from_slice(&mut buf)).ok());
    assert_eq!(buf[..n], frame(2));
}

#[test]
fn frames_go_both_ways_with_and_without_the_header() {
    in_namespace(|| {
        let with = Tap::open(&tap("mv0"), no_fd).unwrap();
        assert!(with.vnet_hdr && with.offloads().contains(Offload::CSUM | Offload::TSO4));
        assert_eq!(with.info(), "type=tap,ifname=mv0,vnet_hdr=on");
        with.set_offload(Offload::CSUM).unwrap();
        exchange(&with);
        drop(with);
        let without = Tap::open(&TapOptions { vnet_hdr: Some(false), ..tap("mv0") }, no_fd).unwrap();
        assert_eq!(without.offloads(), Offload::NONE);
        exchange(&without);
    });
}

#[test]
fn a_passed_descriptor_is_used_as_it_is() {
    in_namespace(|| {
        let file = OpenOptions::new().read(true).write(true).open(DEVICE).unwrap();
        let name = tun::attach(file.as_fd(), "tap%d", true).unwrap();
        let options = TapOptions { fd: Some("mytap".into()), ..Default::default() };
        let tap = Tap::open(&options, |n| {
            assert_eq!(n, "mytap");
            Ok(file.into())
        })
        .unwrap();
        assert_eq!(tap.name(), name);
        exchange(&tap);
    });
    let options = TapOptions { fd: Some("7".into()), ..Default::default() };
    let null = std::fs::File::open("/dev/null").unwrap();
    let e = Tap::open(&options, |_| Ok(null.into())).err().unwrap();
    assert!(e.desc.starts_with("Unable to query TUNGETIFF on FD 7: "), "{e}");
}

#[test]
fn a_busy_interface_is_named_with_the_remedy() {
    in_namespace(|| {
        let _first = Tap::open(&tap("mv1"), no_fd).unwrap();
        let e = Tap::open(&tap("mv1"), no_fd).err().unwrap().desc;
        assert!(e.starts_with("could not configure /dev/net/tun (mv1): Device or resource busy; "), "{e}");
        let e = Tap::open(&tap("lo"), no_fd).err().unwrap().desc;
        assert!(e.contains("(lo)") && e.contains("Invalid argument; "), "{e}");
    });
}

#[test]
fn without_the_right_the_remedy_is_named() {
    in_namespace(|| {
        // SAFETY: the raw system call changes this thread's uid only (libc's would change all).
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        let e = Tap::open(&tap("mv2"), no_fd).err().unwrap().desc;
        assert!(e.contains("/dev/net/tun") && e.contains("; m"), "{e}");
    });
}

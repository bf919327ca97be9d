//! The card on a real interface: what the host's kernel makes of our headers, and we of its.

use super::*;
use crate::net::tap::{Tap, TapOptions};
use crate::virtio::testing::kit::netns::{configure, in_namespace};
use crate::virtio::testing::{Rig, until};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::time::Duration;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const RX: usize = 0;
const TX: usize = 1;
/// Bytes before what follows IPv4: vnet header, Ethernet, IP.
const L4: usize = 12 + 14 + 20;

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum()
}

fn fold(mut s: u32) -> u16 {
    while s >> 16 != 0 {
        s = (s & 0xffff) + (s >> 16);
    }
    s as u16
}

fn pseudo(from: Ipv4Addr, to: Ipv4Addr, proto: u8, len: usize) -> u32 {
    sum(&from.octets()) + sum(&to.octets()) + u32::from(proto) + len as u32
}

/// A card on a fresh interface, with buffers.
struct Lan {
    rig: Rig,
    host_mac: [u8; 6],
}

impl Lan {
    fn new(without: u64) -> Lan {
        let options = TapOptions { ifname: Some("mv0".into()), ..Default::default() };
        let tap = Arc::new(Tap::open(&options, |_| panic!("no fd was named")).unwrap());
        let net = Net::new(NetConfig::default(), tap).unwrap();
        let host_mac = configure("mv0", HOST, GUEST, default_mac(0));
        let mut rig = Rig::new(net.clone(), net.features() & !without);
        let at = rig.free;
        for n in 0..64 {
            rig.offer(RX, &[(at + 0x1_0000 + n * 4096, 4096, true)]);
        }
        rig.kick(RX);
        Lan { rig, host_mac }
    }

    /// Sends an IPv4 packet to the host whose checksum is left to it; `check` is where in `l4` it
    /// belongs.
    fn send(&mut self, proto: u8, mut l4: Vec<u8>, check: u16) {
        let partial = fold(pseudo(GUEST, HOST, proto, l4.len()));
        l4[usize::from(check)..][..2].copy_from_slice(&partial.to_be_bytes());
        let mut f = vec![1, 0, 0, 0, 0, 0]; // VIRTIO_NET_HDR_F_NEEDS_CSUM
        f.extend(34u16.to_le_bytes());
        f.extend(check.to_le_bytes());
        f.extend([0, 0]);
        f.extend(self.host_mac);
        f.extend(default_mac(0));
        f.extend([8, 0]);
        let mut ip = vec![0x45, 0];
        ip.extend((20 + l4.len() as u16).to_be_bytes());
        ip.extend([0, 1, 0x40, 0, 64, proto, 0, 0]);
        ip.extend(GUEST.octets());
        ip.extend(HOST.octets());
        let c = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&c.to_be_bytes());
        f.extend(ip);
        f.extend(l4);
        let at = self.rig.free;
        self.rig.poke(at, &f);
        self.rig.offer(TX, &[(at, 12, false), (at + 12, f.len() as u32 - 12, false)]);
        self.rig.kick(TX);
        self.rig.answer(TX);
    }

    /// The next IPv4 frame of that protocol, with its header.
    fn receive(&mut self, proto: u8) -> Vec<u8> {
        loop {
            let mut frame = self.buffer();
            for _ in 1..u16::from_le_bytes([frame[10], frame[11]]) {
                frame.extend(self.buffer());
            }
            if frame[24..26] == [8, 0] && frame[35] == proto {
                return frame;
            }
        }
    }

    fn buffer(&mut self) -> Vec<u8> {
        let (head, len) = self.rig.answer(RX);
        let at = self.rig.descriptor(RX, head);
        let bytes = self.rig.peek(at, len as usize);
        self.rig.offer(RX, &[(at, 4096, true)]);
        self.rig.kick(RX);
        bytes
    }
}

#[test]
fn checksums_are_left_to_the_other_end() {
    in_namespace(|| {
        for (without, left) in [(0, true), (F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN, false)]
        {
            let mut lan = Lan::new(without);
            let socket = UdpSocket::bind((HOST, 7000)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let mut udp =
                [7001u16.to_be_bytes(), 7000u16.to_be_bytes(), 13u16.to_be_bytes(), [0; 2]].concat();
            udp.extend(b"hello");
            lan.send(17, udp, 6);
            let mut got = [0; 100];
            let (n, from) = socket.recv_from(&mut got).expect("the packet was not taken");
            assert_eq!((&got[..n], from), (&b"hello"[..], SocketAddrV4::new(GUEST, 7001).into()));

            socket.send_to(b"world", (GUEST, 7001)).unwrap();
            let f = lan.receive(17);
            assert_eq!(f[L4 + 8..], *b"world");
            if left {
                assert_eq!((f[0], &f[6..10]), (1, &[34, 0, 6, 0][..]), "left to us");
            } else {
                assert_eq!(f[0], 0);
                let all = pseudo(HOST, GUEST, 17, 13) + sum(&f[L4..]);
                assert_eq!(fold(all), 0xffff, "a right checksum");
            }
        }
    });
}

/// Connects from the host to the guest and gives the first frame with data.
fn first_data(without: u64) -> Vec<u8> {
    let mut lan = Lan::new(without);
    let client = std::thread::spawn(|| {
        let to = SocketAddrV4::new(GUEST, 80).into();
        let mut c = TcpStream::connect_timeout(&to, Duration::from_secs(10)).unwrap();
        c.write_all(&[0x5a; 14000]).unwrap();
        c
    });
    // The three-way handshake, by hand: their SYN, our SYN and ACK with an MSS of 1460.
    let syn = lan.receive(6);
    let seq = u32::from_be_bytes(syn[L4 + 4..L4 + 8].try_into().unwrap());
    let mut tcp = [&80u16.to_be_bytes()[..], &syn[L4..L4 + 2], &1u32.to_be_bytes()].concat();
    tcp.extend(seq.wrapping_add(1).to_be_bytes());
    tcp.extend([0x60, 0x12, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0x05, 0xb4]);
    lan.send(6, tcp, 16);
    let data = until(|| Some(lan.receive(6)).filter(|f| f.len() > L4 + 24));
    drop(client.join().unwrap());
    assert!(data[L4 + 20..].iter().all(|b| *b == 0x5a));
    data
}

#[test]
fn segmentation_is_left_to_the_driver_that_can() {
    in_namespace(|| {
        let segments = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;
        let data = first_data(segments);
        assert!(data.len() <= 12 + 1514);
        assert_eq!(data[1], 0);
        // On a busy machine the host's kernel may think the line slow and send segment by segment.
        let whole = (0..10).map(|_| first_data(0)).find(|f| f[1] != 0).expect("never more than a segment");
        assert!(whole.len() > 12 + 1514, "several segments in one");
        assert_eq!((whole[1], &whole[4..6]), (1, &1460u16.to_le_bytes()[..]), "TCPv4, MSS");
        assert_eq!(whole[0], 1, "and the checksum");
    });
}

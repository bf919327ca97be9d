use super::*;
use crate::net::netdev::{MAX_FRAME, VNET_HDR};
use crate::virtio::testing::kit::wire::Wire;
use crate::virtio::testing::{LOW, Rig, until};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

const RX: usize = 0;
const TX: usize = 1;

const EVERYTHING: Offload = Offload(Offload::CSUM.0 | Offload::TSO4.0 | Offload::TSO6.0 | Offload::TSO_ECN.0);

fn card(config: NetConfig, can: Offload) -> (Arc<Net>, Arc<Wire>, UnixDatagram) {
    let (wire, theirs) = Wire::new(can);
    (Net::new(config, wire.clone()).unwrap(), wire, theirs)
}

/// A card whose driver took everything but `without`.
fn rig(without: u64) -> (Rig, Arc<Net>, Arc<Wire>, UnixDatagram) {
    let (net, wire, far) = card(NetConfig::default(), EVERYTHING);
    (Rig::new(net.clone(), net.features() & !without), net, wire, far)
}

/// Makes `socket` full after a few small frames.
fn narrow(socket: &UnixDatagram) {
    let bytes: libc::c_int = 0; // the kernel takes its minimum, about 4 KiB
    // SAFETY: SO_SNDBUF reads one int.
    let result = unsafe {
        let (option, len) = (libc::SO_SNDBUF, size_of_val(&bytes) as u32);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const bytes).cast(), len)
    };
    assert_eq!(result, 0);
}

/// A frame with its header.
fn frame(n: u8, len: usize) -> Vec<u8> {
    let mut f = vec![0; VNET_HDR];
    f.extend((0..len).map(|i| (i as u8).wrapping_mul(31) ^ n));
    f
}

/// Gives the card a buffer.
fn give(rig: &mut Rig, at: u64, len: u32) -> u16 {
    rig.offer(RX, &[(at, len, true)])
}

fn from_guest(far: &UnixDatagram) -> Vec<u8> {
    let mut buf = vec![0; MAX_FRAME];
    let n = far.recv(&mut buf).expect("no frame came");
    buf.truncate(n);
    buf
}

#[test]
fn addresses_are_read_as_written() {
    assert_eq!(parse_mac("52:54:00:ab:CD:1"), Some([0x52, 0x54, 0, 0xab, 0xcd, 1]));
    assert_eq!(parse_mac("52-54-00-12-34-56"), Some(default_mac(0)));
    for bad in
        ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:g6", "52:54:00:12:34:+6", ":::::"]
    {
        assert_eq!(parse_mac(bad), None, "{bad}");
    }
    assert!(NetConfig { mac: [1; 6], ..Default::default() }.check().unwrap_err().desc.contains("mac"));
    assert!(NetConfig { rx_queue_size: 100, ..Default::default() }.check().is_err());
    assert!(NetConfig { host_mtu: 20, ..Default::default() }.check().is_err());
}

#[test]
fn what_is_offered_is_what_the_backend_can() {
    let (net, ..) = card(NetConfig::default(), Offload::NONE);
    assert_eq!(net.features(), F_MAC | F_STATUS | F_MRG_RXBUF);
    let (net, ..) = card(NetConfig { host_mtu: 9000, mrg_rxbuf: false, ..Default::default() }, Offload::CSUM);
    assert_eq!(net.features(), F_MAC | F_STATUS | F_MTU | F_CSUM | F_GUEST_CSUM);
    let mut bytes = [0; 14];
    net.read_config(0, &mut bytes);
    assert_eq!(bytes, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 1, 0, 0x28, 0x23, 0, 0]);
    net.read_config(u64::MAX, &mut bytes);
    let (net, ..) = card(NetConfig { gso: false, ..Default::default() }, EVERYTHING);
    assert_eq!(net.features() & (F_HOST_TSO4 | F_GUEST_TSO6 | F_CSUM), F_CSUM);
    let (net, ..) = card(NetConfig { csum: false, ..Default::default() }, EVERYTHING);
    assert_eq!(net.features(), F_MAC | F_STATUS | F_MRG_RXBUF);
}

#[test]
fn the_backend_hears_what_the_driver_took() {
    let cases = [
        (0, EVERYTHING),
        (F_GUEST_CSUM, Offload::NONE), // segmentation without checksums cannot be
        (F_GUEST_TSO4 | F_GUEST_TSO6, Offload::CSUM),
        (F_GUEST_TSO6 | F_GUEST_ECN, Offload::CSUM | Offload::TSO4),
        (F_CSUM | F_HOST_TSO4, EVERYTHING), // the other direction
    ];
    for (without, expected) in cases {
        let (mut rig, _, wire, _far) = rig(without);
        assert_eq!(std::mem::take(&mut *wire.set.lock().unwrap()), [expected]);
        rig.reset();
        assert_eq!(*wire.set.lock().unwrap(), [Offload::NONE]);
    }
}

#[test]
fn a_frame_comes_in_with_its_header() {
    for (without, flags) in [(0, 2), (F_GUEST_CSUM, 0)] {
        let (mut rig, _, _, far) = rig(without);
        let at = rig.free;
        rig.poke(at, &[0xee; 2000]);
        let head = rig.offer(RX, &[(at, 5, true), (at + 5, 95, true), (at + 100, 1500, true)]);
        rig.kick(RX);
        let mut f = frame(1, 1000);
        f[0] = 2;
        f[10..12].fill(0xaa);
        far.send(&f).unwrap();
        assert_eq!(rig.answer(RX), (head, 1012));
        let got = rig.peek(at, 1013);
        assert_eq!((got[0], &got[1..10]), (flags, &f[1..10]));
        assert_eq!(got[10..12], [1, 0], "one buffer");
        assert_eq!(got[12..1012], f[12..]);
        assert_eq!(got[1012], 0xee, "no more than the frame is written");
    }
}

#[test]
fn a_long_frame_is_spread_over_buffers_that_appear_at_once() {
    let (mut rig, _, _, far) = rig(0);
    let at = rig.free;
    let f = frame(3, 5000);
    far.send(&f).unwrap();
    let mut heads = vec![];
    // Three buffers are not enough: nothing may appear, nothing is lost.
    for n in 0..3 {
        heads.push(give(&mut rig, at + n * 2048, 1500));
    }
    rig.kick(RX);
    rig.no_answer(RX);
    heads.push(give(&mut rig, at + 3 * 2048, 1500));
    give(&mut rig, at + 4 * 2048, 1500);
    rig.kick(RX);
    let mut got = vec![];
    for (n, head) in heads.iter().enumerate() {
        let (h, len) = rig.answer(RX);
        assert_eq!((h, len), (*head, [1500, 1500, 1500, 512][n]));
        got.extend(rig.peek(at + n as u64 * 2048, len as usize));
    }
    assert_eq!(got[10..12], [4, 0]);
    assert_eq!(got[12..], f[12..]);
    rig.no_answer(RX);
}

#[test]
fn the_longest_frame_fits() {
    let (mut rig, _, _, far) = rig(0);
    let at = rig.free;
    give(&mut rig, at, 100 << 10);
    rig.kick(RX);
    let f = frame(9, 65535 + 18);
    far.send(&f).unwrap();
    assert_eq!(rig.answer(RX).1 as usize, f.len());
    assert_eq!(rig.peek(at + 12, f.len() - 12), f[12..]);
}

#[test]
fn without_buffers_the_backend_is_not_read() {
    let (mut rig, _, _, far) = rig(0);
    far.set_nonblocking(true).unwrap();
    narrow(&far);
    let mut sent = 0u8;
    std::thread::sleep(Duration::from_millis(20));
    while far.send(&frame(sent, 60)).is_ok() {
        sent += 1;
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(far.send(&frame(sent, 60)).is_err(), "somebody read on without having room");
    assert!(sent > 2);
    let at = rig.free;
    for n in 0..sent {
        // One at a time, so that running dry is tried again and again.
        give(&mut rig, at, 200);
        rig.kick(RX);
        assert_eq!(rig.answer(RX).1, 72);
        assert_eq!(rig.peek(at + 12, 60), frame(n, 60)[12..], "frame {n}");
    }
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_dropped() {
    let (mut rig, _, _, far) = rig(F_MRG_RXBUF);
    let at = rig.free;
    give(&mut rig, at, 500);
    give(&mut rig, at + 1000, 500);
    rig.kick(RX);
    far.send(&frame(1, 600)).unwrap();
    far.send(&frame(2, 400)).unwrap();
    assert_eq!(rig.answer(RX).1, 412);
    assert_eq!(rig.peek(at + 10, 402), [&[1, 0], &frame(2, 400)[12..]].concat());
    rig.no_answer(RX);
}

#[test]
fn with_merging_a_frame_longer_than_the_whole_ring_is_dropped() {
    let config = NetConfig { rx_queue_size: 64, ..Default::default() };
    let (net, _, far) = card(config, EVERYTHING);
    let mut rig = Rig::new(net.clone(), net.features());
    let at = rig.free;
    (0..64).for_each(|_| _ = give(&mut rig, at, 20));
    rig.kick(RX);
    far.send(&frame(1, 2000)).unwrap();
    far.send(&frame(2, 20)).unwrap();
    assert_eq!((rig.answer(RX).1, rig.answer(RX).1), (20, 12));
    rig.no_answer(RX);
}

#[test]
fn frames_go_out_in_order_and_none_is_lost_when_the_backend_is_full() {
    let (mut rig, _, wire, far) = rig(0);
    narrow(&wire.socket);
    let at = rig.free;
    for n in 0..200u64 {
        let f = frame(n as u8, 100);
        rig.poke(at + n * 256, &f);
        // In pieces on every third.
        match n % 3 {
            0 => rig.offer(TX, &[(at + n * 256, 10, false), (at + n * 256 + 10, 102, false)]),
            _ => rig.offer(TX, &[(at + n * 256, 112, false)]),
        };
        if rig.rings[TX].room() < 2 {
            break;
        }
    }
    rig.kick(TX);
    let total = rig.rings[TX].avail_idx();
    assert!(total > 150, "{total}");
    // Nobody reads: the socket holds a few, the rest waits in the ring.
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.rings[TX].used_idx() < 100);
    for n in 0..total {
        assert_eq!(from_guest(&far), frame(n as u8, 100), "frame {n}");
    }
    until(|| (rig.rings[TX].used_idx() == total).then_some(()));
}

#[test]
fn one_kick_sends_more_than_a_burst() {
    let (mut rig, _, _, far) = rig(0);
    let at = rig.free;
    rig.poke(at, &frame(1, 50));
    (0..200).for_each(|_| _ = rig.offer(TX, &[(at, 62, false)]));
    rig.kick(TX);
    (0..200).for_each(|_| _ = from_guest(&far));
    (0..200).for_each(|_| _ = rig.answer(TX));
}

#[test]
fn both_directions_go_on_while_the_other_is_busy() {
    let (mut rig, _, _, far) = rig(0);
    let at = rig.free;
    let (rx_at, frames) = (at + (1 << 20), 2000u32);
    for n in 0..64 {
        give(&mut rig, rx_at + n * 2048, 2048);
    }
    rig.kick(RX);
    rig.poke(at, &frame(7, 800));
    let far2 = far.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        (0..frames).for_each(|_| assert_eq!(from_guest(&far2), frame(7, 800)));
    });
    let writer = std::thread::spawn(move || {
        (0..frames).for_each(|_| _ = far.send(&frame(8, 700)).expect("the card reads"));
    });
    let (mut received, mut sent) = (0, 0);
    until(|| {
        while sent < frames && rig.rings[TX].room() > 0 {
            rig.offer(TX, &[(at, 812, false)]);
            sent += 1;
        }
        rig.kick(TX);
        while rig.rings[TX].answer().is_some() {}
        while let Some((_, len)) = rig.rings[RX].answer() {
            assert_eq!(len, 712);
            received += 1;
            give(&mut rig, rx_at, 2048);
        }
        rig.kick(RX);
        (received == frames && sent == frames).then_some(())
    });
    reader.join().unwrap();
    writer.join().unwrap();
}

#[test]
fn bad_chains_break_the_device() {
    type Cut = fn(u64) -> Vec<(u64, u32, bool)>;
    let cases: [(usize, Cut, &str); 5] = [
        (TX, |at| vec![(at, 11, false)], "header"),
        (TX, |at| vec![(at, 100, true)], "header"),
        (TX, |at| vec![(at, 0, false), (at, 0, false)], "header"),
        (RX, |at| vec![(at, 11, true)], "header"),
        (RX, |at| vec![(at, 2000, false)], "header"),
    ];
    for (q, cut, why) in cases {
        let (mut rig, _, _, far) = rig(0);
        let cut = cut(rig.free);
        rig.offer(q, &cut);
        rig.kick(q);
        far.send(&frame(1, 60)).unwrap();
        assert!(rig.broken().contains(why), "{why}");
        rig.no_answer(q);
        rig.reset();
        rig.start();
        let at = rig.free;
        rig.poke(at, &frame(4, 60));
        rig.offer(TX, &[(at, 72, false)]);
        rig.kick(TX);
        assert_eq!(from_guest(&far), frame(4, 60));
    }
}

#[test]
fn a_frame_longer_than_any_network_takes_is_lost_but_answered() {
    let (mut rig, _, wire, far) = rig(0);
    let at = rig.free;
    let huge: Vec<_> = std::iter::repeat_n((0, LOW as u32, false), 200).collect();
    let first = rig.offer(TX, &huge);
    rig.poke(at, &frame(1, 60));
    let second = rig.offer(TX, &[(at, 72, false)]);
    rig.kick(TX);
    assert_eq!((rig.answer(TX), rig.answer(TX)), ((first, 0), (second, 0)));
    assert_eq!(from_guest(&far), frame(1, 60), "only the second");
    assert_eq!(wire.sends.load(Ordering::SeqCst), 1, "the kernel was not even asked");
}

#[test]
fn a_pulled_cable_loses_frames_and_the_driver_is_told() {
    let (mut rig, net, _, far) = rig(0);
    let at = rig.free;
    net.set_link(false);
    net.set_link(false);
    assert_eq!(rig.told.config_changes.load(Ordering::SeqCst), 1);
    let mut status = [9; 2];
    net.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    give(&mut rig, at, 2000);
    rig.kick(RX);
    far.send(&frame(1, 60)).unwrap();
    rig.poke(at + 4000, &frame(2, 60));
    rig.offer(TX, &[(at + 4000, 72, false)]);
    rig.kick(TX);
    rig.answer(TX);
    rig.no_answer(RX);
    net.set_link(true);
    far.send(&frame(3, 60)).unwrap();
    rig.answer(RX);
    assert_eq!(rig.peek(at + 12, 60), frame(3, 60)[12..]);
    far.set_nonblocking(true).unwrap();
    assert!(far.recv(&mut [0; 10]).is_err(), "what was sent without a cable is lost");
}

#[test]
fn paused_it_neither_sends_nor_receives() {
    let (mut rig, _, _, far) = rig(0);
    let at = rig.free;
    give(&mut rig, at, 2000);
    rig.kick(RX);
    rig.pause();
    far.send(&frame(1, 60)).unwrap();
    rig.poke(at + 4000, &frame(2, 60));
    rig.offer(TX, &[(at + 4000, 72, false)]);
    rig.kick(TX);
    rig.no_answer(RX);
    rig.no_answer(TX);
    rig.resume();
    rig.answer(RX);
    rig.answer(TX);
    assert_eq!(from_guest(&far), frame(2, 60));
}

#[test]
fn a_backend_that_goes_away_does_not_stop_the_card() {
    let (mut rig, _, wire, far) = rig(0);
    let at = rig.free;
    give(&mut rig, at, 2000);
    rig.kick(RX);
    drop(far);
    wire.socket.shutdown(std::net::Shutdown::Both).unwrap();
    rig.poke(at + 4000, &frame(2, 60));
    for _ in 0..3 {
        rig.offer(TX, &[(at + 4000, 72, false)]);
        rig.kick(TX);
        rig.answer(TX);
    }
    rig.no_answer(RX);
    rig.reset();
}

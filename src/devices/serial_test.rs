use super::*;
use crate::chardev::testing::pair;
use crate::devices::testing::{Wires, hammer, inb, outb};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

fn new() -> (Arc<Serial>, Arc<Wires>, UnixStream) {
    let wires = Arc::new(Wires::default());
    let (chardev, host) = pair();
    (Serial::new(wires.line(4), chardev), wires, host)
}

/// Waits until `done`, for at most ten seconds.
fn wait(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "no {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn power_on_state() {
    let (s, wires, _host) = new();
    let all: Vec<u8> = (0..8).map(|r| inb(&*s, r)).collect();
    assert_eq!(all, [0, 0, IIR_NONE, 0, 0, 0x60, 0xb0, 0]);
    assert!(wires.take().is_empty());
}

#[test]
fn writes_go_out() {
    let (s, _, mut host) = new();
    for byte in b"hello" {
        assert_eq!(inb(&*s, LSR) & LSR_THRE, LSR_THRE);
        outb(&*s, DATA, *byte);
    }
    let mut got = [0; 5];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

#[test]
fn the_divisor_hides_behind_dlab() {
    let (s, _, _host) = new();
    outb(&*s, LCR, LCR_DLAB | 3);
    outb(&*s, DATA, 0x34);
    outb(&*s, IER, 0x12);
    assert_eq!((inb(&*s, DATA), inb(&*s, IER)), (0x34, 0x12));
    outb(&*s, LCR, 3);
    assert_eq!((inb(&*s, IER), inb(&*s, LCR)), (0, 3));
    // A 16-bit access is one of each register.
    outb(&*s, LCR, LCR_DLAB);
    let mut wide = [0; 2];
    s.read(DATA, &mut wide);
    assert_eq!(wide, [0x34, 0x12]);
}

#[test]
fn the_transmit_interrupt() {
    let (s, wires, _host) = new();
    outb(&*s, IER, IER_THRE);
    assert_eq!(wires.take(), [true], "enabling it while empty interrupts");
    assert_eq!(inb(&*s, IIR_FCR), IIR_THRE);
    assert_eq!(wires.take(), [false], "reading IIR clears it");
    assert_eq!(inb(&*s, IIR_FCR), IIR_NONE);
    outb(&*s, DATA, b'x');
    assert_eq!(wires.take(), [true], "sent, so empty again");
    outb(&*s, IER, 0);
    assert_eq!(wires.take(), [false]);
    outb(&*s, IER, IER_THRE);
    assert_eq!(inb(&*s, IIR_FCR), IIR_THRE);
}

#[test]
fn received_bytes_interrupt_and_come_out_in_order() {
    let (s, wires, mut host) = new();
    outb(&*s, IIR_FCR, 0xc1);
    outb(&*s, IER, IER_RX);
    host.write_all(b"ab").unwrap();
    wait("input", || s.lock().rx.len() == 2);
    assert_eq!(wires.take(), [true]);
    assert_eq!(inb(&*s, IIR_FCR), IIR_FIFOS | IIR_TIMEOUT, "below the trigger level");
    assert_eq!(inb(&*s, LSR) & LSR_READY, LSR_READY);
    assert_eq!((inb(&*s, DATA), inb(&*s, DATA)), (b'a', b'b'));
    assert_eq!(inb(&*s, LSR) & LSR_READY, 0);
    assert_eq!(wires.take(), [false]);
}

#[test]
fn more_than_a_fifo_waits_for_the_guest() {
    let (s, _, mut host) = new();
    outb(&*s, IIR_FCR, 0x81);
    outb(&*s, IER, IER_RX);
    let text: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
    let sender = std::thread::spawn({
        let text = text.clone();
        move || {
            host.write_all(&text).unwrap();
            host
        }
    });
    wait("full FIFO", || s.lock().rx.len() == FIFO);
    assert_eq!(inb(&*s, IIR_FCR), IIR_FIFOS | IIR_RX);
    let mut got: Vec<u8> = Vec::new();
    wait("all", || inb(&*s, LSR) & LSR_READY != 0 || sender.is_finished());
    let start = Instant::now();
    while got.len() < text.len() && start.elapsed() < Duration::from_secs(10) {
        let lsr = inb(&*s, LSR);
        assert_eq!(lsr & LSR_OVERRUN, 0);
        if lsr & LSR_READY != 0 {
            got.push(inb(&*s, DATA));
        }
    }
    assert!(got == text);
    drop(sender.join());
}

#[test]
fn a_reader_that_stops_makes_the_transmitter_busy() {
    let (s, wires, mut host) = new();
    outb(&*s, IIR_FCR, 1);
    let mut sent = 0u64;
    let start = Instant::now();
    // A polite guest: it writes only when THRE is set.
    loop {
        if inb(&*s, LSR) & LSR_THRE != 0 {
            outb(&*s, DATA, (sent % 251) as u8);
            sent += 1;
        } else if sent > 64 << 10 {
            std::thread::sleep(Duration::from_millis(50));
            if inb(&*s, LSR) & LSR_THRE == 0 {
                break;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(60), "never busy");
    }
    outb(&*s, IER, IER_THRE);
    assert!(wires.take().is_empty());
    let mut got = vec![0; usize::try_from(sent).unwrap()];
    host.read_exact(&mut got).unwrap();
    assert!(got.iter().enumerate().all(|(n, &b)| b == (n % 251) as u8), "bytes lost");
    wait("transmit interrupt", || s.lock().high);
    assert_eq!(inb(&*s, LSR) & LSR_THRE, LSR_THRE);
}

#[test]
fn loopback_stays_inside() {
    let (s, _, mut host) = new();
    outb(&*s, MCR, MCR_LOOP);
    assert_eq!(inb(&*s, MSR) & 0xf0, 0);
    outb(&*s, DATA, 0xae);
    assert_eq!(inb(&*s, LSR) & LSR_READY, LSR_READY);
    assert_eq!(inb(&*s, DATA), 0xae);
    // The usual test of drivers: RTS and OUT2 come back as CTS and DCD.
    outb(&*s, MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);
    assert_eq!(inb(&*s, MSR) & 0xf0, MSR_CTS | MSR_DCD);
    assert_eq!(inb(&*s, MSR) & MSR_DELTAS, 0, "reading clears the changes");
    // Without FIFO the second byte overruns the first.
    outb(&*s, DATA, 1);
    outb(&*s, DATA, 2);
    assert_eq!(inb(&*s, LSR) & LSR_OVERRUN, LSR_OVERRUN);
    assert_eq!(inb(&*s, LSR) & LSR_OVERRUN, 0);
    assert_eq!(inb(&*s, DATA), 2);
    outb(&*s, MCR, 0);
    outb(&*s, DATA, b'.');
    let mut got = [0];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b".");
}

#[test]
fn interrupts_come_in_order_of_priority() {
    let (s, _, _host) = new();
    outb(&*s, IIR_FCR, 1);
    outb(&*s, MCR, MCR_LOOP);
    outb(&*s, IER, 0xf);
    (0..17).for_each(|n| {
        outb(&*s, DATA, n);
    });
    outb(&*s, MCR, MCR_LOOP | MCR_RTS);
    assert_eq!(inb(&*s, IIR_FCR) & 0xf, IIR_LINE);
    inb(&*s, LSR);
    assert_eq!(inb(&*s, IIR_FCR) & 0xf, IIR_RX);
    (0..16).for_each(|_| {
        inb(&*s, DATA);
    });
    assert_eq!(inb(&*s, IIR_FCR) & 0xf, IIR_THRE);
    assert_eq!(inb(&*s, IIR_FCR) & 0xf, IIR_MODEM);
    inb(&*s, MSR);
    assert_eq!(inb(&*s, IIR_FCR) & 0xf, IIR_NONE);
}

#[test]
fn reset_keeps_input_that_the_guest_has_not_seen_coming() {
    let (s, wires, mut host) = new();
    outb(&*s, IER, IER_RX);
    host.write_all(b"abc").unwrap();
    wait("input", || inb(&*s, LSR) & LSR_READY != 0);
    s.reset();
    assert_eq!(wires.take(), [true, false]);
    wait("the next byte", || inb(&*s, LSR) & LSR_READY != 0);
}

#[test]
fn nothing_a_guest_does_panics() {
    let (s, _, mut host) = new();
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while host.read(&mut buf).is_ok_and(|n| n > 0) {
            let _ = host.write(&buf[..100]);
        }
    });
    hammer(&*s, LEN, 200_000, |effect| assert!(matches!(effect, Effect::None)));
}

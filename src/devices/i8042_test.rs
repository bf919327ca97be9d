use super::*;
use crate::devices::testing::{Wires, hammer, inb, outb};
use std::sync::Arc;

fn new() -> (I8042, Arc<Wires>) {
    let wires = Arc::new(Wires::default());
    (I8042::new(wires.line(IRQ)), wires)
}

fn resets(effect: Effect) -> bool {
    matches!(effect, Effect::Post(Event::Reset))
}

#[test]
fn every_way_to_reset() {
    let (kbc, _) = new();
    assert!(resets(outb(&kbc, COMMAND, 0xfe)));
    assert!(resets(outb(&kbc, COMMAND, 0xf0)));
    assert!(!resets(outb(&kbc, COMMAND, 0xff)));
    assert!(!resets(outb(&kbc, COMMAND, 0xd1)));
    assert!(resets(outb(&kbc, DATA, 0xfe)));
    assert!(!resets(outb(&kbc, COMMAND, 0xd1)));
    assert!(!resets(outb(&kbc, DATA, 0xdf)));
    // 0xfe as data is no command.
    assert!(!resets(outb(&kbc, DATA, 0xfe)));
}

#[test]
fn a_probe_gets_its_answers() {
    let (kbc, _) = new();
    let ask = |command| {
        outb(&kbc, COMMAND, command);
        assert_eq!(inb(&kbc, COMMAND) & OUTPUT_FULL, OUTPUT_FULL, "command {command:#x}");
        let byte = inb(&kbc, DATA);
        assert_eq!(inb(&kbc, COMMAND) & OUTPUT_FULL, 0);
        byte
    };
    assert_eq!(ask(0xaa), 0x55);
    assert_eq!(ask(0xab), 0);
    outb(&kbc, COMMAND, 0x60);
    outb(&kbc, DATA, 0x47);
    assert_eq!(ask(0x20), 0x47);
    assert_eq!(inb(&kbc, COMMAND) & 2, 0, "always ready for input");
}

#[test]
fn an_empty_socket_times_out_and_interrupts_once() {
    let (kbc, wires) = new();
    outb(&kbc, COMMAND, 0x60);
    outb(&kbc, DATA, INTERRUPT);
    assert!(wires.take().is_empty());
    outb(&kbc, DATA, 0xf2);
    assert_eq!(inb(&kbc, COMMAND) & (OUTPUT_FULL | TIMEOUT), OUTPUT_FULL | TIMEOUT);
    assert_eq!(wires.take(), [true]);
    assert_eq!(inb(&kbc, DATA), RESEND);
    assert_eq!(wires.take(), [false]);
}

#[test]
fn port_b_lets_waiting_programs_go_on() {
    let (kbc, _) = new();
    let (a, b) = (inb(&kbc, PORT_B), inb(&kbc, PORT_B));
    assert_eq!((a ^ b) & 0x10, 0x10, "refresh toggles");
    assert_eq!(a & 0xe0, 0x20, "timer 2 is out, no NMI");
}

#[test]
fn nothing_a_guest_does_panics() {
    let (kbc, wires) = new();
    hammer(&kbc, LEN, 100_000, |_| ());
    kbc.reset();
    assert!(!wires.take().pop().unwrap_or(false), "reset leaves the line high");
    assert_eq!(inb(&kbc, COMMAND) & OUTPUT_FULL, 0);
}

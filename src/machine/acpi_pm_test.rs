use super::super::irq::{Interrupts, Msi};
use super::*;
use std::sync::Arc;

#[derive(Default)]
struct Edges(Mutex<(bool, u32)>);

impl Interrupts for Edges {
    fn set_line(&self, gsi: u32, high: bool) {
        assert_eq!(gsi, 9);
        let mut s = self.0.lock().unwrap();
        if high && !s.0 {
            s.1 += 1;
        }
        s.0 = high;
    }
    fn send_msi(&self, _: Msi) {
        panic!("no message");
    }
}

fn events(pm: &AcpiPm) -> u32 {
    let mut b = [0; 4];
    pm.read(4, &mut b);
    u32::from_le_bytes(b)
}

#[test]
fn every_event_makes_an_edge_and_is_fetched_once() {
    let edges = Arc::new(Edges::default());
    let pm = AcpiPm::new(Line::new(edges.clone(), 9));
    pm.raise(EVENT_POWER_BUTTON);
    pm.raise(EVENT_POWER_BUTTON);
    assert_eq!(edges.0.lock().unwrap().1, 2, "a second press before the fetch is an edge of its own");
    assert_eq!((events(&pm), events(&pm)), (1, 0));
    assert!(!edges.0.lock().unwrap().0);
    pm.raise(2);
    pm.reset();
    assert_eq!(events(&pm), 0);
}

#[test]
fn only_s5_and_the_reset_value_do_something() {
    let pm = AcpiPm::new(Line::new(Arc::new(Edges::default()), 9));
    let mut effects = Vec::new();
    for off in 0..16u64 {
        for value in 0..=255u8 {
            if let Effect::Post(e) = pm.write(off, &[value]) {
                effects.push((off, value, e));
            }
            assert!(matches!(pm.write(off, &[value, 0]), Effect::None));
            assert!(matches!(pm.write(off, &[value, 0, 0, 0]), Effect::None));
        }
    }
    assert!(effects.iter().all(|(off, v, e)| match off {
        0 => v & 0x3c == 0x34 && *e == Event::Shutdown,
        2 => *v == 1 && *e == Event::Reset,
        _ => false,
    }));
    // SLP_TYP and SLP_EN fixed, four bits free; and the one reset value.
    assert_eq!(effects.len(), 16 + 1);
}

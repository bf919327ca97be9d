use super::*;
use crate::machine::irq::{Interrupts, Msi};

#[derive(Default)]
struct Lines(Mutex<Vec<(u32, bool)>>);

impl Interrupts for Lines {
    fn set_line(&self, gsi: u32, high: bool) {
        self.0.lock().unwrap().push((gsi, high));
    }
    fn send_msi(&self, _: Msi) {}
}

#[test]
fn a_shared_line_is_high_while_one_pin_is() {
    let lines = Arc::new(Lines::default());
    let shared = Arc::new(SharedLine::new(Line::new(lines.clone(), 17)));
    let (a, b) = (Pin::new(shared.clone(), 1), Pin::new(shared.clone(), 5));
    let take = || std::mem::take(&mut *lines.0.lock().unwrap());
    a.set(true);
    assert_eq!(take(), [(17, true)]);
    b.set(true);
    b.set(true);
    a.set(false);
    assert_eq!(take(), []);
    b.set_off(true);
    assert_eq!(take(), [(17, false)]);
    b.set(false);
    b.set_off(false);
    assert_eq!(take(), []);
}

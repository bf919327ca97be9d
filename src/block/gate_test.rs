use super::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

#[test]
fn nobody_is_inside_while_it_is_closed() {
    let gate = Gate::default();
    let inside = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let ticket = gate.enter();
                    inside.fetch_add(1, Ordering::SeqCst);
                    std::hint::spin_loop();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(ticket);
                }
            });
        }
        for _ in 0..200 {
            gate.close();
            gate.wait_empty();
            for _ in 0..50 {
                assert_eq!(inside.load(Ordering::SeqCst), 0);
            }
            gate.open();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn closing_twice_needs_opening_twice() {
    let gate = Gate::default();
    let through = AtomicBool::new(false);
    std::thread::scope(|s| {
        gate.close();
        gate.close();
        s.spawn(|| {
            let _ticket = gate.enter();
            through.store(true, Ordering::SeqCst);
        });
        gate.open();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!through.load(Ordering::SeqCst));
        gate.open();
    });
    assert!(through.load(Ordering::SeqCst));
}

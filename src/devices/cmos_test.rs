use super::*;
use crate::devices::testing::{Wires, hammer, inb, outb};
use std::sync::atomic::{AtomicI64, Ordering};

/// A clock in milliseconds that the test moves.
fn at(start_ms: i64) -> (Arc<Cmos>, Arc<AtomicI64>) {
    let now = Arc::new(AtomicI64::new(start_ms));
    let clock = now.clone();
    (with_clock(move || i128::from(clock.load(Ordering::Relaxed)) * 1_000_000), now)
}

fn with_clock(clock: impl Fn() -> i128 + Send + Sync + 'static) -> Arc<Cmos> {
    Cmos::with_clock(Arc::new(Wires::default()).line(IRQ), Box::new(clock))
}

fn get(cmos: &Cmos, index: u8) -> u8 {
    outb(cmos, 0, index);
    inb(cmos, 1)
}

fn put(cmos: &Cmos, index: u8, value: u8) -> Option<i64> {
    outb(cmos, 0, index);
    match outb(cmos, 1, value) {
        Effect::Post(Event::RtcChange { offset }) => Some(offset),
        Effect::None => None,
        _ => panic!("another effect"),
    }
}

fn time(cmos: &Cmos) -> [u8; 8] {
    [CENTURY, 9, 8, 7, 4, 2, 0, 6].map(|index| get(cmos, index))
}

/// 2026-11-23 14:05:09 UTC, a Monday.
const MONDAY: i64 = 1_795_442_709;

#[test]
fn shows_the_time_of_day() {
    let (cmos, now) = at(MONDAY * 1000);
    assert_eq!(time(&cmos), [0x20, 0x26, 0x11, 0x23, 0x14, 0x05, 0x09, 2]);
    now.fetch_add(1000 * 86_400 + 51_000, Ordering::Relaxed);
    assert_eq!(time(&cmos), [0x20, 0x26, 0x11, 0x24, 0x14, 0x06, 0x00, 3]);
    // Binary, 12 hours.
    assert_eq!(put(&cmos, 11, BINARY), None);
    assert_eq!(time(&cmos), [20, 26, 11, 24, 0x80 | 2, 6, 0, 3]);
}

#[test]
fn midnight_and_noon_on_a_12_hour_clock() {
    for (hour, expected) in [(0, 12), (1, 1), (11, 11), (12, 0x8c), (13, 0x81), (23, 0x8b)] {
        let (cmos, _) = at(hour * 3_600_000);
        put(&cmos, 11, BINARY);
        assert_eq!(get(&cmos, 4), expected, "hour {hour}");
        // What is shown, set again, is no change.
        assert_eq!(put(&cmos, 4, expected), Some(0), "hour {hour}");
    }
}

#[test]
fn uip_comes_just_before_the_update_and_goes() {
    let (cmos, now) = at(MONDAY * 1000);
    assert_eq!(get(&cmos, 10), A_DEFAULT);
    now.fetch_add(999, Ordering::Relaxed);
    assert_eq!(get(&cmos, 10), A_DEFAULT);
    let cmos = with_clock(|| i128::from(MONDAY) * NANOS - 100_000);
    assert_eq!(get(&cmos, 10), A_DEFAULT | UIP);
    put(&cmos, 11, SET | HOUR24);
    assert_eq!(get(&cmos, 10), A_DEFAULT, "no update while it is set");
}

#[test]
fn setting_the_time_the_way_linux_does() {
    let (cmos, now) = at(MONDAY * 1000 + 400);
    assert_eq!(put(&cmos, 11, SET | HOUR24), None);
    assert_eq!(put(&cmos, 10, 0x76), None);
    // One hour and ten seconds ahead.
    for (index, value) in [(9, 0x26), (8, 0x11), (7, 0x23), (4, 0x15), (2, 0x05), (0, 0x19), (CENTURY, 0x20)]
    {
        assert_eq!(put(&cmos, index, value), None);
    }
    now.fetch_add(5000, Ordering::Relaxed);
    assert_eq!(get(&cmos, 0), 0x19, "stands still");
    assert_eq!(put(&cmos, 11, HOUR24), None);
    assert_eq!(put(&cmos, 10, A_DEFAULT), Some(3605));
    assert_eq!(get(&cmos, 0), 0x19);
    // The first second is half a second long.
    now.fetch_add(499, Ordering::Relaxed);
    assert_eq!(get(&cmos, 0), 0x19);
    now.fetch_add(1, Ordering::Relaxed);
    assert_eq!(get(&cmos, 0), 0x20);
    now.fetch_add(60_000, Ordering::Relaxed);
    assert_eq!(time(&cmos), [0x20, 0x26, 0x11, 0x23, 0x15, 0x06, 0x20, 2]);
}

#[test]
fn stopping_and_going_on_keeps_the_time_shown() {
    let (cmos, now) = at(MONDAY * 1000);
    put(&cmos, 11, SET | HOUR24);
    now.fetch_add(7000, Ordering::Relaxed);
    assert_eq!(get(&cmos, 0), 0x09);
    assert_eq!(put(&cmos, 11, HOUR24), Some(-7));
    assert_eq!(get(&cmos, 0), 0x09);
}

#[test]
fn the_calendar_agrees_with_itself_and_with_known_days() {
    assert_eq!(date(0), (1970, 1, 1));
    assert_eq!(date(11_016), (2000, 2, 29));
    assert_eq!(date(-1), (1969, 12, 31));
    assert_eq!(days(2100, 3, 1) - days(2100, 2, 28), 1, "2100 is no leap year");
    for day in -800_000..800_000 {
        let (y, m, d) = date(day);
        assert_eq!(days(y, m, d), day);
    }
}

#[test]
fn register_c_tells_of_updates_and_alarms_once() {
    let (cmos, now) = at(MONDAY * 1000);
    assert_eq!(get(&cmos, 12), 0);
    for (index, value) in [(1, 0x15), (3, 0xc0), (5, 0xff)] {
        put(&cmos, index, value);
    }
    now.fetch_add(2000, Ordering::Relaxed);
    assert_eq!(get(&cmos, 12), UPDATED);
    assert_eq!(get(&cmos, 12), 0);
    now.fetch_add(4000, Ordering::Relaxed);
    assert_eq!(get(&cmos, 12), UPDATED | ALARM);
}

#[test]
fn the_update_interrupt_comes_every_second_until_it_is_switched_off() {
    let wires = Arc::new(Wires::default());
    let cmos = Cmos::new(wires.line(IRQ));
    put(&cmos, 11, HOUR24 | UPDATED);
    get(&cmos, 12);
    wires.take();
    let start = Instant::now();
    for _ in 0..2 {
        while wires.take() != [true] {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(get(&cmos, 12), UPDATED | INTERRUPT);
        assert_eq!(wires.take(), [false]);
    }
    assert!(start.elapsed() > Duration::from_secs(1));
    put(&cmos, 11, HOUR24);
    std::thread::sleep(Duration::from_millis(1100));
    assert!(wires.take().is_empty());
}

#[test]
fn the_alarm_interrupts_at_its_time() {
    let wires = Arc::new(Wires::default());
    let cmos = Cmos::new(wires.line(IRQ));
    // One to two seconds from now, on whatever minute and hour that is.
    let second = get(&cmos, 0);
    let second = (second >> 4) * 10 + (second & 0xf) + 2;
    put(&cmos, 1, ((second % 60 / 10) << 4) | (second % 60 % 10));
    put(&cmos, 3, 0xff);
    put(&cmos, 5, 0xff);
    get(&cmos, 12);
    put(&cmos, 11, HOUR24 | ALARM);
    assert!(wires.take().is_empty(), "too early");
    let start = Instant::now();
    while wires.take() != [true] {
        assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(get(&cmos, 12), ALARM | UPDATED | INTERRUPT);
    assert_eq!(wires.take(), [false]);
}

#[test]
fn memory_keeps_what_is_written_and_the_clock_is_not_memory() {
    let (cmos, _) = at(0);
    cmos.set_nvram(0x34, 7);
    cmos.set_nvram(0, 99);
    put(&cmos, 0x7f, 0xa5);
    put(&cmos, 13, 0);
    assert_eq!((get(&cmos, 0x34), get(&cmos, 0), get(&cmos, 0x7f), get(&cmos, 13)), (7, 0, 0xa5, VALID));
    assert_eq!(inb(&*cmos, 0), 0xff);
}

#[test]
fn nothing_a_guest_does_panics() {
    let cmos = Cmos::new(Arc::new(Wires::default()).line(IRQ));
    hammer(&*cmos, LEN, 100_000, |effect| {
        assert!(matches!(effect, Effect::None | Effect::Post(Event::RtcChange { .. })))
    });
    // Every register with every value, running and not.
    for b in [0u8, SET, BINARY, BINARY | SET, HOUR24] {
        for index in 0..128 {
            for value in 0..=255 {
                put(&cmos, 11, b);
                put(&cmos, index, value);
                get(&cmos, 0);
                get(&cmos, 12);
            }
        }
    }
}

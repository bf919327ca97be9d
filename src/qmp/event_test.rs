use super::*;
use std::time::SystemTime;

fn rtc(offset: i64) -> QmpEvent {
    let Value::Object(data) = json!({ "offset": offset, "qom-path": "/machine/rtc" }) else { panic!() };
    QmpEvent { name: "RTC_CHANGE", data: Some(data), time: SystemTime::now() }
}

fn disk(path: &str, reason: &str) -> QmpEvent {
    let data =
        json!({ "qom-path": path, "device": "", "operation": "read", "action": "report", "reason": reason });
    let Value::Object(data) = data else { panic!() };
    QmpEvent { name: "BLOCK_IO_ERROR", data: Some(data), time: SystemTime::now() }
}

fn after(start: Instant, ms: u64) -> Instant {
    start + Duration::from_millis(ms)
}

fn offset(e: Option<QmpEvent>) -> Option<i64> {
    e?.data?["offset"].as_i64()
}

#[test]
fn the_first_goes_out_and_the_last_of_the_second_follows() {
    let (mut limiter, start) = (Limiter::default(), Instant::now());
    assert_eq!(offset(limiter.admit(rtc(1), start)), Some(1));
    assert_eq!(limiter.deadline(), None);
    for n in 2..5 {
        assert_eq!(offset(limiter.admit(rtc(n), after(start, 100 * n as u64))), None);
    }
    assert_eq!(limiter.deadline(), Some(after(start, 1000)));
    assert!(limiter.due(after(start, 999)).is_empty());
    let due = limiter.due(after(start, 1000));
    assert_eq!(due.into_iter().map(|e| offset(Some(e))).collect::<Vec<_>>(), [Some(4)]);
    // That one has opened the next window.
    assert_eq!(offset(limiter.admit(rtc(5), after(start, 1999))), None);
    assert_eq!(limiter.due(after(start, 2000)).len(), 1);
    // A window in which nothing came ends, and the next event goes out at once.
    assert!(limiter.due(after(start, 3000)).is_empty() && !limiter.waits());
    assert_eq!(offset(limiter.admit(rtc(6), after(start, 3001))), Some(6));
}

#[test]
fn disks_are_limited_each_by_itself() {
    let (mut limiter, start) = (Limiter::default(), Instant::now());
    assert!(limiter.admit(disk("/a", "1"), start).is_some());
    assert!(limiter.admit(disk("/b", "1"), start).is_some());
    assert!(limiter.admit(disk("/a", "2"), start).is_none());
    assert!(limiter.admit(rtc(1), start).is_some());
    let due = limiter.due(after(start, 1000));
    assert_eq!(due.iter().map(|e| e.data.as_ref().unwrap()["reason"].clone()).collect::<Vec<_>>(), ["2"]);
}

#[test]
fn others_are_not_limited() {
    let (mut limiter, start) = (Limiter::default(), Instant::now());
    for _ in 0..3 {
        let stop = QmpEvent { name: "STOP", data: None, time: SystemTime::now() };
        assert!(limiter.admit(stop, start).is_some());
    }
    assert!(!limiter.waits());
}

#[test]
fn what_is_sent() {
    let time = UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let stop = QmpEvent { name: "STOP", data: None, time };
    let timestamp = json!({ "seconds": 1_700_000_000, "microseconds": 123_456 });
    assert_eq!(message(&stop), json!({ "event": "STOP", "timestamp": timestamp }));
    let bad = QmpEvent { time: UNIX_EPOCH - Duration::from_secs(5), ..stop };
    assert_eq!(message(&bad)["timestamp"], json!({ "seconds": -1, "microseconds": -1 }));
}

use super::*;
use crate::sys::inbox::Inbox;
use std::sync::atomic::{AtomicUsize, Ordering};

fn tray() -> (Arc<Tray>, Events) {
    let events: Events = Arc::new(Inbox::new().unwrap());
    (Tray::new("/machine/peripheral/cd0", events.clone()), events)
}

#[test]
fn the_users_moves_are_news_for_the_guest_only() {
    let (tray, events) = tray();
    let rung = Arc::new(AtomicUsize::new(0));
    let bell = rung.clone();
    tray.on_news(Some(Box::new(move || _ = bell.fetch_add(1, Ordering::SeqCst))));
    assert!(!tray.set_open(false), "it is closed already");
    assert!(tray.set_open(true) && tray.is_open());
    assert!(!tray.set_open(true));
    assert_eq!(tray.take_event(), Some(MediaEvent::MediaRemoval));
    assert_eq!(tray.take_event(), None);
    assert!(!tray.take_attention(), "nothing to read");
    assert!(tray.set_open(false));
    assert_eq!(tray.take_event(), Some(MediaEvent::NewMedia));
    assert!(tray.take_attention() && !tray.take_attention());
    assert_eq!(rung.load(Ordering::SeqCst), 2);
    assert!(events.take().is_empty());
}

#[test]
fn the_guests_moves_are_told_to_control_and_obey_its_lock() {
    let (tray, events) = tray();
    tray.lock(true);
    assert!(!tray.guest_move(true) && !tray.is_open());
    tray.request_eject(false);
    assert!(tray.is_locked(), "only asked");
    assert_eq!(tray.take_event(), Some(MediaEvent::EjectRequest));
    tray.lock(false);
    assert!(tray.guest_move(true) && tray.is_open());
    assert!(tray.guest_move(true), "open already");
    // An open tray can be locked; closing it is always possible.
    tray.lock(true);
    assert!(tray.guest_move(false));
    let moved = |open| Event::TrayMoved { qom_path: "/machine/peripheral/cd0".into(), open };
    assert_eq!(events.take(), [moved(true), moved(false)]);
    tray.request_eject(true);
    assert!(!tray.is_locked());
    tray.set_open(true);
    tray.reset();
    assert!(!tray.is_open() && tray.take_event().is_none() && !tray.take_attention());
    assert_eq!(events.take(), [moved(false)], "a reset closes it");
}

#[test]
fn a_guest_that_plays_with_its_tray_fills_no_memory() {
    let (tray, events) = tray();
    for n in 0..1001 {
        assert!(tray.guest_move(n % 2 == 0));
    }
    let told = events.take();
    assert_eq!(told.len(), UNTOLD as usize);
    let last = told.into_iter().fold(None, |_, event| match event {
        Event::TrayMoved { open, .. } => tray.told(open),
        other => panic!("{other:?}"),
    });
    assert_eq!(last, Some(true), "control knows where it is at last");
    assert!(tray.guest_move(false));
    assert_eq!(events.take().len(), 1);
    assert_eq!(tray.told(false), None);
}

#[test]
fn the_last_that_control_says_is_where_the_tray_is() {
    let (tray, events) = tray();
    assert!(tray.guest_move(true));
    // The user closes it before control has heard of that, and says "closed" first.
    assert!(tray.set_open(false));
    assert_eq!(events.take().len(), 1);
    assert_eq!(tray.told(true), Some(false));
}

#[test]
fn a_guest_reaches_a_medium_only_as_long_as_it_knows_it() {
    let (tray, _events) = tray();
    let moves = tray.reach().unwrap();
    tray.set_open(true);
    assert_eq!(tray.reach(), Err(Unreachable::Open));
    tray.set_open(false);
    assert_ne!(tray.moves(), moves);
    assert_eq!(tray.reach(), Err(Unreachable::Changed), "so it is told");
    let again = tray.reach().unwrap();
    assert_eq!(tray.moves(), again);
    // A reset that closes the tray, too.
    tray.guest_move(true);
    tray.reset();
    assert_ne!(tray.moves(), again);
}

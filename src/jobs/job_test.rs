//! What there is to see of a job as soon as the command that started it answers.

use super::super::registry::Spec;
use super::super::table::Kind;
use super::super::testing::Desk;
use super::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

struct Script<F>(F);

impl<F: FnMut(&JobCtx) -> Ended + Send> Work for Script<F> {
    fn run(&mut self, cx: &JobCtx) -> Ended {
        (self.0)(cx)
    }
}

fn start(desk: &mut Desk, run: impl FnMut(&JobCtx) -> Ended + Send + 'static) {
    desk.start(Spec::new("a", Kind::Stream), &[], |_| Ok(Box::new(Script(run))));
}

fn now(desk: &Desk) -> Snapshot {
    desk.jobs.query()[0].now
}

/// Each try gives the thread a chance to be late.
const TRIES: u32 = 20;

#[test]
fn the_first_piece_is_done_when_the_command_answers() {
    for _ in 0..TRIES {
        let mut desk = Desk::new();
        start(&mut desk, |cx| {
            cx.progress(0, 100);
            std::thread::sleep(Duration::from_millis(2));
            cx.progress(10, 100);
            cx.sleep(Duration::from_secs(60))
        });
        assert_eq!(now(&desk).progress, Progress { offset: 10, len: 100 });
        desk.jobs.cancel_all(&mut desk.graph);
    }
}

#[test]
fn a_job_that_waits_first_is_seen_to_wait() {
    for _ in 0..TRIES {
        let mut desk = Desk::new();
        start(&mut desk, |cx| {
            std::thread::sleep(Duration::from_millis(2));
            cx.sleep(Duration::from_secs(60))
        });
        assert!(!now(&desk).busy);
        desk.jobs.cancel_all(&mut desk.graph);
    }
}

#[test]
fn a_first_step_that_never_comes_holds_nobody_up() {
    let mut desk = Desk::new();
    let go = Arc::new(AtomicBool::new(false));
    let seen = go.clone();
    start(&mut desk, move |_| {
        while !seen.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    // It would not come here.
    assert_eq!(now(&desk).progress.offset, 0);
    go.store(true, SeqCst);
    desk.until("COMPLETED");
}

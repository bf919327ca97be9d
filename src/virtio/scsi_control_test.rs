use super::super::scsi::ScsiConfig;
use super::super::scsi_testing::{Bench, Host, Reply, lun};
use super::super::scsi_unit::{Address, UnitConfig, UnitKind};
use super::*;
use crate::block::handle::OnError;
use crate::virtio::testing::Asked;

const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// Where the requests of these tests are.
const STEP: u64 = 1024;

fn disk(target: u8, unit: u16) -> Bench {
    Bench::at(Address { target, lun: unit }, UnitConfig::new(UnitKind::Disk), false)
}

/// Offers a write of one block as request `n`; its id.
fn offer(host: &mut Host, n: u64, lun: [u8; 8]) -> u64 {
    let at = host.rig.free + n * STEP;
    host.offer(at, lun, &WRITE, &[n as u8; 512], 0).1
}

fn reply(host: &Host, n: u64) -> Reply {
    host.reply(host.rig.free + n * STEP, 512, 0, 108)
}

#[test]
fn an_abort_waits_for_what_is_being_done_and_takes_back_the_rest() {
    let (one, two) = (disk(0, 0), disk(0, 1));
    let mut host = Host::new(ScsiConfig::default(), &[&one, &two]);
    one.state.hold(true);
    let running = offer(&mut host, 0, lun(0, 0));
    one.state.wait_inside(1);
    let ids: Vec<u64> = (1..5).map(|n| offer(&mut host, n, lun(0, (n % 2) as u16))).collect();
    // Of the other unit, and unknown: nothing to wait for.
    assert_eq!(host.tmf(QUERY_TASK, lun(0, 0), running), response::FUNCTION_SUCCEEDED);
    assert_eq!(host.tmf(QUERY_TASK, lun(0, 0), ids[1]), response::FUNCTION_SUCCEEDED);
    assert_eq!(host.tmf(QUERY_TASK, lun(0, 1), running), response::OK);
    assert_eq!(host.tmf(QUERY_TASK_SET, lun(0, 1), 0), response::FUNCTION_SUCCEEDED);
    assert_eq!(host.tmf(ABORT_TASK, lun(0, 0), 999), response::OK);
    // One that is in the ring goes at once.
    assert_eq!(host.tmf(ABORT_TASK, lun(0, 0), ids[1]), response::OK);
    host.rig.answer(2);
    assert_eq!((reply(&host, 2).response, reply(&host, 2).residual), (response::ABORTED, 512));
    // One that is being done is waited for.
    let at = host.offer_tmf(ABORT_TASK, [1, 0, 0x40, 0, 0, 0, 0, 0], running);
    host.rig.no_answer(0);
    one.state.hold(false);
    host.rig.answer(0);
    assert_eq!(host.rig.peek(at, 1), [response::OK]);
    assert_eq!(reply(&host, 0).response, response::OK, "and it was done by then");
    let mut answers: Vec<u16> = (0..4).map(|_| host.rig.answer(2).0).collect();
    answers.dedup();
    assert_eq!(answers.len(), 4);
    for n in [1, 3, 4] {
        assert_eq!((reply(&host, n).response, reply(&host, n).status), (response::OK, 0));
    }
    assert_eq!(host.tmf(QUERY_TASK_SET, lun(0, 0), 0), response::OK);
    // All of them end on the same block: the order of a unit was kept.
    assert_eq!((one.bytes(0, 1), two.bytes(0, 1)), (vec![4], vec![3]));
}

#[test]
fn a_reset_ends_what_is_queued_and_is_told() {
    let (one, two) = (disk(0, 0), disk(1, 0));
    let mut host = Host::new(ScsiConfig { workers: 2, ..ScsiConfig::default() }, &[&one, &two]);
    one.state.hold(true);
    offer(&mut host, 0, lun(0, 0));
    offer(&mut host, 1, lun(0, 0));
    one.state.wait_inside(2);
    offer(&mut host, 2, lun(0, 0));
    offer(&mut host, 3, lun(1, 0));
    let at = host.offer_tmf(LOGICAL_UNIT_RESET, lun(0, 0), 0);
    host.rig.answer(2);
    assert_eq!(reply(&host, 2).response, response::RESET);
    host.rig.no_answer(0);
    one.state.hold(false);
    host.rig.answer(0);
    assert_eq!(host.rig.peek(at, 1), [response::OK]);
    (0..3).for_each(|_| _ = host.rig.answer(2));
    assert_eq!(reply(&host, 3).response, response::OK);
    assert_eq!(host.ask(lun(0, 0), &[0], &[], 0).sense(), Sense::UNIT_RESET);
    host.ask(lun(1, 0), &[0], &[], 0).ok();
    assert_eq!(host.tmf(I_T_NEXUS_RESET, lun(1, 5), 0), response::OK);
    assert_eq!(host.ask(lun(1, 0), &[0], &[], 0).sense(), Sense::UNIT_RESET);
    host.ask(lun(0, 0), &[0], &[], 0).ok();
}

#[test]
fn functions_that_make_no_sense() {
    let one = disk(0, 0);
    let mut host = Host::new(ScsiConfig::default(), &[&one]);
    assert_eq!(host.tmf(ABORT_TASK, lun(0, 1), 1), response::INCORRECT_LUN);
    assert_eq!(host.tmf(LOGICAL_UNIT_RESET, lun(1, 0), 1), response::BAD_TARGET);
    assert_eq!(host.tmf(2, lun(0, 0), 0), response::FUNCTION_REJECTED, "CLEAR ACA");
    assert_eq!(host.tmf(99, lun(0, 0), 0), response::FUNCTION_REJECTED);
    let at = host.rig.free + 0x8000;
    for (bytes, room) in [(vec![9, 0, 0, 0], 5), (vec![0; 23], 1), (vec![1, 0, 0, 0], 5), (vec![0; 24], 0)] {
        host.rig.poke(at, &bytes);
        let mut p = vec![(at, bytes.len() as u32, false), (at + 100, room, true)];
        p.retain(|piece| piece.1 > 0);
        host.rig.offer(0, &p);
        host.rig.kick(0);
        assert!(host.rig.broken().contains("control request"));
        host.rig.reset();
        host.rig.start();
    }
    let at = host.rig.free + 0x8000;
    host.rig.offer(1, &[(at, 15, true)]);
    host.rig.kick(1);
    assert!(host.rig.broken().contains("event buffer"));
}

#[test]
fn a_request_that_waits_for_cont_is_waited_for() {
    let one = disk(0, 0);
    one.unit.handle().set_policy(OnError::Stop, OnError::Stop);
    let mut host = Host::new(ScsiConfig::default(), &[&one]);
    one.state.fail(1, libc::EIO);
    let held = offer(&mut host, 0, lun(0, 0));
    host.rig.no_answer(2);
    // The guest is still there for a moment.
    let at = host.offer_tmf(ABORT_TASK, lun(0, 0), held);
    host.rig.no_answer(0);
    host.rig.pause();
    host.rig.resume();
    host.rig.answer(0);
    assert_eq!(host.rig.peek(at, 1), [response::OK]);
    host.rig.answer(2);
    assert_eq!(reply(&host, 0).response, response::OK);
    assert_eq!(one.bytes(0, 1), [0]);
    assert_eq!(*one.state.log.lock().unwrap(), [Asked::Write(0, 512); 2]);
}

/// Whatever is being done when a unit is reset: no request of it is under way any more when the
/// driver hears that the reset is complete.
#[test]
fn a_reset_that_is_complete_leaves_nothing_behind() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x7e57_ab1e_5c51_0001);
    let seconds = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    eprintln!("SEED={seed} SOAK={seconds}");
    let mut rng = crate::block::testing::Rng(seed);
    let units = [disk(0, 0), disk(0, 1)];
    let config = ScsiConfig { workers: 3, queue_size: 64, ..ScsiConfig::default() };
    let mut host = Host::new(config, &[&units[0], &units[1]]);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut slots: Vec<Option<(u16, usize)>> = vec![None; 24];
    let (mut resets, mut ended, mut taken) = (0, 0, 0);
    while std::time::Instant::now() < end {
        if let Some(n) = slots.iter().position(Option::is_none) {
            let unit = rng.below(2) as usize;
            let base = host.rig.free + n as u64 * STEP;
            let (head, _) = host.offer(base, lun(0, unit as u16), &WRITE, &[n as u8; 512], 0);
            slots[n] = Some((head, unit));
        }
        let mut reap = |host: &mut Host, slots: &mut Vec<Option<(u16, usize)>>| {
            while let Some((head, len)) = host.rig.rings[2].answer() {
                let n = slots.iter().position(|s| s.is_some_and(|s| s.0 == head)).expect("answered twice");
                slots[n] = None;
                let response = host.reply(host.rig.free + n as u64 * STEP, 512, 0, len).response;
                assert!(matches!(response, response::OK | response::RESET), "{response}");
                taken += u32::from(response == response::RESET);
                ended += 1;
            }
        };
        if rng.below(4) == 0 {
            reap(&mut host, &mut slots);
        }
        if rng.below(16) == 0 {
            let unit = rng.below(2) as usize;
            assert_eq!(host.tmf(LOGICAL_UNIT_RESET, lun(0, unit as u16), 0), response::OK);
            reap(&mut host, &mut slots);
            assert!(slots.iter().flatten().all(|s| s.1 != unit), "one is still under way");
            resets += 1;
        }
    }
    eprintln!("{resets} resets, {ended} requests, {taken} of them taken back");
    assert!(resets > 10 && taken > 0 && ended > 100);
    while slots.iter().any(Option::is_some) {
        let (head, _) = host.rig.answer(2);
        slots.iter_mut().filter(|s| s.is_some_and(|s| s.0 == head)).for_each(|s| *s = None);
    }
    assert_eq!(*host.rig.told.broken.lock().unwrap(), None);
}

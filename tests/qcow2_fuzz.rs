//! The qcow2 driver's fuzz targets with random inputs, those of the corpus first. A few seconds,
//! `SOAK` seconds; `SEED=n` repeats a run, `INPUT=` with what a failure says repeats that one. With libFuzzer: `just fuzz`.

#[path = "support/qcow2_fuzz.rs"]
mod fuzz;
#[path = "support/qcow2.rs"]
mod support;

use std::sync::mpsc;
use std::time::{Duration, Instant};
use support::*;

/// Longer than any input may take, even on a busy machine in a debug build.
const TOO_LONG: Duration = Duration::from_secs(60);

/// Mostly short, mostly patches as the targets read them.
fn input(rng: &mut Rng) -> Vec<u8> {
    let mut out = vec![rng.draw() as u8, rng.draw() as u8, rng.draw() as u8];
    for _ in 0..1 + rng.below(5) {
        let kind = rng.below(6) as u8 | if rng.one_in(12) { 0x80 } else { 0 };
        let place = if rng.one_in(2) { rng.below(0x10000) } else { rng.below(16) * 8 };
        out.extend_from_slice(&[kind, (place >> 8) as u8, place as u8]);
        let few = rng.one_in(2);
        let n = [1, 1, 4, 8, 3, 0][usize::from(kind & 0x7f)];
        out.extend((0..n).map(|i| if few && i > 0 { rng.below(40) as u8 } else { rng.draw() as u8 }));
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The inputs that are kept: each line the bytes of one, in hexadecimal.
fn corpus() -> Vec<Vec<u8>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/fuzz/qcow2.hex");
    let text = std::fs::read_to_string(path).expect(path);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).expect(path);
    text.lines().filter(|l| !l.starts_with('#')).map(|l| l.as_bytes().chunks(2).map(byte).collect()).collect()
}

/// Catches: a panic, an endless loop, gigabytes of memory, a read-only open that writes, and an
/// image in order that is not in order any more.
#[test]
fn broken_metadata_do_no_harm() {
    let (seed, until) = seed_and_time(Duration::from_secs(4));
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    if let Ok(text) = std::env::var("INPUT") {
        return fuzz::any(&text.as_bytes().chunks(2).map(byte).collect::<Vec<u8>>());
    }
    let (tell, told) = mpsc::channel::<Option<String>>();
    // An input that takes for ever would hang the test: this one says which it was.
    let watch = std::thread::spawn(move || {
        let mut now = None;
        loop {
            match told.recv_timeout(TOO_LONG) {
                Ok(None) => return,
                Ok(Some(input)) => now = Some(input),
                Err(_) => {
                    eprintln!("INPUT={} takes longer than {TOO_LONG:?}", now.unwrap_or_default());
                    std::process::abort();
                }
            }
        }
    });
    let one = |bytes: &[u8]| {
        tell.send(Some(hex(bytes))).unwrap();
        if std::panic::catch_unwind(|| fuzz::any(bytes)).is_err() {
            _ = tell.send(None);
            panic!("INPUT={} fails", hex(bytes));
        }
    };
    let kept = corpus();
    kept.iter().for_each(|bytes| one(bytes));
    let (mut n, mut rng) = (0u64, Rng::new(seed));
    while n < 200 || Instant::now() < until {
        // New ones, and variations of those that are kept.
        let mut bytes = match rng.one_in(4) && !kept.is_empty() {
            true => kept[rng.below(kept.len() as u64) as usize].clone(),
            false => input(&mut rng),
        };
        for _ in 0..rng.below(3) {
            let at = rng.below(bytes.len().max(1) as u64) as usize;
            if let Some(b) = bytes.get_mut(at) {
                *b = rng.draw() as u8;
            }
        }
        one(&bytes);
        n += 1;
    }
    tell.send(None).unwrap();
    watch.join().unwrap();
    eprintln!("{} inputs that are kept, {n} new", kept.len());
}

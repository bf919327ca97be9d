use super::*;
use crate::block::testing::Rng;
use crate::nbd::testing::{seed, soak};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// What a good server says when the client asks as ours does.
fn script() -> Vec<Vec<u8>> {
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let mut out = REP_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    };
    let mut hello = INIT_MAGIC.to_be_bytes().to_vec();
    hello.extend(OPTS_MAGIC.to_be_bytes());
    hello.extend(3u16.to_be_bytes());
    let mut context = 9u32.to_be_bytes().to_vec();
    context.extend(b"base:allocation");
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend((1u64 << 20).to_be_bytes());
    export.extend((flag::HAS_FLAGS | flag::SEND_FLUSH).to_be_bytes());
    let mut block = info::BLOCK_SIZE.to_be_bytes().to_vec();
    block.extend([512u32, 4096, 1 << 20].map(u32::to_be_bytes).concat());
    vec![
        hello,
        reply(opt::STRUCTURED_REPLY, rep::ACK, &[]),
        reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &context),
        reply(opt::SET_META_CONTEXT, rep::ACK, &[]),
        reply(opt::GO, rep::INFO, &export),
        reply(opt::GO, rep::INFO, &block),
        reply(opt::GO, rep::ACK, &[]),
    ]
}

fn shake(bytes: Vec<u8>, wait: Duration) -> Result<Found> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&bytes).unwrap();
    // So that the client's writes have somewhere to go.
    theirs.set_nonblocking(true).unwrap();
    let stream = Stream::new(ours.into()).unwrap();
    let found = hello(&stream, "e", "base:allocation", Instant::now() + wait);
    let _ = theirs.read(&mut [0; 4096]);
    found
}

#[test]
fn a_good_server_is_understood() {
    let found = shake(script().concat(), Duration::from_secs(5)).unwrap();
    assert_eq!((found.size, found.context, found.structured), (1 << 20, Some(9), true));
    assert_eq!((found.min_block, found.preferred, found.max_payload), (512, 4096, 1 << 20));
}

#[test]
fn a_slow_server_has_no_more_time_than_there_is() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let t = std::thread::spawn(move || {
        // A byte now and then: each would be in time.
        for byte in script().concat() {
            if theirs.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let stream = Stream::new(ours.into()).unwrap();
    let start = Instant::now();
    let e = hello(&stream, "e", "base:allocation", start + Duration::from_millis(300)).unwrap_err();
    assert!(e.desc.contains("does not answer in time"), "{e}");
    assert!(start.elapsed() < Duration::from_millis(1500));
    drop(stream);
    t.join().unwrap();
}

#[test]
fn nonsense_is_an_error() {
    for (n, what, want) in [
        (0, b"NBDMAGIKIHAVEOPT\0\x03".to_vec(), "does not speak NBD"),
        (0, b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec(), "does not speak NBD"),
        (1, vec![0; 20], "makes no sense"),
        (5, script()[4].clone(), ""),
        (6, script()[3].clone(), "makes no sense"),
        (4, script()[6].clone(), "says nothing about the export"),
    ] {
        let mut all = script();
        all[n] = what;
        let done = shake(all.concat(), Duration::from_secs(5));
        match want {
            "" => assert!(done.is_ok()),
            want => assert!(done.as_ref().unwrap_err().desc.contains(want), "{n}: {done:?}"),
        }
    }
    // A reply of four gigabytes is not waited for.
    let mut all = script();
    all[1][16..20].fill(0xff);
    assert!(shake(all.concat(), Duration::from_secs(5)).unwrap_err().desc.contains("too long"));
}

#[test]
fn random_damage_never_hangs_or_panics() {
    let mut rng = Rng(seed("hello damage"));
    let end = Instant::now() + soak();
    let good = script().concat();
    while Instant::now() < end {
        let mut bytes = good.clone();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(bytes.len() as u64) as usize;
            match rng.below(4) {
                0 => bytes[at] = rng.draw() as u8,
                1 => bytes[at] ^= 1 << rng.below(8),
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, rng.draw() as u8),
            }
        }
        let start = Instant::now();
        // Damage where nobody looks is no error.
        let _ = shake(bytes, Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}

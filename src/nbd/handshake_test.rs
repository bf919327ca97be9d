use super::*;
use crate::block::testing::{Mem, Rng};
use crate::nbd::testing::{Raw, Rig, name, queries, seed, soak};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

fn rig(test: &str) -> Rig {
    Rig::new(test, Mem::new(1 << 20), true)
}

#[test]
fn options_and_their_answers() {
    let rig = rig("options");
    let mut c = Raw::new(&rig.path(), 3);
    let kinds = |replies: Vec<(u32, Vec<u8>)>| replies.into_iter().map(|r| r.0).collect::<Vec<_>>();
    assert_eq!(c.option(opt::LIST, &[]), [(rep::SERVER, b"\0\0\0\x01ea disk".to_vec()), (rep::ACK, vec![])]);
    assert_eq!(kinds(c.option(opt::LIST, b"x")), [rep::ERR_INVALID]);
    assert_eq!(kinds(c.option(opt::STARTTLS, &[])), [rep::ERR_POLICY]);
    assert_eq!(kinds(c.option(99, b"what is this")), [rep::ERR_UNSUP]);
    assert_eq!(kinds(c.option(opt::LIST_META_CONTEXT, &queries("e", &[]))), [rep::ERR_INVALID], "too early");
    assert_eq!(kinds(c.option(opt::STRUCTURED_REPLY, b"x")), [rep::ERR_INVALID]);
    assert_eq!(kinds(c.option(opt::STRUCTURED_REPLY, &[])), [rep::ACK]);
    assert_eq!(kinds(c.option(opt::STRUCTURED_REPLY, &[])), [rep::ERR_INVALID], "twice");
    let mut contexts = |option: u32, list: &[&str]| -> Vec<String> {
        let replies = c.option(option, &queries("e", list));
        assert_eq!(replies.last().unwrap().0, rep::ACK);
        let names = replies[..replies.len() - 1].iter();
        names.map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap()).collect()
    };
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    assert_eq!(contexts(opt::LIST_META_CONTEXT, &[]), [base, depth]);
    assert_eq!(contexts(opt::LIST_META_CONTEXT, &["qemu:"]), [depth]);
    assert_eq!(contexts(opt::LIST_META_CONTEXT, &["base:", "x:y", "base:no"]), [base]);
    assert_eq!(contexts(opt::SET_META_CONTEXT, &["base:"]), [""; 0]);
    assert_eq!(contexts(opt::SET_META_CONTEXT, &[depth, "qemu:dirty-bitmap:"]), [depth]);
    assert_eq!(kinds(c.option(opt::SET_META_CONTEXT, &queries("no", &[base]))), [rep::ERR_UNKNOWN]);
    assert_eq!(kinds(c.option(opt::GO, &name("no", &[]))), [rep::ERR_UNKNOWN]);
    for bad in [&b""[..], b"\0\0\0\x01", b"\xff\xff\xff\xffe\0\0", b"\0\0\0\x01e\0\x01", b"\0\0\0\x01e\0\0x"]
    {
        assert_eq!(kinds(c.option(opt::INFO, bad)), [rep::ERR_INVALID], "{bad:?}");
    }
    assert_eq!(kinds(c.option(opt::LIST_META_CONTEXT, b"\0\0\0\x01e\xff\xff\xff\xff")), [rep::ERR_INVALID]);
    assert_eq!(kinds(c.option(opt::INFO, &vec![0; 100_000])), [rep::ERR_TOO_BIG]);
    let wanted = [info::BLOCK_SIZE, info::NAME, info::DESCRIPTION, 4711];
    let replies = c.option(opt::INFO, &name("e", &wanted));
    let infos: Vec<u16> = replies[..replies.len() - 1].iter().map(|(_, data)| be16(data, 0)).collect();
    assert_eq!(infos, [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, info::EXPORT]);
    assert_eq!(be64(&replies[3].1, 2), 1 << 20);
    assert_eq!(kinds(c.option(opt::ABORT, &[])), [rep::ACK]);
    assert!(c.is_over());
    rig.wait_empty();
}

#[test]
fn old_clients_get_their_export() {
    let rig = rig("old");
    for (flags, len) in [(3, 10), (0, 134), (1, 134), (2, 10)] {
        let mut c = Raw::new(&rig.path(), flags);
        c.send(&[&OPTS_MAGIC.to_be_bytes()[..], &[0, 0, 0, 1, 0, 0, 0, 1, b'e']].concat());
        let head = c.recv(len);
        assert_eq!(be64(&head, 0), 1 << 20);
        c.request(0, cmd::READ, 0, 512);
        assert_eq!(c.simple(), 0);
        assert_eq!(c.recv(512), [0; 512]);
    }
    // What they cannot be told ends the connection.
    let mut c = Raw::new(&rig.path(), 3);
    c.send(&[&OPTS_MAGIC.to_be_bytes()[..], &[0, 0, 0, 1, 0, 0, 0, 1, b'x']].concat());
    assert!(c.is_over());
    assert!(Raw::new(&rig.path(), 4).is_over(), "unknown flags");
    let mut c = Raw::new(&rig.path(), 0);
    c.send(&[&OPTS_MAGIC.to_be_bytes()[..], &[0, 0, 0, 3, 0, 0, 0, 0]].concat());
    assert!(c.is_over(), "LIST is fixed newstyle");
}

#[test]
fn who_does_not_choose_in_time_is_shown_out_and_who_waits_comes_in() {
    let mut rig = rig("door");
    rig.serve(2, Some(Duration::from_millis(300)));
    let start = Instant::now();
    let mut chosen = Raw::go(&rig.path(), false, &[]);
    let mut mute = Raw::new(&rig.path(), 3);
    // The third is not served until the second has gone.
    let mut third = UnixStream::connect(rig.path()).unwrap();
    third.read_exact(&mut [0; 18]).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert!(mute.is_over());
    // Who has chosen stays.
    chosen.request(0, cmd::FLUSH, 0, 0);
    assert_eq!(chosen.simple(), 0);
    // A client that dribbles is not waited for either.
    let mut slow = third;
    let mut alive = 0;
    while slow.write_all(&[0]).is_ok() && alive < 100 {
        alive += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(alive < 100);
}

#[test]
fn random_bytes_never_hurt_the_server() {
    let mut rig = rig("fuzz");
    rig.serve(0, Some(Duration::from_millis(500)));
    let mut rng = Rng(seed("handshake fuzz"));
    let good = |option: u32, data: &[u8]| {
        [&OPTS_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data]
            .concat()
    };
    let end = Instant::now() + soak();
    while Instant::now() < end {
        let mut s = UnixStream::connect(rig.path()).unwrap();
        let mut bytes = 3u32.to_be_bytes().to_vec();
        for _ in 0..rng.below(5) {
            let context = queries("e", &["base:allocation", "qemu:", "x:y"][..rng.below(4) as usize]);
            bytes.extend(match rng.below(6) {
                0 => good(opt::STRUCTURED_REPLY, &[]),
                1 => good(opt::SET_META_CONTEXT, &context),
                2 => good(opt::LIST_META_CONTEXT, &context),
                3 => good(opt::INFO, &name("e", &[0, 1, 2, 3])),
                4 => good(opt::LIST, &[]),
                _ => good(rng.below(20) as u32, &vec![rng.draw() as u8; rng.below(50) as usize]),
            });
        }
        bytes.extend(good(opt::GO, &name("e", &[])));
        for _ in 0..rng.below(6) {
            let kind = rng.below(9) as u16;
            let r = Request {
                flags: if rng.below(2) == 0 { 0 } else { rng.below(64) as u16 },
                kind,
                cookie: rng.draw(),
                offset: rng.below(1 << 21),
                len: rng.below(9000) as u32,
            };
            bytes.extend(r.bytes());
            if kind == cmd::WRITE {
                bytes.extend(vec![3; r.len as usize]);
            }
        }
        for _ in 0..rng.below(3) {
            let at = rng.below(bytes.len() as u64) as usize;
            match rng.below(3) {
                0 => bytes[at] = rng.draw() as u8,
                1 => bytes.truncate(at),
                _ => bytes.insert(at, rng.draw() as u8),
            }
            if bytes.is_empty() {
                break;
            }
        }
        // It may have been shown out already.
        let _ = s.write_all(&bytes);
        if rng.below(2) == 0 {
            s.set_read_timeout(Some(Duration::from_millis(1 + rng.below(3)))).unwrap();
            let _ = s.read(&mut [0; 65536]);
        }
    }
    // It still serves, and nobody is left.
    let mut c = Raw::go(&rig.path(), true, &[]);
    c.request(0, cmd::FLUSH, 0, 0);
    assert_eq!(c.simple(), 0);
    drop(c);
    rig.wait_empty();
}

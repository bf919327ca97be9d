use super::*;
use crate::block::testing::Rng;
use crate::nbd::testing::{seed, soak};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

fn pair(structured: bool) -> (Arc<Client>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let found = Found {
        size: 1 << 20,
        flags: flag::HAS_FLAGS,
        structured,
        context: Some(3),
        min_block: 1,
        preferred: 4096,
        max_payload: MAX_PAYLOAD,
    };
    (Arc::new(Client::new(Arc::new(Stream::new(ours.into()).unwrap()), found)), theirs)
}

fn read(client: &Client, at: u64, to: &mut [u8]) -> Result<io::Result<()>, Broken> {
    let request = Request { flags: 0, kind: cmd::READ, cookie: 0, offset: at, len: to.len() as u32 };
    client.call(request, None, Want::Data(&mut IovMut::from_slice(to)))
}

fn request(s: &mut UnixStream) -> Request {
    let mut head = [0; Request::SIZE];
    s.read_exact(&mut head).unwrap();
    Request::parse(&head).unwrap()
}

fn data(cookie: u64, at: u64, bytes: &[u8], flags: u16) -> Vec<u8> {
    let mut out = chunk_head(cookie, flags, chunk::OFFSET_DATA, 8 + bytes.len() as u32).to_vec();
    out.extend(at.to_be_bytes());
    out.extend(bytes);
    out
}

fn hole(cookie: u64, at: u64, len: u32, flags: u16) -> Vec<u8> {
    let mut out = chunk_head(cookie, flags, chunk::OFFSET_HOLE, 12).to_vec();
    out.extend(at.to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

#[test]
fn replies_come_in_any_order_and_in_pieces() {
    let (client, mut server) = pair(true);
    let threads: Vec<_> = (0..8u64)
        .map(|n| {
            let client = client.clone();
            std::thread::spawn(move || {
                let mut to = [0xee; 1000];
                read(&client, n * 1000, &mut to).unwrap().unwrap();
                assert!(to[..300].iter().all(|b| *b == n as u8));
                assert!(to[300..600].iter().all(|b| *b == 0));
                assert!(to[600..].iter().all(|b| *b == n as u8 + 100));
            })
        })
        .collect();
    let mut requests: Vec<Request> = (0..8).map(|_| request(&mut server)).collect();
    requests.reverse();
    // First everybody's last piece, then the holes, then the first pieces.
    for r in &requests {
        let n = (r.offset / 1000) as u8;
        server.write_all(&data(r.cookie, r.offset + 600, &[n + 100; 400], 0)).unwrap();
    }
    for r in &requests {
        server.write_all(&hole(r.cookie, r.offset + 300, 300, 0)).unwrap();
    }
    for r in &requests {
        let n = (r.offset / 1000) as u8;
        server.write_all(&data(r.cookie, r.offset, &[n; 300], 0)).unwrap();
        server.write_all(&chunk_head(r.cookie, chunk::DONE, chunk::NONE, 0)).unwrap();
    }
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn what_makes_no_sense_ends_the_connection() {
    type Make = fn(&Request) -> Vec<u8>;
    let cases: [(&str, Make); 11] = [
        ("a byte twice", |r| [data(r.cookie, 0, &[1; 8], 0), data(r.cookie, 7, &[1; 9], 1)].concat()),
        ("before the request", |r| data(r.cookie.wrapping_add(0), 100, &[1; 16], 1)),
        ("too much", |r| data(r.cookie, 0, &[1; 17], 1)),
        ("overflow", |r| hole(r.cookie, u64::MAX - 3, 16, 1)),
        ("an empty hole", |r| hole(r.cookie, 0, 0, 1)),
        ("too little", |r| data(r.cookie, 0, &[1; 15], 1)),
        ("nothing at all", |r| chunk_head(r.cookie, 1, chunk::NONE, 0).to_vec()),
        ("no end", |r| chunk_head(r.cookie, 0, chunk::NONE, 0).to_vec()),
        ("a simple reply", |r| simple_reply(r.cookie, 0).to_vec()),
        ("somebody else's", |r| simple_reply(r.cookie + 1, 5).to_vec()),
        ("an unknown chunk", |r| chunk_head(r.cookie, 1, 99, 0).to_vec()),
    ];
    for (what, make) in cases {
        let (client, mut server) = pair(true);
        let other = client.clone();
        let t = std::thread::spawn(move || read(&other, 0, &mut [0; 16]).is_err());
        let r = request(&mut server);
        server.write_all(&make(&r)).unwrap();
        assert!(t.join().unwrap(), "{what}");
        assert!(read(&client, 0, &mut [0; 16]).is_err(), "{what}: it goes on");
    }
}

#[test]
fn errors_are_told_and_the_connection_stays() {
    let (client, mut server) = pair(true);
    let other = client.clone();
    let t = std::thread::spawn(move || {
        let codes: Vec<_> =
            (0..3).map(|_| read(&other, 0, &mut [0; 16]).unwrap().unwrap_err().raw_os_error()).collect();
        let mut extent = None;
        let ask = Request { flags: 0, kind: cmd::BLOCK_STATUS, cookie: 0, offset: 0, len: 512 };
        other.call(ask, None, Want::Extent(&mut extent)).unwrap().unwrap();
        (codes, extent)
    });
    let r = request(&mut server);
    server.write_all(&simple_reply(r.cookie, EPERM)).unwrap();
    let r = request(&mut server);
    // With a text, after half of the data.
    server.write_all(&data(r.cookie, 0, &[1; 8], 0)).unwrap();
    let mut out = chunk_head(r.cookie, chunk::DONE, chunk::ERROR_OFFSET, 14 + 4).to_vec();
    out.extend(ENOSPC.to_be_bytes());
    out.extend(4u16.to_be_bytes());
    out.extend(b"full");
    out.extend(8u64.to_be_bytes());
    server.write_all(&out).unwrap();
    let r = request(&mut server);
    // An unknown number, in an unknown kind of error.
    let mut out = chunk_head(r.cookie, chunk::DONE, 0x9999, 6).to_vec();
    out.extend(4711u32.to_be_bytes());
    out.extend([0, 0]);
    server.write_all(&out).unwrap();
    let r = request(&mut server);
    let mut out = chunk_head(r.cookie, chunk::DONE, chunk::BLOCK_STATUS, 4 + 16).to_vec();
    out.extend([3u32, 100, 2, 412, 0].map(u32::to_be_bytes).concat());
    server.write_all(&out).unwrap();
    let (codes, extent) = t.join().unwrap();
    assert_eq!(codes, [Some(libc::EPERM), Some(libc::ENOSPC), Some(libc::EINVAL)]);
    assert_eq!(extent, Some((100, 2)));
}

#[test]
fn random_replies_never_hang_or_panic() {
    let mut rng = Rng(seed("client damage"));
    let end = Instant::now() + soak();
    while Instant::now() < end {
        let (client, mut server) = pair(rng.below(2) == 0);
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let client = client.clone();
                std::thread::spawn(move || {
                    (0..4).take_while(|_| read(&client, 64, &mut [0; 64]).is_ok()).count()
                })
            })
            .collect();
        for _ in 0..6 {
            let mut head = [0; Request::SIZE];
            server.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            if server.read_exact(&mut head).is_err() {
                break;
            }
            let r = Request::parse(&head).unwrap();
            let mut out = match rng.below(4) {
                0 => simple_reply(r.cookie, (rng.below(2) * 5) as u32).to_vec(),
                1 => {
                    data(r.cookie, rng.below(70) + 60, &vec![1; rng.below(80) as usize], rng.below(2) as u16)
                }
                2 => hole(r.cookie, rng.below(70) + 60, rng.below(80) as u32, rng.below(2) as u16),
                _ => data(r.cookie, 64, &[1; 64], 1),
            };
            if rng.below(3) == 0 {
                let at = rng.below(out.len() as u64) as usize;
                out[at] = rng.draw() as u8;
            }
            if server.write_all(&out).is_err() {
                break;
            }
        }
        drop(server);
        for t in threads {
            t.join().unwrap();
        }
    }
}

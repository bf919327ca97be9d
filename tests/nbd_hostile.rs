//! NBD servers that lie, stop in the middle, flood, or say nothing: the client gives an I/O error or connects again; what it waits
//! for is let go by `yank`; it never ends, and never takes the memory that a server says it should.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, LIMIT, Vm};
use minivmm::nbd::proto::*;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
/// What `qemu-io` prints.
const GOOD: &str = "read 4096/4096 bytes at offset 0";
const EIO: &str = "read failed: Input/output error";

/// The server's end of a connection.
struct Line(UnixStream);

impl Line {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn greet(&mut self) -> io::Result<()> {
        let flags = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES;
        self.put(&[&INIT_MAGIC.to_be_bytes()[..], &OPTS_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat())?;
        self.take::<4>().map(drop)
    }

    /// The next option.
    fn option(&mut self) -> io::Result<u32> {
        let head = self.take::<16>()?;
        let mut data = vec![0; be32(&head, 12) as usize];
        self.0.read_exact(&mut data)?;
        Ok(be32(&head, 8))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let len = data.len() as u32;
        let head =
            [&REP_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes(), &len.to_be_bytes()];
        self.put(&[&head.concat(), data].concat())
    }

    /// A good handshake up to the choice of the export; chunks, if the client asks for them.
    fn until_go(&mut self) -> io::Result<()> {
        self.greet()?;
        loop {
            match self.option()? {
                opt::STRUCTURED_REPLY => self.reply(opt::STRUCTURED_REPLY, rep::ACK, &[])?,
                opt::SET_META_CONTEXT => {
                    let context = [&9u32.to_be_bytes()[..], b"base:allocation"].concat();
                    self.reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &context)?;
                    self.reply(opt::SET_META_CONTEXT, rep::ACK, &[])?;
                }
                opt::GO => return Ok(()),
                other => self.reply(other, rep::ERR_UNSUP, &[])?,
            }
        }
    }

    fn go(&mut self, infos: &[Vec<u8>]) -> io::Result<()> {
        infos.iter().try_for_each(|i| self.reply(opt::GO, rep::INFO, i))?;
        self.reply(opt::GO, rep::ACK, &[])
    }

    /// The whole of it; `chunks`: replies come in chunks.
    fn shake(&mut self, chunks: bool) -> io::Result<()> {
        if chunks {
            self.until_go()?;
        } else {
            self.greet()?;
            while self.option()? != opt::GO {
                self.reply(opt::STRUCTURED_REPLY, rep::ERR_UNSUP, &[])?;
            }
        }
        self.go(&[export(SIZE)])
    }

    /// The next request, of one that has no payload.
    fn request(&mut self) -> io::Result<Request> {
        Request::parse(&self.take()?).ok_or(io::ErrorKind::InvalidData.into())
    }

    /// Answers every request as it should be.
    fn serve(&mut self, chunks: bool) -> io::Result<()> {
        loop {
            let r = self.request()?;
            let read = r.kind == cmd::READ;
            match chunks && read {
                true => self.put(&data(&r, 0, &vec![7; r.len as usize], chunk::DONE))?,
                false => {
                    self.put(&simple_reply(r.cookie, 0))?;
                    self.put(&vec![7; if read { r.len as usize } else { 0 }])?;
                }
            }
        }
    }
}

fn export(size: u64) -> Vec<u8> {
    let flags = flag::HAS_FLAGS | flag::SEND_FLUSH;
    [&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn blocks(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let sizes = [min, preferred, max].map(u32::to_be_bytes).concat();
    [&info::BLOCK_SIZE.to_be_bytes()[..], &sizes].concat()
}

/// A chunk of data for `r`, `at` bytes from its start.
fn data(r: &Request, at: u64, bytes: &[u8], flags: u16) -> Vec<u8> {
    let head = chunk_head(r.cookie, flags, chunk::OFFSET_DATA, 8 + bytes.len() as u32);
    [&head[..], &r.offset.wrapping_add(at).to_be_bytes(), bytes].concat()
}

fn hole(r: &Request, at: u64, len: u32) -> Vec<u8> {
    let head = chunk_head(r.cookie, chunk::DONE, chunk::OFFSET_HOLE, 12);
    [&head[..], &r.offset.wrapping_add(at).to_be_bytes(), &len.to_be_bytes()].concat()
}

/// An error chunk that says it has `text` bytes of text, with `len` bytes behind its code.
fn error(r: &Request, code: u32, text: u16, len: u32, flags: u16) -> Vec<u8> {
    let head = chunk_head(r.cookie, flags, chunk::ERROR, 6 + len);
    [&head[..], &code.to_be_bytes(), &text.to_be_bytes(), &vec![b'!'; len as usize]].concat()
}

/// Serves every connection at `path` on a thread of its own; `n` counts them.
fn listen(path: &std::path::Path, f: impl Fn(&mut Line, u32) -> io::Result<()> + Send + Sync + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    let (f, count) = (Arc::new(f), Arc::new(AtomicU32::new(0)));
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let (f, n) = (f.clone(), count.fetch_add(1, Ordering::SeqCst));
            // The client leaves in the middle of most of it.
            std::thread::spawn(move || f(&mut Line(stream), n));
        }
    });
}

/// A QMP client that can yank.
struct Client(BufReader<UnixStream>, u32);

impl Client {
    fn new(vm: &Vm) -> Client {
        drop(vm.qmp());
        let stream = (0..500).find_map(|_| {
            std::thread::sleep(Duration::from_millis(2));
            UnixStream::connect(vm.path("qmp")).ok()
        });
        let stream = stream.expect("no monitor");
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut client = Client(BufReader::new(stream), 0);
        client.next();
        client.run("qmp_capabilities", json!({"enable": ["oob"]})).unwrap();
        client
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        let n = self.0.read_line(&mut line).unwrap_or_else(|e| panic!("nobody answers: {e}"));
        assert!(n > 0, "it has ended");
        serde_json::from_str(&line).unwrap()
    }

    fn send(&mut self, how: &str, command: &str, arguments: Value) -> u32 {
        self.1 += 1;
        let request = json!({how: command, "arguments": arguments, "id": self.1});
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        self.1
    }

    fn reply(&mut self, id: u32) -> Result<Value, String> {
        loop {
            let mut message = self.next();
            if message["id"] == id {
                let failed = message["error"]["desc"].as_str().map(String::from);
                return failed.map_or_else(|| Ok(message["return"].take()), Err);
            }
        }
    }

    fn run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let id = self.send("execute", command, arguments);
        self.reply(id)
    }

    /// The same, cut off by a yank of `n` that comes soon after it.
    fn run_yanked(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let id = self.send("execute", command, arguments);
        std::thread::sleep(Duration::from_millis(300));
        self.send("exec-oob", "yank", json!({"instances": [{"type": "block-node", "node-name": "n"}]}));
        self.reply(id)
    }

    fn add(vm: &Vm, name: &str, delay: u32) -> Value {
        json!({"driver": "nbd", "node-name": "n", "reconnect-delay": delay,
               "server": {"type": "unix", "path": vm.path(name)}})
    }

    /// Reads 4 KiB, which should be sevens, as the monitor's `qemu-io` does: what that prints first. With
    /// `yank` it is cut off.
    fn read(&mut self, vm: &Vm, yank: bool) -> String {
        let before = vm.output().len();
        let line = json!({"command-line": "qemu-io n \"read -P 7 0 4k\""});
        let said = match yank {
            true => self.run_yanked("human-monitor-command", line),
            false => self.run("human-monitor-command", line),
        };
        assert_eq!(said.unwrap(), "");
        let begin = Instant::now();
        loop {
            let said = vm.output()[before..].to_string();
            if said.ends_with('\n') && (said.contains(" ops;") || said.contains("failed")) {
                return said.lines().next().unwrap().to_string();
            }
            assert!(begin.elapsed() < LIMIT, "{said}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn start() -> (Vm, Client) {
    let vm = Vm::start_in(Dir::new(), "[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
    let client = Client::new(&vm);
    (vm, client)
}

/// The most memory that it ever had, in KiB.
fn peak(vm: &Vm) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Far less than what is sent in a second, or what a length can say.
const MEMORY: u64 = 100 << 10;

#[test]
fn handshakes_that_make_no_sense_are_errors() {
    type Attack = fn(&mut Line) -> io::Result<()>;
    let cases: &[(&str, Attack)] = &[
        ("end", |_| Ok(())),
        ("rubbish", |l| l.put(&[0xee; 500])),
        ("oldstyle", |l| l.put(&[&INIT_MAGIC.to_be_bytes()[..], &[0; 144]].concat())),
        ("cut", |l| l.put(&INIT_MAGIC.to_be_bytes()[..5])),
        ("other-option", |l| {
            l.greet()?;
            l.option()?;
            l.reply(opt::LIST, rep::ACK, &[])
        }),
        ("endless-reply", |l| {
            l.greet()?;
            let option = l.option()?;
            let head = [
                REP_MAGIC.to_be_bytes().to_vec(),
                [option, rep::ACK, u32::MAX].map(u32::to_be_bytes).concat(),
            ];
            l.put(&head.concat())?;
            loop {
                l.put(&[1; 65536])?;
            }
        }),
        ("long-text", |l| {
            l.until_go()?;
            l.reply(opt::GO, rep::ERR_POLICY, &[b'\n'; 65537])
        }),
        ("nothing", |l| l.until_go().and_then(|()| l.go(&[]))),
        ("empty-info", |l| l.until_go().and_then(|()| l.go(&[vec![]]))),
        ("short-info", |l| l.until_go().and_then(|()| l.go(&[export(SIZE)[..9].to_vec()]))),
        ("rubbish-info", |l| l.until_go().and_then(|()| l.go(&[vec![0xff; 60000]]))),
        ("block-0", |l| l.until_go().and_then(|()| l.go(&[export(SIZE), blocks(0, 4096, 1 << 20)]))),
        ("block-3", |l| l.until_go().and_then(|()| l.go(&[export(SIZE), blocks(3, 4096, 1 << 20)]))),
        ("block-large", |l| l.until_go().and_then(|()| l.go(&[export(SIZE), blocks(1 << 31, 0, u32::MAX)]))),
        ("block-max", |l| l.until_go().and_then(|()| l.go(&[export(SIZE), blocks(4096, 4096, 512)]))),
        ("size-odd", |l| l.until_go().and_then(|()| l.go(&[export(SIZE + 1), blocks(512, 4096, 1 << 20)]))),
        ("size-2^63", |l| l.until_go().and_then(|()| l.go(&[export(1 << 63)]))),
        ("size-max", |l| l.until_go().and_then(|()| l.go(&[export(u64::MAX)]))),
        ("other-context", |l| {
            l.greet()?;
            l.option()?;
            l.reply(opt::STRUCTURED_REPLY, rep::ACK, &[])?;
            l.option()?;
            l.reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, b"\0\0\0\x01other:context")
        }),
    ];
    let (vm, mut client) = start();
    for (name, attack) in cases {
        listen(&vm.path(name), |l, _| attack(l));
        let e = client.run("blockdev-add", Client::add(&vm, name, 0)).expect_err(name);
        assert!(e.len() < 1000, "{name}: {e}");
    }
    // These would take as long as a handshake may.
    let slow: &[(&str, Attack)] = &[
        ("mute", |l| l.option().map(drop)),
        ("drip", |l| {
            loop {
                l.put(&INIT_MAGIC.to_be_bytes()[..1])?;
                std::thread::sleep(Duration::from_millis(50));
            }
        }),
        ("infos", |l| {
            l.until_go()?;
            let many = [0xff; 60000];
            loop {
                l.reply(opt::GO, rep::INFO, &many)?;
            }
        }),
    ];
    for (name, attack) in slow {
        listen(&vm.path(name), |l, _| attack(l));
        client.run_yanked("blockdev-add", Client::add(&vm, name, 0)).expect_err(name);
    }
    assert!(peak(&vm) < MEMORY, "{} KiB", peak(&vm));
}

#[test]
fn strange_disks_are_as_they_are() {
    type Good = fn() -> Vec<Vec<u8>>;
    const MOST: u64 = i64::MAX as u64 - (1 << 32);
    let cases: &[(&str, u64, Good)] = &[
        ("empty", 0, || vec![export(0)]),
        ("odd", 5000, || vec![export(5000)]),
        ("huge", MOST, || vec![export(MOST)]),
        ("preferred-3", SIZE, || vec![export(SIZE), blocks(1, 3, u32::MAX)]),
        ("preferred-0", SIZE, || vec![blocks(512, 0, 512), export(SIZE)]),
        ("preferred-max", SIZE, || vec![export(SIZE), blocks(4096, u32::MAX, 4096)]),
        ("again", SIZE, || vec![export(77), export(SIZE), vec![0, 2, 9], vec![0xff; 9]]),
    ];
    let (vm, mut client) = start();
    for (name, size, infos) in cases {
        listen(&vm.path(name), |l, _| {
            l.until_go()?;
            l.go(&infos())?;
            l.serve(true)
        });
        client.run("blockdev-add", Client::add(&vm, name, 0)).unwrap();
        let raw = json!({"driver": "raw", "node-name": "r", "file": "n"});
        client.run("blockdev-add", raw).unwrap();
        let nodes = client.run("query-named-block-nodes", json!({"flat": true})).unwrap();
        let n = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "n").unwrap();
        assert_eq!(n["image"]["virtual-size"], size.next_multiple_of(512), "{name}");
        assert_eq!(client.read(&vm, false), if *size > 0 { GOOD } else { EIO }, "{name}");
        client.run("blockdev-del", json!({"node-name": "r"})).unwrap();
        client.run("blockdev-del", json!({"node-name": "n"})).unwrap();
    }
}

/// What a server does with a read.
type Answer = fn(&mut Line, &Request) -> io::Result<()>;

/// Ends the connection.
const BROKEN: &[(&str, bool, Answer)] = &[
    ("end", false, |_, _| Ok(())),
    ("other-cookie", false, |l, r| l.put(&simple_reply(r.cookie + 1, 0))),
    ("slot-of-another", false, |l, r| l.put(&simple_reply(r.cookie + 64, 5))),
    ("no-cookie", false, |l, _| l.put(&simple_reply(0, 0))),
    ("magic", false, |l, r| l.put(&[&[0xff], &simple_reply(r.cookie, 0)[1..]].concat())),
    ("half-a-head", false, |l, r| l.put(&simple_reply(r.cookie, 0)[..9])),
    ("half-the-data", false, |l, r| l.put(&[&simple_reply(r.cookie, 0)[..], &[7; 2000]].concat())),
    ("chunk", false, |l, r| l.put(&data(r, 0, &[7; 4096], chunk::DONE))),
    ("half-a-chunk", true, |l, r| l.put(&data(r, 0, &[7; 4096], chunk::DONE)[..1000])),
    ("long-chunk", true, |l, r| {
        l.put(&chunk_head(r.cookie, chunk::DONE, chunk::OFFSET_DATA, u32::MAX))?;
        l.put(&[0; 65536])
    }),
    ("empty-chunk", true, |l, r| l.put(&chunk_head(r.cookie, chunk::DONE, chunk::OFFSET_DATA, 8))),
    ("a-byte-more", true, |l, r| l.put(&data(r, 0, &[7; 4097], chunk::DONE))),
    ("a-byte-less", true, |l, r| l.put(&data(r, 0, &[7; 4095], chunk::DONE))),
    ("before", true, |l, r| l.put(&data(r, u64::MAX, &[7; 4096], chunk::DONE))),
    ("behind", true, |l, r| l.put(&data(r, u64::MAX / 2, &[7; 4096], chunk::DONE))),
    ("twice", true, |l, r| l.put(&[data(r, 0, &[7; 4096], 0), data(r, 4095, &[7; 1], 1)].concat())),
    ("long-hole", true, |l, r| l.put(&hole(r, 0, u32::MAX))),
    ("far-hole", true, |l, r| l.put(&hole(r, u64::MAX - 10, 4096))),
    ("short-hole", true, |l, r| l.put(&chunk_head(r.cookie, chunk::DONE, chunk::OFFSET_HOLE, 11))),
    ("no-data", true, |l, r| l.put(&chunk_head(r.cookie, chunk::DONE, chunk::NONE, 0))),
    ("unknown", true, |l, r| l.put(&chunk_head(r.cookie, chunk::DONE, 77, 1 << 30))),
    ("status", true, |l, r| {
        let head = chunk_head(r.cookie, chunk::DONE, chunk::BLOCK_STATUS, 12);
        l.put(&[&head[..], &[9u32, 4096, 0].map(u32::to_be_bytes).concat()].concat())
    }),
    ("simple", true, |l, r| l.put(&[&simple_reply(r.cookie, 0)[..], &[7; 4096]].concat())),
    ("long-text", true, |l, r| l.put(&error(r, 5, u16::MAX, 1 << 20, chunk::DONE))),
    ("text-too-long", true, |l, r| l.put(&error(r, 5, 100, 20, chunk::DONE))),
    ("error-0", true, |l, r| l.put(&error(r, 0, 0, 0, chunk::DONE))),
];

#[test]
fn replies_that_make_no_sense_are_io_errors_or_end_with_another_connection() {
    let (vm, mut client) = start();
    for &(name, chunks, answer) in BROKEN {
        // Always, and only in the first connection.
        for good in [false, true] {
            let path = format!("{name}-{good}");
            listen(&vm.path(&path), move |l, n| {
                l.shake(chunks)?;
                if good && n > 0 {
                    return l.serve(chunks);
                }
                let r = l.request()?;
                answer(l, &r)
            });
            let delay = if good { 60 } else { 0 };
            client.run("blockdev-add", Client::add(&vm, &path, delay)).unwrap();
            for _ in 0..2 {
                assert_eq!(client.read(&vm, false), if good { GOOD } else { EIO }, "{name}");
            }
            client.run("blockdev-del", json!({"node-name": "n"})).unwrap();
        }
    }
    assert!(peak(&vm) < MEMORY, "{} KiB", peak(&vm));
}

#[test]
fn errors_are_passed_on_and_the_connection_stays() {
    let cases: &[(&str, Answer, &str)] = &[
        ("simple", |l, r| l.put(&simple_reply(r.cookie, 28)), "No space left on device"),
        ("text", |l, r| l.put(&error(r, 5, 4096, 4096, chunk::DONE)), "Input/output error"),
        ("unknown", |l, r| l.put(&error(r, u32::MAX, 0, 0, chunk::DONE)), "Invalid argument"),
        (
            "late",
            |l, r| l.put(&[data(r, 0, &[7; 100], 0), error(r, 1, 3, 9, 0), error(r, 28, 0, 0, 1)].concat()),
            "Operation not permitted",
        ),
    ];
    let (vm, mut client) = start();
    for (name, answer, want) in cases {
        listen(&vm.path(name), |l, n| {
            assert_eq!(n, 0);
            l.shake(true)?;
            let r = l.request()?;
            answer(l, &r)?;
            l.serve(true)
        });
        client.run("blockdev-add", Client::add(&vm, name, 0)).unwrap();
        assert_eq!(client.read(&vm, false), format!("read failed: {want}"), "{name}");
        assert_eq!(client.read(&vm, false), GOOD, "{name}");
        client.run("blockdev-del", json!({"node-name": "n"})).unwrap();
    }
}

#[test]
fn replies_without_an_end_are_let_go_by_a_yank() {
    let cases: &[(&str, Answer)] = &[
        ("mute", |l, _| l.request().map(drop)),
        ("half-a-head", |l, r| {
            l.put(&chunk_head(r.cookie, chunk::DONE, chunk::OFFSET_DATA, 4104)[..11])?;
            l.request().map(drop)
        }),
        ("drip", |l, r| {
            for byte in data(r, 0, &[7; 4096], chunk::DONE) {
                l.put(&[byte])?;
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        }),
        ("flood", |l, r| {
            let errors = error(r, 5, 4000, 4000, 0).repeat(20);
            loop {
                l.put(&errors)?;
            }
        }),
    ];
    let (vm, mut client) = start();
    // One that does not even listen.
    listen(&vm.path("deaf"), |l, _| {
        l.until_go()?;
        l.go(&[export(64 << 20)])?;
        std::thread::sleep(LIMIT);
        Ok(())
    });
    client.run("blockdev-add", Client::add(&vm, "deaf", 3600)).unwrap();
    let line = json!({"command-line": "qemu-io n \"write -P 7 0 32M\""});
    assert_eq!(client.run_yanked("human-monitor-command", line).unwrap(), "");
    vm.wait_output("write failed: Input/output error");
    client.run("blockdev-del", json!({"node-name": "n"})).unwrap();
    for (name, answer) in cases {
        listen(&vm.path(name), |l, _| {
            l.shake(true)?;
            let r = l.request()?;
            answer(l, &r)
        });
        client.run("blockdev-add", Client::add(&vm, name, 3600)).unwrap();
        assert_eq!(client.read(&vm, true), EIO, "{name}");
        client.run("blockdev-del", json!({"node-name": "n"})).unwrap();
    }
    assert!(peak(&vm) < MEMORY, "{} KiB", peak(&vm));
}

#[test]
fn a_server_that_comes_back_with_another_disk_is_not_believed() {
    type Other = fn(&mut Line) -> io::Result<()>;
    let cases: &[(&str, Other)] = &[
        ("shorter", |l| l.until_go().and_then(|()| l.go(&[export(SIZE / 2)]))),
        ("longer", |l| l.until_go().and_then(|()| l.go(&[export(SIZE * 2)]))),
        ("blocks", |l| l.until_go().and_then(|()| l.go(&[export(SIZE), blocks(4096, 4096, 1 << 20)]))),
        ("payload", |l| l.until_go().and_then(|()| l.go(&[export(SIZE), blocks(1, 512, 2048)]))),
        ("read-only", |l| {
            let mut info = export(SIZE);
            info[11] |= flag::READ_ONLY as u8;
            l.until_go().and_then(|()| l.go(&[info]))
        }),
        ("no-flush", |l| {
            let mut info = export(SIZE);
            info[11] &= !(flag::SEND_FLUSH as u8);
            l.until_go().and_then(|()| l.go(&[info]))
        }),
        ("no-chunks", |l| l.shake(false)),
    ];
    let (vm, mut client) = start();
    for (name, other) in cases {
        listen(&vm.path(name), |l, n| match n {
            0 => l.shake(true).and_then(|()| l.request().map(drop)),
            1 => {
                other(l)?;
                let r = l.request()?;
                l.put(&data(&r, 0, &vec![8; r.len as usize], chunk::DONE))
            }
            _ => l.shake(true).and_then(|()| l.serve(true)),
        });
        client.run("blockdev-add", Client::add(&vm, name, 0)).unwrap();
        let begin = Instant::now();
        loop {
            match client.read(&vm, false) {
                said if said == GOOD => break,
                said => assert_eq!(said, EIO, "{name}"),
            }
            assert!(begin.elapsed() < LIMIT, "{name}");
        }
        client.run("blockdev-del", json!({"node-name": "n"})).unwrap();
    }
}

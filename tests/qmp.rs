//! Golden dialogues: the files of `fixtures/qmp` played against the real program, and what a dialogue cannot show.
//!
//! A dialogue is lines of text:
//!
//! ```text
//! # a comment
//! = paused = false                    a line of the configuration, after [machine] accel = "none", memory = "16M"
//! file a.txt some text                makes @DIR/a.txt before the start
//! -> {"execute": "stop"}              sends a request; lines that begin with a blank go on with it
//! -> r:@DIR/a.txt {"execute": …}      the same with file descriptors: r:, w: or rw: and a path
//! ~> {"execute":\xff\n                sends bytes as they are
//! <- {"return": {}}                   the next message must be this
//! nothing 100                         for so many milliseconds nothing comes
//! connect B qmp2                      connects B to the socket @DIR/qmp2; without it a name connects to @DIR/qmp
//! B-> …   B<- …   B nothing 100       the same on connection B
//! close B, half B                     closes it, or only its sending direction
//! closed, exit 0                      the server hangs up; the program ends
//! ```
//!
//! In `<-`: `"@INT"`, `"@STR"`, `"@BOOL"`, `"@ANY"` match any value of the type; `"@INT:x"` also remembers it as x, and it is put
//! where `"@INT:x"` is sent or expected later. `"..."` in an array stands for any other elements (then the order is free), as a
//! member's name for any other members.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, LIMIT, Vm, fixtures};
use minivmm::sys::unix;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

struct Line {
    stream: UnixStream,
    got: Vec<u8>,
}

impl Line {
    fn connect(path: &Path) -> Line {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Line { stream, got: Vec::new() },
                Err(e) if start.elapsed() > LIMIT => panic!("{}: {e}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// The next message within `limit`; `Err(true)` when the server has hung up.
    fn next(&mut self, limit: Duration) -> Result<Value, bool> {
        let start = Instant::now();
        loop {
            if let Some(end) = self.got.windows(2).position(|w| w == b"\r\n") {
                let line: Vec<u8> = self.got.drain(..end + 2).collect();
                return Ok(serde_json::from_slice(&line).expect("not JSON"));
            }
            let left = limit.checked_sub(start.elapsed()).filter(|d| !d.is_zero()).ok_or(false)?;
            self.stream.set_read_timeout(Some(left)).unwrap();
            let mut buf = [0; 65536];
            match self.stream.read(&mut buf) {
                Ok(0) => return Err(true),
                Ok(n) => self.got.extend_from_slice(&buf[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Err(true),
                Err(e) => panic!("{e}"),
            }
        }
    }
}

struct Player {
    vm: Vm,
    dir: String,
    lines: HashMap<String, Line>,
    names: HashMap<String, Value>,
}

fn matches(want: &Value, got: &Value, names: &mut HashMap<String, Value>) -> bool {
    match (want, got) {
        (Value::String(s), _) if s.starts_with('@') => {
            let (kind, name) = s.split_once(':').map_or((s.as_str(), None), |(k, n)| (k, Some(n)));
            let fits = match kind {
                "@INT" => got.is_i64() || got.is_u64(),
                "@STR" => got.is_string(),
                "@BOOL" => got.is_boolean(),
                "@ANY" => true,
                _ => panic!("what is {s}?"),
            };
            match name {
                Some(name) if fits => names.entry(name.to_string()).or_insert_with(|| got.clone()) == got,
                _ => fits,
            }
        }
        (Value::Array(w), Value::Array(g)) if w.contains(&json!("...")) => {
            let wanted = w.iter().filter(|v| **v != "...");
            let mut left: Vec<&Value> = g.iter().collect();
            wanted.into_iter().all(|w| {
                let at = left.iter().position(|g| {
                    // What an element that does not match has made us remember does not count.
                    let mut trial = names.clone();
                    let ok = matches(w, g, &mut trial);
                    ok.then(|| *names = trial).is_some()
                });
                at.map(|at| left.remove(at)).is_some()
            })
        }
        (Value::Array(w), Value::Array(g)) => {
            w.len() == g.len() && w.iter().zip(g).all(|(w, g)| matches(w, g, names))
        }
        (Value::Object(w), Value::Object(g)) => {
            let open = w.contains_key("...");
            w.iter().filter(|(k, _)| *k != "...").all(|(k, w)| g.get(k).is_some_and(|g| matches(w, g, names)))
                && (open || g.len() == w.len())
        }
        _ => want == got,
    }
}

/// Puts in what is remembered.
fn fill(v: &mut Value, names: &HashMap<String, Value>) {
    match v {
        Value::String(s) if s.starts_with('@') => {
            if let Some(known) = s.split_once(':').and_then(|(_, name)| names.get(name)) {
                *v = known.clone();
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|v| fill(v, names)),
        Value::Object(map) => map.values_mut().for_each(|v| fill(v, names)),
        _ => {}
    }
}

fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.extend(c.to_string().bytes());
            continue;
        }
        match chars.next() {
            Some('n') => out.push(b'\n'),
            Some('t') => out.push(b'\t'),
            Some('r') => out.push(b'\r'),
            Some('x') => {
                let hex: String = chars.by_ref().take(2).collect();
                out.push(u8::from_str_radix(&hex, 16).expect("\\xNN"));
            }
            // A backslash for JSON.
            Some(c) => out.extend(format!("\\{c}").bytes()),
            None => out.push(b'\\'),
        }
    }
    out
}

impl Player {
    fn line(&mut self, name: &str) -> &mut Line {
        let path = self.vm.path("qmp");
        self.lines.entry(name.to_string()).or_insert_with(|| Line::connect(&path))
    }

    fn send(&mut self, name: &str, mut text: &str) {
        let mut files: Vec<File> = Vec::new();
        while !text.starts_with('{') {
            let (word, rest) = text.split_once(' ').expect("a request after the descriptors");
            let (mode, path) = word.split_once(':').expect("r:PATH");
            let file = OpenOptions::new().read(mode.contains('r')).write(mode.contains('w')).open(path);
            files.push(file.unwrap_or_else(|e| panic!("{path}: {e}")));
            text = rest.trim_start();
        }
        // Only JSON that names something is written anew: the others are sent as they stand.
        let mut text = text.to_string();
        if text.contains("\"@INT:") {
            let mut request: Value = serde_json::from_str(&text).expect("not JSON");
            fill(&mut request, &self.names);
            text = request.to_string();
        }
        text.push('\n');
        let fds: Vec<BorrowedFd> = files.iter().map(File::as_fd).collect();
        let stream = &mut self.line(name).stream;
        let sent = unix::send_fds(stream.as_fd(), text.as_bytes(), &fds).unwrap();
        stream.write_all(&text.as_bytes()[sent..]).unwrap();
    }

    fn step(&mut self, text: &str) {
        let (name, rest) = match text.split_at_checked(1) {
            Some((n, rest)) if n.starts_with(|c: char| c.is_ascii_uppercase()) => (n, rest.trim_start()),
            _ => ("A", text),
        };
        if let Some(text) = rest.strip_prefix("-> ") {
            self.send(name, text);
        } else if let Some(text) = rest.strip_prefix("~> ") {
            self.line(name).stream.write_all(&unescape(text)).unwrap();
        } else if let Some(want) = rest.strip_prefix("<- ") {
            let want: Value = serde_json::from_str(want).unwrap_or_else(|e| panic!("{e}"));
            let got = self.line(name).next(LIMIT).unwrap_or_else(|end| {
                panic!("nothing came{}", if end { ": the server has hung up" } else { "" })
            });
            let shown: String = got.to_string().chars().take(2000).collect();
            assert!(matches(&want, &got, &mut self.names), "got {shown}");
        } else if let Some(ms) = rest.strip_prefix("nothing ") {
            let got = self.line(name).next(Duration::from_millis(ms.parse().unwrap()));
            assert_eq!(got, Err(false), "something came");
        } else if let Some(rest) = rest.strip_prefix("connect ") {
            let (name, socket) = rest.split_once(' ').unwrap();
            self.lines.insert(name.to_string(), Line::connect(&self.vm.path(socket)));
        } else if let Some(name) = rest.strip_prefix("close ") {
            assert!(self.lines.remove(name).is_some(), "{name} is not connected");
        } else if let Some(name) = rest.strip_prefix("half ") {
            self.line(name).stream.shutdown(std::net::Shutdown::Write).unwrap();
        } else if rest == "closed" {
            assert_eq!(self.line(name).next(LIMIT), Err(true), "the server has not hung up");
        } else if let Some(code) = rest.strip_prefix("exit ") {
            self.vm.wait_exit(code.parse().unwrap());
        } else {
            panic!("not a line of a dialogue");
        }
    }
}

fn play(path: &Path) {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let text = fs::read_to_string(path).unwrap();
    let dir = Dir::new();
    let at = dir.join("").display().to_string();
    let at = at.trim_end_matches('/').to_string();
    let text = text.replace("@DIR", &at);
    // A line that begins with a blank goes on with the one before.
    let mut steps: Vec<(usize, String)> = Vec::new();
    let mut config = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n".to_string();
    for (n, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        } else if let Some(toml) = line.strip_prefix("= ") {
            config += toml;
            config.push('\n');
        } else if let Some((file, data)) = line.strip_prefix("file ").and_then(|l| l.split_once(' ')) {
            fs::write(dir.join(file), data).unwrap();
        } else if let Some(last) = steps.last_mut().filter(|_| line.starts_with([' ', '\t'])) {
            last.1.push('\n');
            last.1 += line;
        } else {
            steps.push((n + 1, line.to_string()));
        }
    }
    let vm = Vm::start_in(dir, &config);
    let mut player = Player { vm, dir: at, lines: HashMap::new(), names: HashMap::new() };
    for (n, step) in steps {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| player.step(&step)));
        if let Err(why) = result {
            let why = why
                .downcast_ref::<String>()
                .cloned()
                .or(why.downcast_ref::<&str>().map(|s| s.to_string()))
                .unwrap_or_default();
            panic!("{name}:{n}: {step}\n  {why}\n  messages: {}\n  in {}", player.vm.messages(), player.dir);
        }
    }
}

#[test]
fn dialogues() {
    let mut files: Vec<_> =
        fs::read_dir(fixtures().join("qmp")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.retain(|f| f.extension().is_some_and(|e| e == "txt"));
    assert!(!files.is_empty());
    let failed: Vec<String> = files
        .iter()
        .filter_map(|f| std::panic::catch_unwind(|| play(f)).err())
        .map(|why| why.downcast_ref::<String>().cloned().unwrap_or_default())
        .collect();
    assert!(failed.is_empty(), "{} of {} dialogues:\n{}", failed.len(), files.len(), failed.join("\n"));
}

/// The descriptors of a process: number and what it is.
fn descriptors(pid: u32) -> Vec<(String, String)> {
    let mut list: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| {
            let target = fs::read_link(e.path()).map(|p| p.display().to_string()).unwrap_or_default();
            (e.file_name().to_string_lossy().into_owned(), target)
        })
        .collect();
    list.sort();
    list
}

/// Processor time of a process, in clock ticks (1/100 s).
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Without descriptors nobody can be let in: the server waits for better times, and does not spin.
#[test]
fn a_client_that_cannot_be_let_in_waits() {
    let vm = Vm::start("[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
    drop(vm.qmp());
    let limit = |n: usize| {
        kit::run("prlimit", &["--pid", &vm.pid().to_string(), &format!("--nofile={n}:1024")]);
    };
    // The client that has just gone may still be open there.
    std::thread::sleep(Duration::from_millis(100));
    let open: Vec<usize> = descriptors(vm.pid()).iter().map(|d| d.0.parse().unwrap()).collect();
    limit((0..).find(|n| !open.contains(n)).unwrap());
    let mut line = Line::connect(&vm.path("qmp"));
    assert_eq!(line.next(Duration::from_millis(200)), Err(false), "it was let in");
    let before = ticks(vm.pid());
    assert_eq!(line.next(Duration::from_secs(1)), Err(false));
    assert!(ticks(vm.pid()) - before < 5, "it spins");
    limit(1024);
    assert!(line.next(LIMIT).unwrap()["QMP"].is_object());
}

/// 100,000 rounds of use and of abrupt disconnects under `just soak`; fewer otherwise.
#[test]
fn no_descriptor_leaks() {
    let rounds = if std::env::var_os("SOAK").is_some() { 100_000 } else { 3_000 };
    let vm = Vm::start("[machine]\naccel = \"none\"\nmemory = \"16M\"\npaused = true\n");
    let path = vm.path("qmp");
    let files: Vec<File> = (0..3).map(|_| File::open("/dev/null").unwrap()).collect();
    let fds: Vec<BorrowedFd> = files.iter().map(File::as_fd).collect();
    let connect = || {
        let mut line = Line::connect(&path);
        assert!(line.next(LIMIT).unwrap()["QMP"].is_object());
        line.stream.write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
        assert_eq!(line.next(LIMIT), Ok(json!({"return": {}})));
        line
    };
    let mut line = connect();
    let before = descriptors(vm.pid());
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for round in 0..rounds {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let some = &fds[..1 + (state >> 8) as usize % 3];
        let send = |line: &Line, text: &str, fds: &[BorrowedFd]| {
            let _ = unix::send_fds(line.stream.as_fd(), text.as_bytes(), fds);
        };
        match state % 8 {
            // Named, replaced, closed.
            0 | 1 => {
                send(&line, r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#, some);
                send(&line, r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#, some);
                send(&line, r#"{"execute":"closefd","arguments":{"fdname":"x"}}"#, &[]);
                for _ in 0..3 {
                    assert_eq!(line.next(LIMIT), Ok(json!({"return": {}})), "round {round}");
                }
            }
            // In a set, and out of it.
            2 | 3 => {
                send(&line, r#"{"execute":"add-fd","arguments":{"fdset-id":1,"opaque":"x"}}"#, some);
                send(&line, r#"{"execute":"add-fd","arguments":{"fdset-id":1}}"#, some);
                send(&line, r#"{"execute":"remove-fd","arguments":{"fdset-id":1}}"#, &[]);
                let first = line.next(LIMIT).unwrap();
                assert!(first["return"]["fd"].is_u64(), "round {round}: {first}");
                assert!(line.next(LIMIT).is_ok() && line.next(LIMIT) == Ok(json!({"return": {}})));
            }
            // Rejected by the handler, or before it.
            4 => {
                send(&line, r#"{"execute":"getfd","arguments":{"fdname":"1"}}"#, some);
                send(&line, r#"{"execute":"add-fd","arguments":{"fdset-id":-1}}"#, some);
                send(&line, r#"{"execute":"add-fd","arguments":{"bogus":-1}}"#, some);
                for _ in 0..3 {
                    assert!(line.next(LIMIT).unwrap()["error"].is_object(), "round {round}");
                }
            }
            // Abrupt ends: unused ones, in half a request, with replies that nobody reads.
            n => {
                let text = [
                    r#"{"execute":"query-status"}"#,
                    r#"{"execute":"getf"#,
                    r#" {"execute":"query-qmp-schema"}"#,
                ];
                send(&line, text[n as usize - 5], some);
                drop(line);
                line = connect();
            }
        }
    }
    // What the last requests brought waits for a command; the end of the client closes it.
    drop(line);
    let line = connect();
    let after = descriptors(vm.pid());
    assert_eq!(after.len(), before.len(), "after {rounds} rounds:\n{before:#?}\n{after:#?}");
    drop(line);
}

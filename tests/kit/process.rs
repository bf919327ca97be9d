//! What the tests that run the real binary share: a directory of their own, a process with its
//! output, a blocking QMP client. Everything has a time limit; nothing outlives its test.
#![allow(dead_code)] // each test program uses a part

use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long anything may take on a slow and busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The binary under test.
pub const MINIVMM: &str = env!("CARGO_BIN_EXE_minivmm");

/// The directory of fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The tiny guest.
pub fn guest() -> PathBuf {
    fixtures().join("guest/guest.elf")
}

/// Says that a test is skipped for want of `what`; under CI=true that is a failure.
pub fn skip(what: &str, remedy: &str) {
    if std::env::var("CI").is_ok_and(|v| v == "true") {
        panic!("{what} is missing, and this is CI: {remedy}");
    }
    eprintln!("skipped: {what} is missing: {remedy}");
}

/// Is /dev/kvm usable? Says so if not.
pub fn have_kvm() -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(e) => {
            skip(
                &format!("/dev/kvm ({e})"),
                "load the kvm module; join the group kvm: usermod -aG kvm $USER",
            );
            false
        }
    }
}

/// Is `tool` in the PATH? Says so if not.
pub fn have(tool: &str, package: &str) -> bool {
    let found =
        Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        skip(tool, &format!("apt-get install {package}"));
    }
    found
}

/// Runs a tool and returns what it prints; panics with its messages when it fails.
pub fn run(tool: &str, args: &[&str]) -> String {
    let out = Command::new(tool).args(args).output().unwrap_or_else(|e| panic!("{tool}: {e}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// A directory that goes with its owner.
pub struct Dir(PathBuf);

impl Dir {
    /// A new one.
    pub fn new() -> Dir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("minivmm-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Dir(path)
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Bytes, and whether they have ended.
type Collected = (Vec<u8>, bool);

/// What a process has written so far, filled by a thread.
#[derive(Clone, Default)]
struct Output(Arc<(Mutex<Collected>, Condvar)>);

impl Output {
    fn collect(mut from: impl Read + Send + 'static) -> Output {
        let output = Output::default();
        let to = output.clone();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            loop {
                let n = from.read(&mut buf).unwrap_or(0);
                let mut state = to.0.0.lock().unwrap();
                state.0.extend(&buf[..n]);
                state.1 = n == 0;
                to.0.1.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        output
    }

    /// Waits until `done` says yes to the output, or it ends, or time is over; the output.
    fn wait(&self, limit: Duration, done: impl Fn(&[u8]) -> bool) -> (Vec<u8>, bool) {
        let state = self.0.0.lock().unwrap();
        let waiting = |s: &mut Collected| !s.1 && !done(&s.0);
        let state = self.0.1.wait_timeout_while(state, limit, waiting).unwrap().0;
        let ok = done(&state.0);
        (state.0.clone(), ok)
    }
}

/// A running minivmm.
pub struct Vm {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Output,
    stderr: Output,
    dir: Dir,
}

impl Vm {
    /// Runs minivmm on a configuration. In it `@DIR` is a directory of the test's own and `@GUEST`
    /// the tiny guest. A QMP monitor for [`Vm::qmp`] is added.
    pub fn start(config: &str) -> Vm {
        Vm::start_in(Dir::new(), config)
    }

    /// The same in a directory that the test has filled.
    pub fn start_in(dir: Dir, config: &str) -> Vm {
        let mut text =
            config.replace("@DIR", dir.0.to_str().unwrap()).replace("@GUEST", guest().to_str().unwrap());
        text.push_str(&format!("\n[[qmp]]\nsocket = {:?}\n", dir.join("qmp")));
        let path = dir.join("config.toml");
        std::fs::write(&path, text).unwrap();
        let mut command = Command::new(MINIVMM);
        command.arg(path);
        Vm::spawn(dir, command)
    }

    /// Runs any command line.
    pub fn spawn(dir: Dir, mut command: Command) -> Vm {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let stdout = Output::collect(child.stdout.take().unwrap());
        let stderr = Output::collect(child.stderr.take().unwrap());
        Vm { stdin: child.stdin.take(), child, stdout, stderr, dir }
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory, for another process after this one has ended.
    pub fn take_dir(&mut self) -> Dir {
        std::mem::replace(&mut self.dir, Dir::new())
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Standard output so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.stdout.wait(Duration::ZERO, |_| true).0).into_owned()
    }

    /// Standard error so far.
    pub fn messages(&self) -> String {
        String::from_utf8_lossy(&self.stderr.wait(Duration::ZERO, |_| true).0).into_owned()
    }

    /// Waits until standard output contains `text`; all of the output.
    pub fn wait_output(&self, text: &str) -> String {
        let has = |out: &[u8]| out.windows(text.len()).any(|w| w == text.as_bytes());
        let (out, ok) = self.stdout.wait(LIMIT, has);
        let out = String::from_utf8_lossy(&out).into_owned();
        assert!(ok, "no '{text}' in the output:\n{out}\nmessages:\n{}", self.messages());
        out
    }

    /// Types on standard input.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input is closed");
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }

    /// Ends standard input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        run("kill", &[&format!("-{signal}"), &self.pid().to_string()]);
    }

    /// Waits for the end; the exit status and all of standard output and standard error.
    pub fn wait(&mut self) -> (ExitStatus, String, String) {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > LIMIT => {
                    panic!("minivmm does not end; output:\n{}\nmessages:\n{}", self.output(), self.messages())
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let out = self.stdout.wait(LIMIT, |_| false).0;
        let err = self.stderr.wait(LIMIT, |_| false).0;
        let text = |v: Vec<u8>| String::from_utf8_lossy(&v).into_owned();
        (status, text(out), text(err))
    }

    /// Waits for the end, which must be with exit status `code`; standard output.
    pub fn wait_exit(&mut self, code: i32) -> String {
        let (status, out, err) = self.wait();
        let how = (status.code(), status.signal());
        assert_eq!(how, (Some(code), None), "output:\n{out}\nmessages:\n{err}");
        out
    }

    /// A QMP session on the monitor that [`Vm::start`] added, negotiated.
    pub fn qmp(&self) -> Qmp {
        let path = self.path("qmp");
        let start = Instant::now();
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return Qmp::new(stream),
                Err(e) if start.elapsed() > LIMIT => {
                    panic!("{}: {e}; messages:\n{}", path.display(), self.messages())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A QMP client.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// What the server said first.
    pub greeting: Value,
}

impl Qmp {
    /// Takes the greeting and leaves negotiation mode.
    pub fn new(stream: UnixStream) -> Qmp {
        let mut qmp = Qmp::raw(stream);
        qmp.ok("qmp_capabilities", json!({}));
        qmp
    }

    /// Takes the greeting only.
    pub fn raw(stream: UnixStream) -> Qmp {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Qmp { reader: BufReader::new(stream), events: VecDeque::new(), greeting: Value::Null };
        qmp.greeting = qmp.receive();
        assert!(qmp.greeting["QMP"].is_object(), "greeting: {}", qmp.greeting);
        qmp
    }

    /// The next message, whatever it is.
    pub fn receive(&mut self) -> Value {
        let mut line = String::new();
        let n = self.reader.read_line(&mut line).unwrap_or_else(|e| panic!("QMP: {e}"));
        assert!(n > 0, "QMP: the server has hung up");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP: {e}: {line}"))
    }

    /// Sends a request; its return value or error object. Events are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let mut request = Map::new();
        request.insert("execute".to_string(), json!(command));
        if arguments.as_object().is_some_and(|a| !a.is_empty()) {
            request.insert("arguments".to_string(), arguments);
        }
        let mut line = serde_json::to_vec(&request).unwrap();
        line.push(b'\n');
        self.reader.get_mut().write_all(&line).unwrap();
        loop {
            let mut message = self.receive();
            if message["event"].is_string() {
                self.events.push_back(message);
            } else if message["error"].is_object() {
                return Err(message["error"].take());
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// A request that must succeed.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, arguments).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// Waits for an event of that name; others before it are dropped. Its whole message.
    pub fn wait_event(&mut self, name: &str) -> Value {
        loop {
            let message = self.events.pop_front().unwrap_or_else(|| self.receive());
            if message["event"] == name {
                return message;
            }
        }
    }
}

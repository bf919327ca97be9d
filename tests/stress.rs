//! Guests that verify every byte they wrote, on virtqueues, while the graph below them is changed in every way there
//! is: snapshots, transactions, resizes, limits, filters, children, breakpoints, jobs, exports, media that are taken
//! out and put in (`stress/trays.rs`). No mismatch, no request that is not answered, and at the end no node, descriptor or thread is left.
//!
//! A minute by default; `SOAK=seconds` makes it long, `SEED=n` repeats the order of commands (not the threads').

#[allow(dead_code)]
#[path = "hostile/guest.rs"]
mod guest;
mod kit;
#[path = "stress/trays.rs"]
mod trays;

use guest::{Guest, Rng, header};
use minivmm::block::drive::{Device, Use};
use minivmm::block::node::Node;
use minivmm::control::vm::{Settings, Vm};
use minivmm::pci::function::PciDevice;
use minivmm::qmp::fds::Conn;
use minivmm::qmp::schema::{self, Cx};
use minivmm::sys::iov::IovMut;
use minivmm::virtio::blk::{Blk, BlkConfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the guests use of each disk.
const SIZE: u64 = 2 << 20;
const SECTOR: u64 = 512;
/// Requests of a guest at once, each in a part of the disk of its own.
const SLOTS: u64 = 4;
/// The longest request.
const MOST: u64 = 96;
/// A sector that was discarded: anything.
const ANYTHING: u32 = u32::MAX;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

// ---- guests

/// A request of a guest that is not answered yet.
struct Asked {
    kind: u32,
    first: u64,
    count: u64,
    id: u32,
    at: u64,
    since: Instant,
}

/// A sector that names its writer; 0 is zeroes.
fn contents(id: u32, sector: u64) -> [u8; 512] {
    let mut out = [0; 512];
    if id != 0 {
        for piece in out.chunks_exact_mut(8) {
            piece[..4].copy_from_slice(&id.to_le_bytes());
            piece[4..].copy_from_slice(&(sector as u32).to_le_bytes());
        }
    }
    out
}

/// Does requests until `stop`, then reads all; answers what each sector holds.
fn run_guest(
    mut g: Guest,
    n: u64,
    seed: u64,
    pauses: bool,
    stop: &AtomicBool,
    requests: &AtomicU64,
) -> Vec<u32> {
    let mut rng = Rng(seed * 8 + n + 1);
    let mut model = vec![0u32; (SIZE / SECTOR) as usize];
    let mut slots: Vec<Option<Asked>> = (0..SLOTS).map(|_| None).collect();
    let mut heads = BTreeMap::new();
    let mut next = 1u32;
    let part = SIZE / SECTOR / SLOTS;
    g.start(0);
    let free = g.free.next_multiple_of(4096);
    loop {
        let ending = stop.load(Ordering::Relaxed);
        for (slot, place) in slots.iter_mut().enumerate() {
            if place.is_some() || ending {
                continue;
            }
            let first = slot as u64 * part + rng.below(part - 1);
            let end = (slot as u64 + 1) * part;
            let count = 1 + rng.below(MOST.min(end - first));
            let kind = [IN, IN, IN, OUT, OUT, OUT, OUT, FLUSH, DISCARD, ZEROES][rng.below(10) as usize];
            let asked = Asked {
                kind,
                first,
                count,
                id: next,
                at: free + slot as u64 * 0x2_0000,
                since: Instant::now(),
            };
            heads.insert(offer(&mut g, &asked), slot);
            *place = Some(asked);
            next += 1;
        }
        g.kick(0);
        match g.rings[0].answer() {
            None if ending && slots.iter().all(Option::is_none) => break,
            None => std::thread::sleep(Duration::from_micros(50)),
            Some((head, _)) => {
                let slot = heads.remove(&head).expect("an answer to something that was not asked");
                let asked = slots[slot].take().unwrap();
                take(&g, &asked, &mut model, n);
                requests.fetch_add(1, Ordering::Relaxed);
            }
        }
        assert!(!g.is_broken(), "disk {n} broke at good requests");
        for asked in slots.iter().flatten() {
            let waited = asked.since.elapsed();
            assert!(
                waited < Duration::from_secs(60),
                "disk {n}: no answer to a request of kind {} for {waited:?}",
                asked.kind
            );
        }
        if pauses && rng.below(3000) == 0 {
            g.pci.pause();
            std::thread::sleep(Duration::from_millis(rng.below(5)));
            g.pci.resume();
        }
    }
    // All of it, once more.
    for first in (0..SIZE / SECTOR).step_by(64) {
        let asked = Asked { kind: IN, first, count: 64, id: 0, at: free, since: Instant::now() };
        let head = offer(&mut g, &asked);
        g.kick(0);
        assert_eq!(g.answer(0).0, head);
        take(&g, &asked, &mut model, n);
    }
    model
}

/// Puts a request into the ring.
fn offer(g: &mut Guest, a: &Asked) -> u16 {
    let (len, data, status) = ((a.count * SECTOR) as u32, a.at + 16, a.at + 0x1_f000);
    g.poke(a.at, &header(a.kind, if a.kind == IN || a.kind == OUT { a.first } else { 0 }));
    g.poke(status, &[0xff]);
    let mut pieces = vec![(a.at, 16, false)];
    match a.kind {
        IN => pieces.push((data, len, true)),
        OUT => {
            let bytes: Vec<u8> = (a.first..a.first + a.count).flat_map(|s| contents(a.id, s)).collect();
            g.poke(data, &bytes);
            pieces.push((data, len, false));
        }
        DISCARD | ZEROES => {
            let flags = u32::from(a.kind == ZEROES && a.id.is_multiple_of(2));
            g.poke(
                data,
                &[&a.first.to_le_bytes()[..], &(a.count as u32).to_le_bytes(), &flags.to_le_bytes()].concat(),
            );
            pieces.push((data, 16, false));
        }
        _ => {}
    }
    pieces.push((status, 1, true));
    let head = g.rings[0].chain(&pieces).expect("room in the ring");
    g.rings[0].offer(head);
    head
}

/// What an answer says.
fn take(g: &Guest, a: &Asked, model: &mut [u32], n: u64) {
    let status = g.peek(a.at + 0x1_f000, 1)[0];
    assert_eq!(status, 0, "disk {n}: request {} for {}+{} failed", a.kind, a.first, a.count);
    let range = a.first as usize..(a.first + a.count) as usize;
    match a.kind {
        OUT => model[range].fill(a.id),
        ZEROES => model[range].fill(0),
        DISCARD => model[range].fill(ANYTHING),
        IN => {
            let data = g.peek(a.at + 16, (a.count * SECTOR) as usize);
            for (s, got) in range.zip(data.chunks_exact(SECTOR as usize)) {
                let want = model[s];
                assert!(
                    want == ANYTHING || *got == contents(want, s as u64),
                    "disk {n}: sector {s} is {:?}…, not what request {want} wrote",
                    &got[..16]
                );
            }
        }
        _ => {}
    }
}

// ---- the other side

struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        let path = std::env::temp_dir().join(format!("minivmm-stress-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }
    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_string()
    }
    fn file(&self, name: &str, fill: u8) -> String {
        std::fs::write(self.path(name), vec![fill; SIZE as usize]).unwrap();
        self.path(name)
    }
    /// Removes the images of snapshots and mirrors that nobody has open: long runs make many.
    fn sweep(&self) {
        let open: Vec<_> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|f| std::fs::read_link(f.ok()?.path()).ok())
            .collect();
        for file in std::fs::read_dir(&self.0).unwrap().map(|f| f.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap();
            if (name.starts_with("over") || name.starts_with("mirror")) && !open.contains(&file) {
                std::fs::remove_file(&file).unwrap();
            }
        }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The commands, as a client would give them.
struct Control {
    vm: Vm,
    conn: Conn,
    rng: Rng,
    dir: Dir,
    /// For names that are never used twice.
    count: u64,
    /// How often each command succeeded, and what it said when it did not.
    done: BTreeMap<String, u64>,
    refused: BTreeMap<String, u64>,
    longest: (Duration, String),
    snapshots: Vec<(usize, String)>,
    /// Jobs that wait to be completed.
    ready: Vec<String>,
    breaks: Vec<String>,
    /// When the last one was set.
    broke: Instant,
    break_budget: u32,
    children: Vec<String>,
    top: [String; 3],
    export: bool,
    backup: Option<String>,
    /// Where the trays are, by their devices' ids, as the events say.
    trays: BTreeMap<String, bool>,
}

/// What must have been done: a test that does nothing proves nothing.
const MUST: &[&str] = &[
    "blockdev-snapshot-sync",
    "transaction",
    "transaction, aborted",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-delete-internal-sync",
    "block_resize",
    "block_set_io_throttle",
    "x-blockdev-change",
    "break",
    "block-stream",
    "blockdev-backup",
    "blockdev-reopen",
    "block-commit",
    "drive-mirror",
    "block-job-complete",
    "nbd-server-stop",
    "block-dirty-bitmap-remove",
    "eject",
    "blockdev-open-tray",
    "blockdev-close-tray",
    "blockdev-remove-medium",
    "blockdev-insert-medium",
    "blockdev-change-medium",
];

/// What a command may be refused with here: it comes at a bad moment.
const BAD_MOMENTS: &[&str] = &[
    "is busy",
    "in use",
    "already",
    "not found",
    "No active",
    "still in use",
    "does not support internal",
    "Permission conflict",
    "Need a root block node",
    "Failed to get a snapshot list",
    "does not exist on device",
    "is not open",
    "is locked and force was not specified",
    "has no medium",
    "Failed to get \"write\" lock",
    "Failed to get shared \"write\" lock",
    "Duplicate nodes with node-name='in-",
    "Failed to find node with node-name='in-",
];

impl Control {
    fn run(&mut self, name: &str, args: Value) -> Option<Value> {
        let Value::Object(map) = args.clone() else { panic!("no object") };
        let start = Instant::now();
        let done = schema::execute(&mut Cx { vm: &mut self.vm, conn: &mut self.conn }, name, map);
        let time = start.elapsed();
        if time > self.longest.0 {
            self.longest = (time, format!("{name} {args}"));
        }
        assert!(time < Duration::from_secs(30), "{name} took {time:?}");
        self.events();
        match done {
            Ok(v) => {
                *self.done.entry(name.into()).or_default() += 1;
                Some(v)
            }
            Err(e) => {
                let allowed = BAD_MOMENTS.iter().any(|m| e.desc.contains(m));
                assert!(allowed, "{name} {args}: {e}");
                *self.refused.entry(name.into()).or_default() += 1;
                None
            }
        }
    }

    /// Serves what other threads have to say.
    fn events(&mut self) {
        self.vm.take_events();
        for e in std::mem::take(&mut self.vm.outbox) {
            let data = json!(e.data);
            match e.name {
                "BLOCK_IO_ERROR" | "BLOCK_IMAGE_CORRUPTED" | "QUORUM_FAILURE" => panic!("{}: {data}", e.name),
                "DEVICE_TRAY_MOVED" => {
                    let id = data["id"].as_str().unwrap().to_string();
                    self.trays.insert(id, data["tray-open"].as_bool().unwrap());
                }
                "BLOCK_JOB_READY" => self.ready.push(data["device"].as_str().unwrap().to_string()),
                "BLOCK_JOB_COMPLETED" if !data["error"].is_null() => panic!("{data}"),
                _ => {}
            }
        }
    }

    fn name(&mut self, what: &str) -> String {
        self.count += 1;
        format!("{what}{}", self.count)
    }

    fn root(&self, disk: usize) -> Arc<Node> {
        self.vm.drives.find(&format!("d{disk}")).unwrap().handle.node().unwrap()
    }

    fn jobs(&mut self) -> Vec<String> {
        let jobs = self.run("query-jobs", json!({})).unwrap();
        jobs.as_array().unwrap().iter().map(|j| j["id"].as_str().unwrap().to_string()).collect()
    }

    /// One thing at random.
    fn step(&mut self) {
        // On a slow machine chance may let a request wait for too long.
        if !self.breaks.is_empty() && self.broke.elapsed() > Duration::from_secs(5) {
            self.breakpoint();
        }
        let disk = self.rng.below(2) as usize;
        let device = format!("d{disk}");
        match self.rng.below(32) {
            0 | 1 if self.depth(disk) < 6 => {
                let name = self.name("over");
                let file = self.dir.path(&name);
                let args = json!({"device": device, "snapshot-file": file, "snapshot-node-name": name});
                if self.run("blockdev-snapshot-sync", args).is_some() {
                    // They stay with the image that was written before.
                    self.snapshots.retain(|(d, _)| *d != disk);
                }
            }
            2 if (0..2).all(|d| self.depth(d) < 6) => self.several(),
            3 => {
                let name = self.name("snap");
                if self
                    .run("blockdev-snapshot-internal-sync", json!({"device": device, "name": name}))
                    .is_some()
                {
                    self.snapshots.push((disk, name));
                }
            }
            4 if !self.snapshots.is_empty() => {
                let at = self.rng.below(self.snapshots.len() as u64) as usize;
                let (disk, name) = self.snapshots[at].clone();
                let args = json!({"device": format!("d{disk}"), "name": name});
                self.run("blockdev-snapshot-delete-internal-sync", args);
                // If a job has taken the disk elsewhere, it is there no more.
                self.snapshots.remove(at);
            }
            5 => {
                // The guests use the first part only. A version 3 image can be resized with snapshots, too.
                let size = SIZE + self.rng.below(32) * 65536;
                self.run("block_resize", json!({"device": device, "size": size}));
            }
            6 | 7 => self.limits(),
            8 => self.child(),
            9 | 10 => self.breakpoint(),
            11 => self.stream(disk),
            12 => self.backup(disk),
            13 => self.export(),
            14 => self.bitmap(disk),
            15 => {
                let node = self.root(disk).name.clone();
                let at = self.rng.below(2 * SIZE);
                self.run("block-set-write-threshold", json!({"node-name": node, "write-threshold": at}));
            }
            16 => {
                let name = self.name("other");
                let file = self.dir.file(&name, 0);
                let node =
                    json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": file}});
                self.run("blockdev-add", node);
                self.run("blockdev-del", json!({"node-name": name}));
                std::fs::remove_file(file).unwrap();
            }
            17 => self.reopen(disk),
            18 => self.commit(disk),
            19 => self.mirror(disk),
            20 | 21 => self.complete(),
            22..=29 => {
                for (name, args) in trays::step(&mut self.rng, &self.dir) {
                    self.run(name, args);
                }
            }
            _ => {
                for query in
                    ["query-block", "query-blockstats", "query-named-block-nodes", "query-block-jobs"]
                {
                    self.run(query, json!({}));
                }
            }
        }
    }

    /// Two disks in one transaction, which sometimes is aborted.
    fn several(&mut self) {
        let abort = self.rng.below(3) == 0;
        let files = [0, 1].map(|_| {
            let name = self.name("both");
            (self.dir.path(&name), name)
        });
        let action = |n: usize| {
            json!({"type": "blockdev-snapshot-sync", "data": {"device": format!("d{n}"),
                "snapshot-file": files[n].0, "snapshot-node-name": files[n].1}})
        };
        let mut actions = vec![action(0), action(1)];
        if abort {
            actions.push(json!({"type": "abort", "data": {}}));
            let args = json!({"actions": actions}).as_object().unwrap().clone();
            let done =
                schema::execute(&mut Cx { vm: &mut self.vm, conn: &mut self.conn }, "transaction", args);
            done.expect_err("it was aborted");
            assert!(files.iter().all(|(_, name)| self.vm.graph.find(name).is_none()));
            *self.done.entry("transaction, aborted".into()).or_default() += 1;
        } else if self.run("transaction", json!({"actions": actions})).is_some() {
            self.snapshots.clear();
        }
    }

    fn limits(&mut self) {
        let device = format!("d{}", self.rng.below(4));
        let iops = [0, 0, 300, 2000][self.rng.below(4) as usize];
        let bps = [0, 0, 4 << 20, 64 << 20][self.rng.below(4) as usize];
        let args = json!({"device": device, "bps": bps, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0,
                          "iops_wr": 0, "group": "together"});
        self.run("block_set_io_throttle", args);
    }

    /// A new child for the quorum, and the oldest goes, once the new one has been read right.
    fn child(&mut self) {
        let name = self.name("child");
        let file = self.dir.file(&name, 0xa5);
        let node = json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": file}});
        self.run("blockdev-add", node);
        self.run("x-blockdev-change", json!({"parent": "quorum", "node": name})).unwrap();
        // As a job would, without the disk's limits.
        let mut all = vec![0; SIZE as usize];
        self.root(3).read(0, &mut IovMut::from_slice(&mut all)).unwrap();
        self.children.push(name);
        let oldest = self.children.remove(0);
        let role = self.root(3).driver.edges()[0].role.clone();
        self.run("x-blockdev-change", json!({"parent": "quorum", "child": role})).unwrap();
        self.run("blockdev-del", json!({"node-name": oldest})).unwrap();
        std::fs::remove_file(self.dir.path(&oldest)).unwrap();
    }

    /// A breakpoint below disk 2, or one less.
    fn breakpoint(&mut self) {
        let node = self.vm.graph.find("dbg").unwrap().clone();
        let moments = node.driver.moments().unwrap();
        if let Some(tag) = self.breaks.pop() {
            // It holds a request, or is still waited for, or has been let go.
            if moments.remove_break(&tag).is_ok() {
                *self.done.entry("remove_break".into()).or_default() += 1;
            }
        } else if self.break_budget > 0 {
            self.break_budget -= 1;
            let events = [
                "write_aio",
                "read_aio",
                "cluster_alloc",
                "l2_update",
                "l2_load",
                "flush_to_disk",
                "pwritev",
            ];
            let event = events[self.rng.below(events.len() as u64) as usize];
            let tag = self.name("tag");
            moments.set_break(event, &tag).unwrap();
            self.breaks.push(tag);
            self.broke = Instant::now();
            *self.done.entry("break".into()).or_default() += 1;
        }
    }

    /// All that a disk stands on goes into its topmost image.
    fn stream(&mut self, disk: usize) {
        let id = format!("stream{disk}");
        if self.depth(disk) > 0 && !self.jobs().contains(&id) {
            let args = json!({"device": format!("d{disk}"), "job-id": id, "speed": 4 << 20});
            // Whether it ends well is looked at by `events`.
            self.run("block-stream", args);
        }
    }

    /// How many images a disk's topmost one stands on.
    fn depth(&self, disk: usize) -> usize {
        let below = |n: &Arc<Node>| n.filtered().or_else(|| n.backing());
        let images = std::iter::successors(Some(self.root(disk)), below);
        images.filter(|n| n.driver.name() == "qcow2").count() - 1
    }

    /// All of a disk goes into its lowest image.
    fn commit(&mut self, disk: usize) {
        if self.depth(disk) > 0 {
            let id = self.name("commit");
            self.run("block-commit", json!({"device": format!("d{disk}"), "job-id": id, "speed": 8 << 20}));
        }
    }

    /// A disk goes elsewhere.
    fn mirror(&mut self, disk: usize) {
        let id = self.name("mirror");
        let target = self.dir.path(&id);
        let args = json!({"device": format!("d{disk}"), "job-id": id, "target": target, "format": "qcow2",
                          "sync": "full", "speed": 8 << 20});
        self.run("drive-mirror", args);
    }

    /// What is ready is completed, or was in vain.
    fn complete(&mut self) {
        for id in std::mem::take(&mut self.ready) {
            let what = if id.starts_with("mirror") && self.rng.below(4) == 0 { "cancel" } else { "complete" };
            self.run(&format!("block-job-{what}"), json!({"device": id}));
        }
    }

    fn backup(&mut self, disk: usize) {
        if let Some(target) = self.backup.clone() {
            if self.run("blockdev-del", json!({"node-name": target})).is_some() {
                self.backup = None;
            }
            return;
        }
        let target = self.name("target");
        let size = self.root(disk).len();
        self.run("blockdev-add", json!({"driver": "null-co", "node-name": target, "size": size}));
        if self.root(disk).len() != size {
            // A job has just ended, and its disk is another now.
            self.backup = Some(target);
            return;
        }
        let device = format!("d{disk}");
        let args =
            json!({"device": device, "target": target, "sync": "full", "job-id": "backup", "speed": 8 << 20});
        self.run("blockdev-backup", args);
        self.backup = Some(target);
    }

    fn export(&mut self) {
        if self.export {
            self.run("nbd-server-stop", json!({}));
        } else {
            let path = self.dir.path("nbd.sock");
            self.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
            let node = self.root(0).name.clone();
            self.run("block-export-add", json!({"type": "nbd", "id": "e0", "node-name": node}));
        }
        self.export = !self.export;
    }

    /// Other options for a disk's image, or for a child of the quorum.
    fn reopen(&mut self, disk: usize) {
        let zeroes = ["off", "on", "unmap"][self.rng.below(3) as usize];
        let flush = self.rng.below(2) == 0;
        let common = |node: &str, driver: &str| json!({"driver": driver, "node-name": node, "discard": "unmap", "detect-zeroes": zeroes});
        let options = if self.rng.below(2) == 0 {
            let child = self.children[self.rng.below(3) as usize].clone();
            let file =
                json!({"driver": "file", "filename": self.dir.path(&child), "cache": {"no-flush": flush}});
            let mut options = common(&child, "raw");
            options["file"] = file;
            options
        } else {
            let node = self.root(disk);
            if node.driver.name() != "qcow2" {
                return;
            }
            let mut options = common(&node.name, "qcow2");
            for edge in node.driver.edges() {
                options[&edge.role] = json!(edge.node().map(|n| n.name.clone()));
            }
            options["l2-cache-size"] = json!(4096 << self.rng.below(6));
            options
        };
        self.run("blockdev-reopen", json!({"options": [options]}));
    }

    fn bitmap(&mut self, disk: usize) {
        let node = self.root(disk).name.clone();
        let name = self.name("bitmap");
        if self.run("block-dirty-bitmap-add", json!({"node": node, "name": name})).is_some() {
            self.run("block-dirty-bitmap-clear", json!({"node": node, "name": name}));
            self.run("block-dirty-bitmap-remove", json!({"node": node, "name": name}));
        }
    }

    /// Nothing but the disks is left.
    fn settle(&mut self) {
        let node = self.vm.graph.find("dbg").unwrap().clone();
        self.breaks.iter().for_each(|tag| drop(node.driver.moments().unwrap().remove_break(tag)));
        if self.export {
            self.export();
        }
        for device in 0..4 {
            let args = json!({"device": format!("d{device}"), "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0,
                              "iops_rd": 0, "iops_wr": 0});
            self.run("block_set_io_throttle", args);
        }
        let end = Instant::now() + Duration::from_secs(30);
        while !self.jobs().is_empty() {
            assert!(Instant::now() < end, "jobs do not end: {:?}", self.jobs());
            for id in self.jobs() {
                let speed = json!({"device": id, "speed": 0});
                self.run("block-job-set-speed", speed);
            }
            self.complete();
            std::thread::sleep(Duration::from_millis(5));
            self.events();
        }
        for disk in 0..2 {
            let root = self.root(disk);
            let file = root.driver.edges().into_iter().find(|e| e.role == "file").and_then(|e| e.node());
            self.top[disk] = file.map(|f| f.driver.filename()).unwrap_or_default();
            let (name, driver) = (&root.name, root.driver.name());
            assert!(!self.top[disk].is_empty(), "disk {disk}: {name} ({driver}) has no file");
        }
    }
}

/// A drive, and its device as a guest sees it.
fn disk(vm: &mut Vm, n: usize, drive: Value) -> Guest {
    let mut drive = drive.as_object().unwrap().clone();
    drive.extend([("id".to_string(), json!(format!("d{n}"))), ("if".to_string(), json!("none"))]);
    vm.add_drive(drive).unwrap();
    let device = Device {
        id: format!("disk{n}"),
        qom_path: format!("/machine/peripheral/disk{n}"),
        qdev: format!("disk{n}"),
        removable: false,
        io_status: true,
    };
    let (name, events) = (format!("d{n}"), vm.events.clone());
    let how = Use::default();
    let handle =
        vm.drives.attach_device(&mut vm.graph, Some(&name), "virtio-blk-pci", device, &how, &events).unwrap();
    let workers = 1 + n as u16 % 2;
    let config = BlkConfig { id: format!("disk{n}"), workers, queue_size: 64, ..BlkConfig::default() };
    Guest::new(Blk::new(config, handle).unwrap())
}

/// Descriptors and threads of this process.
fn belongings() -> (usize, usize) {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "qemu-img is missing: apt-get install qemu-utils"
        );
        eprintln!("skipped in part: qemu-img is missing (apt-get install qemu-utils)");
    }
    found
}

/// What qemu-img finds in the image is what the guest wrote.
fn compare(dir: &Dir, image: &str, model: &[u32]) {
    let raw = dir.path("converted.raw");
    let check = Command::new("qemu-img").args(["check", "-q", image]).status().unwrap();
    assert!(check.success(), "qemu-img check {image}: {check}");
    let done = Command::new("qemu-img").args(["convert", "-O", "raw", image, &raw]).status().unwrap();
    assert!(done.success());
    let bytes = std::fs::read(raw).unwrap();
    for (s, got) in bytes.chunks_exact(SECTOR as usize).take(model.len()).enumerate() {
        assert!(model[s] == ANYTHING || *got == contents(model[s], s as u64), "{image}: sector {s}");
    }
}

#[test]
fn guests_keep_every_byte_whatever_is_done_to_the_graph() {
    let seed =
        std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(u64::from(std::process::id()));
    let soak = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    eprintln!("SEED={seed}");
    let before = belongings();
    let dir = Dir::new();
    let mut vm = Vm::new(Settings::default()).unwrap();
    let mut c = {
        let image = |name: &str| {
            let path = dir.path(name);
            drop(std::fs::File::create(&path).unwrap());
            path
        };
        let top = [image("i0"), image("i1"), image("i2")];
        let children: Vec<String> = (0..3).map(|n| format!("first{n}")).collect();
        children.iter().for_each(|c| drop(dir.file(c, 0)));
        let mut conn = Conn::new();
        for (n, path) in top.iter().enumerate() {
            let mut run = |name: &str, args: Value| {
                let args = args.as_object().unwrap().clone();
                schema::execute(&mut Cx { vm: &mut vm, conn: &mut conn }, name, args).unwrap();
            };
            let (id, node) = (format!("create{n}"), format!("new{n}"));
            run("blockdev-add", json!({"driver": "file", "node-name": node, "filename": path}));
            let options =
                json!({"driver": "qcow2", "file": node, "size": SIZE, "cluster-size": 4096 << (4 * (n % 2))});
            run("blockdev-create", json!({"job-id": id, "options": options}));
            kit::until(|| {
                vm.take_events();
                let mut cx = Cx { vm: &mut vm, conn: &mut conn };
                let jobs = schema::execute(&mut cx, "query-jobs", Default::default()).unwrap();
                (jobs[0]["status"] == "concluded").then(|| assert!(jobs[0]["error"].is_null(), "{jobs}"))
            });
            let mut run = |name: &str, args: Value| {
                let args = args.as_object().unwrap().clone();
                schema::execute(&mut Cx { vm: &mut vm, conn: &mut conn }, name, args).unwrap();
            };
            run("job-dismiss", json!({"id": id}));
            run("blockdev-del", json!({"node-name": node}));
        }
        Control {
            vm,
            conn,
            rng: Rng(seed | 1),
            dir,
            count: 0,
            done: BTreeMap::new(),
            refused: BTreeMap::new(),
            longest: Default::default(),
            snapshots: Vec::new(),
            ready: Vec::new(),
            breaks: Vec::new(),
            broke: Instant::now(),
            break_budget: 20,
            children,
            top,
            export: false,
            backup: None,
            trays: BTreeMap::new(),
        }
    };
    let file = |path: &str| json!({"driver": "file", "filename": path});
    c.run("object-add", json!({"qom-type": "throttle-group", "id": "tg", "limits": {"iops-total": 5000}}))
        .unwrap();
    for child in c.children.clone() {
        let path = c.dir.path(&child);
        c.run("blockdev-add", json!({"driver": "raw", "node-name": child, "file": file(&path)})).unwrap();
    }
    let plain = |path: &str| json!({"format": "qcow2", "discard": "unmap", "file": file(path)});
    let tested = json!({"driver": "blkdebug", "node-name": "dbg", "image": file(&c.top[2])});
    let limited = json!({"driver": "qcow2", "discard": "unmap", "file": tested});
    let voted = json!({"format": "quorum", "node-name": "quorum", "vote-threshold": 2, "rewrite-corrupted": true,
                       "children": c.children});
    let filtered = json!({"format": "throttle", "throttle-group": "tg", "discard": "unmap", "file": limited});
    let drives = [plain(&c.top[0]), plain(&c.top[1]), filtered, voted];
    let guests: Vec<_> = drives.into_iter().enumerate().map(|(n, drive)| disk(&mut c.vm, n, drive)).collect();
    trays::make_media(&c.dir);
    let tray_guests: Vec<_> = (0..2).map(|n| trays::drive(&mut c.vm, n)).collect();
    let tray_reads = AtomicU64::new(0);
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(soak);
    let mut steps = 0;
    let (models, tray_models) = std::thread::scope(|s| {
        let threads: Vec<_> = guests
            .into_iter()
            .enumerate()
            .map(|(n, guest)| {
                let (stop, requests) = (&stop, &requests);
                s.spawn(move || run_guest(guest, n as u64, seed, n < 2, stop, requests))
            })
            .collect();
        let tray_threads: Vec<_> = tray_guests
            .into_iter()
            .enumerate()
            .map(|(n, guest)| {
                let (stop, reads) = (&stop, &tray_reads);
                s.spawn(move || trays::run_guest(guest, n, seed, stop, reads))
            })
            .collect();
        let failed =
            || threads.iter().any(|t| t.is_finished()) || tray_threads.iter().any(|t| t.is_finished());
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // A slow machine may need longer.
            let done_all = |c: &Control| MUST.iter().all(|m| c.done.contains_key(*m));
            let late = end + Duration::from_secs(60);
            while (Instant::now() < end || (!done_all(&c) && Instant::now() < late)) && !failed() {
                c.step();
                steps += 1;
                if steps % 1000 == 0 {
                    c.dir.sweep();
                    c.break_budget += 5;
                }
                std::thread::sleep(Duration::from_micros(c.rng.below(3000)));
            }
            c.settle();
            assert!(done_all(&c), "something never succeeded: {:?} {:?}", c.done, c.refused);
        }));
        stop.store(true, Ordering::Relaxed);
        // After a failure, too, nothing is held back.
        let _hurry = c.vm.graph.hurry();
        let models = threads.into_iter().map(|t| t.join()).collect::<Vec<_>>();
        let tray_models = tray_threads.into_iter().map(|t| t.join()).collect::<Vec<_>>();
        done.unwrap();
        let models: Vec<_> = models.into_iter().map(Result::unwrap).collect();
        (models, tray_models.into_iter().map(Result::unwrap).collect::<Vec<_>>())
    });
    let tray_reads = tray_reads.load(Ordering::Relaxed);
    eprintln!(
        "{steps} steps, {} requests, {tray_reads} reads of media, longest {:?}",
        requests.load(Ordering::Relaxed),
        c.longest
    );
    assert!(tray_reads > 100, "the media were hardly ever there");
    c.events();
    for (id, open) in &c.trays {
        let is_open = c.vm.drives.of_device(id).and_then(|d| d.handle.tray()).map(|t| t.is_open());
        assert_eq!(is_open, Some(*open), "{id}: the last event says something else");
    }
    for n in 0..2 {
        for m in 0..trays::MEDIA {
            let node = format!("in-medium{n}-{m}");
            c.run("blockdev-open-tray", json!({"id": format!("tray{n}"), "force": true}));
            c.run("blockdev-remove-medium", json!({"id": format!("tray{n}")}));
            c.run("blockdev-del", json!({"node-name": node}));
        }
    }
    eprintln!("done {:?}\nrefused {:?}", c.done, c.refused);
    if let Some(target) = c.backup.take() {
        c.run("blockdev-del", json!({"node-name": target}));
    }
    c.vm.end_jobs();
    c.vm.shut_down().unwrap();
    assert_eq!(c.vm.graph.nodes().map(|n| n.name.clone()).collect::<Vec<_>>(), [""; 0], "nodes are left");
    let Control { vm, conn, dir, children, top, .. } = c;
    drop((vm, conn));
    // Threads that have said their last word may take a moment to be gone.
    let gone = Instant::now() + Duration::from_secs(5);
    while belongings() != before && Instant::now() < gone {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(belongings(), before, "descriptors and threads");
    for child in &children {
        let bytes = std::fs::read(dir.path(child)).unwrap();
        let first = std::fs::read(dir.path(&children[0])).unwrap();
        assert!(bytes == first, "the children of the quorum differ");
    }
    for (n, models) in tray_models.iter().enumerate() {
        trays::compare(&dir, n, models);
    }
    if have_qemu() {
        (0..3).for_each(|n| compare(&dir, &top[n], &models[n]));
    }
}

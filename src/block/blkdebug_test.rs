use super::*;
use crate::block::debug::Moments;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::NodeOptions;
use crate::block::open::{self, Common, Plan};
use crate::block::raw::RawPlan;
use crate::block::testing::{Mem, MemState, NoEnv, Scratch};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A graph with a memory disk `mem` of 1 MiB.
fn graph() -> (Graph, Arc<MemState>) {
    let mem = Mem::new(1 << 20);
    let state = mem.state.clone();
    let options = NodeOptions { unmap: true, ..NodeOptions::default() };
    let mut graph = Graph::new();
    let node = Node::new("mem", Box::new(mem), options);
    graph.add(node.clone()).unwrap();
    graph.own(&node);
    (graph, state)
}

fn named(name: &str, driver: Box<dyn Open>) -> Plan {
    let common = Common { node_name: Some(name.into()), unmap: Some(true), ..Common::default() };
    Plan { common, driver }
}

fn blkdebug(options: BlkdebugOptions) -> Plan {
    named("dbg", Box::new(BlkdebugPlan { image: Child::Node("mem".into()), options }))
}

/// `raw` on blkdebug on memory, and a guest of it.
fn stack(graph: &mut Graph, options: BlkdebugOptions) -> Arc<Handle> {
    let file = Child::New(Box::new(blkdebug(options)));
    let raw = named("raw", Box::new(RawPlan { file, offset: None, size: None }));
    let node = open::add(graph, &NoEnv, raw).unwrap();
    graph.attach(Some(node), HandleSpec::default()).unwrap()
}

fn error(event: BlkdebugEvent) -> BlkdebugInjectErrorOptions {
    BlkdebugInjectErrorOptions {
        event,
        state: None,
        iotype: None,
        errno: None,
        sector: None,
        once: None,
        immediately: None,
    }
}

fn failing(list: Vec<BlkdebugInjectErrorOptions>) -> BlkdebugOptions {
    BlkdebugOptions { inject_error: Some(list), ..BlkdebugOptions::none() }
}

fn write(handle: &Handle, off: u64, len: usize) -> Option<i32> {
    let done = handle.write(off, &Iov::from_slice(&vec![7; len]), Flags::NONE);
    done.err().map(|e| e.raw_os_error().unwrap())
}

fn read(handle: &Handle, off: u64, len: usize) -> Option<i32> {
    let done = handle.read(off, &mut IovMut::from_slice(&mut vec![0; len]));
    done.err().map(|e| e.raw_os_error().unwrap())
}

#[test]
fn errors_come_after_their_moment_until_another_brings_its_own() {
    let (mut graph, _) = graph();
    let write_error = BlkdebugInjectErrorOptions { errno: Some(28), ..error(BlkdebugEvent::WriteAio) };
    let flush_error = error(BlkdebugEvent::FlushToDisk);
    let disk = stack(&mut graph, failing(vec![write_error, flush_error]));
    assert_eq!(read(&disk, 0, 512), None);
    assert_eq!(write(&disk, 0, 512), Some(28));
    // Not only the request at the moment fails, as in QEMU, …
    assert_eq!(read(&disk, 0, 512), Some(28));
    assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(5));
    // … and there is one moment at a time.
    assert_eq!(read(&disk, 0, 512), Some(5));
}

#[test]
fn once_sector_iotype_and_state_say_which() {
    let (mut graph, _) = graph();
    let list = vec![
        BlkdebugInjectErrorOptions {
            sector: Some(3),
            iotype: Some(BlkdebugIOType::Write),
            once: Some(true),
            ..error(BlkdebugEvent::None)
        },
        BlkdebugInjectErrorOptions { state: Some(2), errno: Some(6), ..error(BlkdebugEvent::ReadAio) },
    ];
    let options = BlkdebugOptions {
        set_state: Some(vec![BlkdebugSetStateOptions {
            event: BlkdebugEvent::FlushToOs,
            state: Some(1),
            new_state: 2,
        }]),
        ..failing(list)
    };
    let disk = stack(&mut graph, options);
    assert_eq!(read(&disk, 1536, 512), None);
    assert_eq!(write(&disk, 0, 1536), None);
    assert_eq!(write(&disk, 2048, 512), None);
    assert_eq!(write(&disk, 1000, 537), Some(5));
    assert_eq!(write(&disk, 1000, 537), None);
    assert_eq!(read(&disk, 0, 512), None);
    disk.flush().unwrap();
    assert_eq!(read(&disk, 0, 512), Some(6));
}

#[test]
fn the_first_rule_decides() {
    let (mut graph, _) = graph();
    let one =
        BlkdebugInjectErrorOptions { errno: Some(1), once: Some(true), ..error(BlkdebugEvent::WriteAio) };
    let two = BlkdebugInjectErrorOptions { errno: Some(2), ..error(BlkdebugEvent::WriteAio) };
    let disk = stack(&mut graph, failing(vec![one, two]));
    assert_eq!([write(&disk, 0, 1), write(&disk, 0, 1), write(&disk, 0, 1)], [Some(1), Some(2), Some(2)]);
}

#[test]
fn requests_are_split_and_aligned() {
    let (mut graph, state) = graph();
    let options = BlkdebugOptions {
        align: Some(4096),
        max_transfer: Some(8192),
        opt_write_zero: Some(16384),
        max_write_zero: Some(32768),
        opt_discard: Some(16384),
        max_discard: Some(16384),
        ..BlkdebugOptions::none()
    };
    let disk = stack(&mut graph, options);
    assert_eq!(write(&disk, 100, 70000), None);
    let mut data = vec![0; 70200];
    disk.read(0, &mut IovMut::from_slice(&mut data)).unwrap();
    assert!(data[..100].iter().chain(&data[70100..]).all(|b| *b == 0));
    assert!(data[100..70100].iter().all(|b| *b == 7));
    disk.zero(4096, 65536, Flags::NONE).unwrap();
    // 16 to 48 KiB and 48 to 64 KiB; the rest was written.
    assert_eq!(state.zeroes.load(Ordering::SeqCst), 2);
    assert!(
        state.data.lock().unwrap()[100..69632]
            .iter()
            .enumerate()
            .all(|(i, b)| *b == if i < 3996 { 7 } else { 0 })
    );
    disk.discard(4096, 65536).unwrap();
    assert_eq!(state.discards.load(Ordering::SeqCst), 3);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (mut graph, _) = graph();
    let none = BlkdebugOptions::none();
    let dir = Scratch::new("blkdebug-config");
    for (options, want) in [
        (BlkdebugOptions { align: Some(3), ..none.clone() }, "Cannot meet constraints with align 3"),
        (
            BlkdebugOptions { align: Some(4096), max_transfer: Some(100), ..none.clone() },
            "Cannot meet constraints with max-transfer 100",
        ),
        (
            BlkdebugOptions { max_discard: Some(-1), ..none.clone() },
            "Value '-1' is out of range for parameter 'max-discard'",
        ),
        (
            BlkdebugOptions { config: Some(dir.path("none")), ..none.clone() },
            "Could not read blkdebug config file: No such file or directory",
        ),
        (
            failing(vec![BlkdebugInjectErrorOptions { errno: Some(-5), ..error(BlkdebugEvent::None) }]),
            "Value '-5' is out of range for parameter 'errno'",
        ),
    ] {
        assert_eq!(open::add(&mut graph, &NoEnv, blkdebug(options)).err().unwrap().desc, want);
        assert_eq!(graph.nodes().count(), 1);
    }
    for (text, want) in [
        ("x = \"1\"\n", "no group defined"),
        ("[foo]\n", "There is no option group 'foo'"),
        ("[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"),
        ("[inject-error]\nevent = \"bogus\"\n", "invalid parameter value: bogus"),
        ("[inject-error]\nevent = \"none\"\nerrno = \"x\"\n", "Parameter 'errno' expects a number"),
        ("[inject-error]\nevent = \"none\"\nonce = \"x\"\n", "Parameter 'once' expects 'on' or 'off'"),
        ("[inject-error]\nbla = \"1\"\n", "Invalid parameter 'bla'"),
        ("[set-state]\nonce = \"on\"\n", "Invalid parameter 'once'"),
        ("[set-state]\nevent = none\n", "blkdebug: 'event = none' is not of the form name = \"value\""),
    ] {
        std::fs::write(dir.path("bad"), text).unwrap();
        let options = BlkdebugOptions { config: Some(dir.path("bad")), ..none.clone() };
        assert_eq!(open::add(&mut graph, &NoEnv, blkdebug(options)).err().unwrap().desc, want, "{text}");
    }
}

#[test]
fn rules_come_from_a_file_too() {
    let (mut graph, _) = graph();
    let dir = Scratch::new("blkdebug-rules");
    let text = "# comment\n\n[set-state \"a\"]\nevent = \"read_aio\"\nstate = \"1\"\nnew_state = \"5\"\n\
                [inject-error]\n  event = \"write_aio\"\n  state = \"5\"\n  errno = \"28\"\n  once = \"on\"\n";
    std::fs::write(dir.path("rules"), text).unwrap();
    let disk =
        stack(&mut graph, BlkdebugOptions { config: Some(dir.path("rules")), ..BlkdebugOptions::none() });
    assert_eq!(write(&disk, 0, 1), None);
    assert_eq!(read(&disk, 0, 1), None);
    assert_eq!([write(&disk, 0, 1), write(&disk, 0, 1)], [Some(28), None]);
}

#[test]
fn permissions_as_asked() {
    let (mut graph, _) = graph();
    let options = BlkdebugOptions {
        take_child_perms: Some(vec![BlockPermission::Write]),
        unshare_child_perms: Some(vec![BlockPermission::Write, BlockPermission::Resize]),
        ..BlkdebugOptions::none()
    };
    open::add(&mut graph, &NoEnv, blkdebug(options)).unwrap();
    let mem = graph.find("mem").unwrap().clone();
    let spec = HandleSpec { uses: Perm::RESIZE, shares: Perm::ALL, ..HandleSpec::default() };
    let refused = graph.attach(Some(mem.clone()), spec).err().unwrap().desc;
    assert!(refused.contains("permissions 'resize' are both required by"), "{refused}");
    let spec =
        HandleSpec { uses: Perm::CONSISTENT_READ, shares: Perm::CONSISTENT_READ, ..HandleSpec::default() };
    let refused = graph.attach(Some(mem), spec).err().unwrap().desc;
    assert!(refused.contains("'write' are both required by node 'dbg'"), "{refused}");
}

/// The breakpoints of node `dbg`.
fn moments(graph: &Graph, f: impl FnOnce(&dyn Moments)) {
    f(graph.find("raw").unwrap().driver.edges()[0].node().unwrap().driver.moments().unwrap());
}

#[test]
fn a_breakpoint_holds_one_request_until_it_is_resumed() {
    let (mut graph, state) = graph();
    let disk = stack(&mut graph, BlkdebugOptions::none());
    moments(&graph, |m| {
        assert!(m.set_break("no_such_event", "A").is_err());
        assert!(m.resume("A").is_err());
        m.set_break("write_aio", "A").unwrap();
        std::thread::scope(|s| {
            let held = s.spawn(|| write(&disk, 0, 512));
            m.wait_break("A");
            assert_eq!(state.data.lock().unwrap()[0], 0);
            // The breakpoint is gone: others pass.
            assert_eq!(write(&disk, 512, 512), None);
            assert!(!held.is_finished());
            m.resume("A").unwrap();
            assert_eq!(held.join().unwrap(), None);
        });
        assert_eq!(state.data.lock().unwrap()[0], 7);
        m.set_break("write_aio", "B").unwrap();
        m.remove_break("B").unwrap();
        assert!(m.remove_break("B").is_err());
        assert_eq!(write(&disk, 0, 512), None);
    });
}

#[test]
fn whoever_waits_for_requests_to_end_does_not_wait_for_breakpoints() {
    let (mut graph, _) = graph();
    let disk = stack(&mut graph, BlkdebugOptions::none());
    let node = graph.find("raw").unwrap().clone();
    let hold = |graph: &Graph| moments(graph, |m| m.set_break("write_aio", "A").unwrap());
    let begin = |graph: &Graph| {
        hold(graph);
        let disk = disk.clone();
        let thread = std::thread::spawn(move || write(&disk, 0, 512));
        moments(graph, |m| m.wait_break("A"));
        thread
    };
    let thread = begin(&graph);
    drop(graph.quiesce(&[&node], &[]));
    assert_eq!(thread.join().unwrap(), None);
    let thread = begin(&graph);
    let hurry = graph.hurry();
    assert_eq!(thread.join().unwrap(), None);
    // A breakpoint that holds nobody stays set.
    hold(&graph);
    assert_eq!(write(&disk, 0, 512), None);
    drop(hurry);
    let thread = std::thread::spawn({
        let disk = disk.clone();
        move || write(&disk, 0, 512)
    });
    moments(&graph, |m| m.wait_break("A"));
    graph.close_all();
    assert_eq!(thread.join().unwrap(), None);
}

#[test]
fn what_the_control_thread_does_itself_is_not_held() {
    let (mut graph, _) = graph();
    stack(&mut graph, BlkdebugOptions::none());
    moments(&graph, |m| {
        m.set_break("flush_to_disk", "A").unwrap();
        m.set_break("write_aio", "A").unwrap();
    });
    let node = graph.find("raw").unwrap();
    node.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
    node.flush().unwrap();
}

#[test]
fn a_request_under_a_lock_is_held_at_its_next_moment_without() {
    let (mut graph, _) = graph();
    let disk = stack(&mut graph, BlkdebugOptions::none());
    let node = graph.find("raw").unwrap().driver.edges()[0].node().unwrap();
    moments(&graph, |m| {
        m.set_break("l2_load", "A").unwrap();
        m.set_break("pwritev", "B").unwrap();
        let passed = AtomicBool::new(false);
        std::thread::scope(|s| {
            let held = s.spawn(|| {
                let _ticket = disk.gate.enter();
                node.moment_locked(BlkdebugEvent::L2Load);
                node.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
                passed.store(true, Ordering::SeqCst);
                node.moment(BlkdebugEvent::WriteAio);
            });
            m.wait_break("A");
            assert!(passed.load(Ordering::SeqCst));
            m.resume("A").unwrap();
            m.wait_break("B");
            std::thread::sleep(Duration::from_millis(5));
            assert!(!held.is_finished());
            m.resume("B").unwrap();
        });
    });
}

#[test]
fn its_name_says_what_it_is() {
    let (mut graph, _) = graph();
    let dir = Scratch::new("blkdebug-name");
    let path = dir.file("a.raw", 512);
    let open = |graph: &mut Graph, options: BlkdebugOptions| {
        let file = Box::new(crate::block::file_open::FilePlan::new("file", &path));
        let image = Child::New(Box::new(Plan { common: Common::default(), driver: file }));
        let node = open::open(graph, &NoEnv, named("x", Box::new(BlkdebugPlan { image, options }))).unwrap();
        let seen = (node.driver.filename(), Value::Object(node.driver.own_options()).to_string());
        graph.collect();
        seen
    };
    assert_eq!(open(&mut graph, BlkdebugOptions::none()).0, format!("blkdebug::{path}"));
    let seen = open(&mut graph, failing(vec![error(BlkdebugEvent::L2Load)]));
    assert_eq!(seen, (String::new(), "{\"inject-error.0.event\":\"l2_load\"}".into()));
}

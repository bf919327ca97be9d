use super::*;
use crate::block::testing::Scratch;
use crate::control::vm::{Settings, Vm};
use crate::qmp::fds::Conn;
use crate::qmp::schema;
use serde_json::{Value, json};

pub(crate) struct Qmp {
    pub(crate) vm: Vm,
    pub(crate) conn: Conn,
}

impl Qmp {
    pub(crate) fn new() -> Qmp {
        Qmp { vm: Vm::new(Settings::default()).unwrap(), conn: Conn::new() }
    }

    pub(crate) fn run(&mut self, name: &str, args: Value) -> Result<Value> {
        let Value::Object(args) = args else { panic!("no object") };
        schema::execute(&mut Cx { vm: &mut self.vm, conn: &mut self.conn }, name, args)
    }

    pub(crate) fn ok(&mut self, name: &str, args: Value) -> Value {
        self.run(name, args.clone()).unwrap_or_else(|e| panic!("{name} {args}: {e}"))
    }

    pub(crate) fn err(&mut self, name: &str, args: Value) -> String {
        match self.run(name, args.clone()) {
            Ok(v) => panic!("{name} {args} succeeded: {v}"),
            Err(e) => e.desc,
        }
    }

    fn names(&mut self) -> Vec<String> {
        let nodes = self.ok("query-named-block-nodes", json!({}));
        let name = |n: &Value| n["node-name"].as_str().unwrap().to_string();
        nodes.as_array().unwrap().iter().map(name).collect()
    }
}

#[test]
fn the_error_texts_of_blockdev_add() {
    let dir = Scratch::new("add-errors");
    let raw = dir.file("b.raw", 1 << 20);
    let none = dir.path("nonexistent");
    let mut q = Qmp::new();
    let file = |name: &str| json!({"driver": "file", "node-name": name, "filename": raw});
    let inner = json!({"driver": "file", "filename": raw});
    let long = "n".repeat(32);
    q.ok("blockdev-add", file("f0"));
    for (args, want) in [
        (inner.clone(), "'node-name' must be specified for the root node".to_string()),
        (file(""), "Invalid node-name: ''".into()),
        (file("1abc"), "Invalid node-name: '1abc'".into()),
        (file("a/b"), "Invalid node-name: 'a/b'".into()),
        (file("#foo"), "Invalid node-name: '#foo'".into()),
        (file(&long), "Node name too long".into()),
        (file("f0"), "Duplicate nodes with node-name='f0'".into()),
        (
            json!({"driver": "file", "node-name": "x", "filename": none}),
            format!("Could not open '{none}': No such file or directory"),
        ),
        (
            json!({"driver": "file", "node-name": "x", "filename": dir.path("")}),
            format!("Could not open '{}': Is a directory", dir.path("")),
        ),
        (
            json!({"driver": "file", "node-name": "x", "filename": ""}),
            "The 'file' block driver requires a file name".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": "nonode"}),
            "Cannot find device='nonode' nor node-name='nonode'".into(),
        ),
        (json!({"driver": "raw", "node-name": "x"}), "Parameter 'file' is missing".into()),
        (
            json!({"driver": "raw", "node-name": "x", "file": 5}),
            "Invalid parameter type for 'file', expected: BlockdevRef".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": inner, "offset": 1 << 30}),
            "Offset (1073741824) cannot be greater than size of the containing file (1048576)".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": inner, "size": 1 << 30}),
            "The sum of offset (0) and size (1073741824) has to be smaller or equal to the  \
             actual size of the containing file (1048576)"
                .into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": inner, "size": 1000}),
            "Specified size is not multiple of 512".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": inner, "discard": "maybe"}),
            "Parameter 'discard' does not accept value 'maybe'".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": inner, "detect-zeroes": "unmap"}),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to \
             unmap"
                .into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x",
                   "file": {"driver": "file", "node-name": "x", "filename": raw}}),
            "Duplicate nodes with node-name='x'".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x",
                   "file": {"driver": "file", "filename": raw, "zz": 1}}),
            "Parameter 'file.zz' is unexpected".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": inner, "force-share": true}),
            "force-share=on can only be used with read-only images".into(),
        ),
        (
            json!({"driver": "file", "node-name": "x", "filename": raw, "aio": "native"}),
            "aio=native was specified, but it requires cache.direct=on, which was not specified.".into(),
        ),
        (
            json!({"driver": "file", "node-name": "x", "filename": "/dev/null"}),
            "'file' driver requires '/dev/null' to be a regular file".into(),
        ),
        (
            json!({"driver": "host_device", "node-name": "x", "filename": raw}),
            format!("'host_device' driver requires '{raw}' to be either a character or block device"),
        ),
        (
            json!({"driver": "file", "node-name": "x", "filename": "/dev/fdset/7"}),
            "Failed to find fdset /dev/fdset/7".into(),
        ),
    ] {
        assert_eq!(q.err("blockdev-add", args), want);
        assert_eq!(q.names(), ["f0"], "{want}: something is left over");
    }
}

#[test]
fn nodes_come_and_go_with_those_that_only_they_used() {
    let dir = Scratch::new("add-del");
    let raw = dir.file("b.raw", 1 << 20);
    let mut q = Qmp::new();
    q.ok("blockdev-add", json!({"driver": "file", "node-name": "f0", "filename": raw}));
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "r0", "file": "f0"}));
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "r1", "file": "f0"}));
    let inner = json!({"driver": "file", "filename": raw});
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "r2", "file": inner, "offset": 4096}));
    let names = q.names();
    assert_eq!(names.len(), 5);
    assert!(names[0] == "r2" && names[1].starts_with("#block") && names[2..] == ["r1", "r0", "f0"]);
    let del = |name: &str| json!({"node-name": name});
    assert_eq!(q.err("blockdev-del", del("f0")), "Block device f0 is in use");
    assert_eq!(
        q.err("blockdev-del", del(&names[1])),
        format!("Node {} is not owned by the monitor", names[1])
    );
    q.ok("blockdev-del", del("r2"));
    assert_eq!(q.names(), ["r1", "r0", "f0"]);
    q.ok("x-blockdev-del", del("r0"));
    assert_eq!(q.err("blockdev-del", del("f0")), "Block device f0 is in use");
    q.ok("blockdev-del", del("r1"));
    q.ok("blockdev-del", del("f0"));
    assert_eq!(q.err("blockdev-del", del("f0")), "Failed to find node with node-name='f0'");
    // A format may do without a name.
    q.ok("blockdev-add", json!({"driver": "raw", "file": inner}));
    let names = q.names();
    q.ok("blockdev-del", del(&names[0]));
    assert!(q.names().is_empty());
}

/// The three requests of QEMU 2.8's `docs/qmp-commands.txt`, with other paths.
#[test]
fn the_examples_of_the_old_manual() {
    use crate::block::testing::qemu;
    let Some(img) = qemu("qemu-img") else { return };
    let dir = Scratch::new("manual");
    let path = dir.path("test.qcow2");
    let made = std::process::Command::new(img).args(["create", "-q", "-f", "qcow2", &path, "16M"]).status();
    assert!(made.unwrap().success());
    let raw = dir.file("base", 16 << 20);
    let mut q = Qmp::new();
    let file = json!({"driver": "file", "filename": path});
    q.ok("blockdev-add", json!({"driver": "qcow2", "file": file}));
    let name = q.names().into_iter().next().unwrap();
    q.ok("x-blockdev-del", json!({"node-name": name}));
    let member = std::fs::File::open(&raw).unwrap();
    q.vm.fds.add(member.into(), Some(4), None).unwrap();
    let add = json!({
        "driver": "qcow2",
        "node-name": "my_disk",
        "discard": "unmap",
        "cache": {"direct": true, "writeback": true},
        "file": file,
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": "/dev/fdset/4"}}
    });
    match q.run("blockdev-add", add) {
        Ok(_) => {
            let all = q.ok("query-named-block-nodes", json!({}));
            let direct = |n: &Value| n["cache"]["direct"] == true;
            assert!(all.as_array().unwrap().iter().all(direct), "{all}");
            assert_eq!(all.as_array().unwrap().len(), 4);
            q.ok("x-blockdev-del", json!({"node-name": "my_disk"}));
        }
        Err(e) => assert!(e.desc.contains("does not support O_DIRECT"), "{e}"),
    }
    q.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "node0", "file": file}));
    q.ok("x-blockdev-del", json!({"node-name": "node0"}));
    assert!(q.names().is_empty());
    // The set is there as long as its own descriptor; the node's duplicates are gone.
    q.vm.fds.remove(4, None).unwrap();
    assert!(q.vm.fds.list().is_empty());
}

#[test]
fn block_resize_and_its_errors() {
    let dir = Scratch::new("resize");
    let raw = dir.file("r.raw", 1 << 20);
    let mut q = Qmp::new();
    let file = json!({"driver": "file", "filename": raw});
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "raw", "file": file}));
    q.ok("block_resize", json!({"node-name": "raw", "size": 65536}));
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 65536);
    let ro = json!({"driver": "raw", "node-name": "ro", "read-only": true, "file": file});
    q.ok("blockdev-add", ro);
    let fixed = json!({"driver": "raw", "node-name": "fixed", "size": 512, "file": file});
    q.ok("blockdev-add", fixed);
    for (args, want) in [
        (json!({"node-name": "raw", "size": -1}), "Parameter 'size' expects a >0 size"),
        (json!({"size": 1}), "Cannot find device='' nor node-name=''"),
        (json!({"device": "no", "size": 1}), "Cannot find device='no' nor node-name=''"),
        (json!({"device": "raw", "size": 1}), "Cannot find device='raw' nor node-name=''"),
        (json!({"node-name": "no", "size": 1}), "Cannot find device='' nor node-name='no'"),
        (json!({"node-name": "ro", "size": 1}), "Image is read-only"),
        (json!({"node-name": "fixed", "size": 1}), "Cannot resize fixed-size raw disks"),
    ] {
        assert_eq!(q.err("block_resize", args), want);
    }
    // The window counts on the length of its file, though it has opened it on its own.
    assert_eq!(
        q.err("block_resize", json!({"node-name": "raw", "size": 0})),
        "Failed to get \"resize\" lock"
    );
    q.ok("blockdev-del", json!({"node-name": "fixed"}));
    q.ok("block_resize", json!({"node-name": "raw", "size": 0}));
}

/// Any commands in any order: no panic, nothing half done, and at the end nothing is left.
#[test]
fn random_commands_leave_a_graph_that_can_be_taken_apart() {
    use crate::block::handle::HandleSpec;
    use crate::block::testing::Rng;
    use crate::block::{driver::Perm, graph::Parent};
    let dir = Scratch::new("random");
    let files: Vec<_> = (0..3).map(|i| dir.file(&format!("f{i}"), 1 << 20)).collect();
    let open_fds = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let ours = |p: std::path::PathBuf| p.starts_with(&dir.0);
        fds.filter(|e| std::fs::read_link(e.path()).is_ok_and(ours)).count()
    };
    let mut done = [0, 0];
    for seed in 1..=8u64 {
        eprintln!("seed {seed}");
        let mut rng = Rng(seed * 7919);
        let mut q = Qmp::new();
        let mut handles = Vec::new();
        let name = |rng: &mut Rng| format!("n{}", rng.below(8));
        for _ in 0..150 {
            let before = q.names();
            let mut options = json!({"node-name": name(&mut rng)});
            for (member, odds) in [("read-only", 3), ("auto-read-only", 4), ("force-share", 8)] {
                if rng.below(odds) == 0 {
                    options[member] = json!(rng.below(2) == 0);
                }
            }
            let file = json!({"driver": "file", "filename": files[rng.below(3) as usize]});
            let below = if rng.below(2) == 0 { json!(name(&mut rng)) } else { file.clone() };
            let (command, args) = match rng.below(9) {
                0..=1 => {
                    options["driver"] = json!("file");
                    options["filename"] = file["filename"].clone();
                    ("blockdev-add", options)
                }
                2..=4 => {
                    options["driver"] = json!("raw");
                    options["file"] = below;
                    if rng.below(2) == 0 {
                        options["size"] = json!(512 * rng.below(3000));
                    }
                    ("blockdev-add", options)
                }
                5..=6 => ("blockdev-del", json!({"node-name": name(&mut rng)})),
                7 => {
                    let size = 512 * rng.below(4096);
                    ("block_resize", json!({"node-name": name(&mut rng), "size": size}))
                }
                _ => {
                    if rng.below(2) == 0 && !handles.is_empty() {
                        let at = rng.below(handles.len() as u64) as usize;
                        let handle = handles.swap_remove(at);
                        q.vm.graph.detach(&handle);
                    } else {
                        let node = q.vm.graph.find(&name(&mut rng)).cloned();
                        let (uses, shares) = (Perm(rng.below(16) as u8), Perm(rng.below(16) as u8));
                        let spec = HandleSpec { uses, shares, ..HandleSpec::default() };
                        handles.extend(q.vm.graph.attach(node, spec).ok());
                    }
                    continue;
                }
            };
            match q.run(command, args) {
                Ok(_) => done[0] += 1,
                Err(_) => {
                    done[1] += 1;
                    assert_eq!(q.names(), before, "half done");
                }
            }
            q.ok("query-blockstats", json!({"query-nodes": true}));
        }
        for handle in handles {
            q.vm.graph.detach(&handle);
        }
        // From the top down, as long as anything goes.
        while q.names().iter().any(|n| q.run("blockdev-del", json!({"node-name": n})).is_ok()) {}
        let left: Vec<_> = q.vm.graph.nodes().cloned().collect();
        for node in &left {
            let by_node = |p: &Parent| matches!(p, Parent::Node(..));
            assert!(q.vm.graph.parents(node).iter().any(by_node), "{} is left", node.name);
        }
        assert!(left.is_empty(), "{:?}", q.names());
        assert_eq!(open_fds(), 0);
    }
    eprintln!("{} commands did it, {} were refused", done[0], done[1]);
    assert!(done[0] > 200 && done[1] > 200);
}

#[test]
fn the_last_sector_of_a_window_is_a_whole_one() {
    let dir = Scratch::new("cmd-window");
    let mut q = Qmp::new();
    let path = dir.path("odd.raw");
    std::fs::write(&path, [7; 1000]).unwrap();
    let add = |offset: u64, size: Value| {
        let mut raw = json!({"driver": "raw", "node-name": "x", "offset": offset,
                             "file": {"driver": "file", "filename": path}});
        raw.as_object_mut().unwrap().extend(size.is_u64().then(|| ("size".to_string(), size)));
        raw
    };
    for (offset, size, want) in [
        (0, Value::Null, 1000),
        (511, Value::Null, 513),
        (1000, Value::Null, 24),
        (1001, Value::Null, 23),
        (512, json!(512), 512),
        (0, json!(1024), 1024),
    ] {
        q.ok("blockdev-add", add(offset, size));
        let x = q.vm.graph.find("x").unwrap().clone();
        assert_eq!(x.len(), want, "{offset}");
        let mut data = vec![1; want as usize];
        x.read(0, &mut crate::sys::iov::IovMut::from_slice(&mut data)).unwrap();
        let file = 1000_u64.saturating_sub(offset).min(want) as usize;
        assert!(data[..file].iter().all(|b| *b == 7) && data[file..].iter().all(|b| *b == 0));
        drop(x);
        q.ok("blockdev-del", json!({"node-name": "x"}));
    }
    for (offset, size, want) in [
        (1025, Value::Null, "Offset (1025) cannot be greater than size of the containing file (1024)"),
        (
            512,
            json!(1024),
            "The sum of offset (512) and size (1024) has to be smaller or equal to the  \
             actual size of the containing file (1024)",
        ),
    ] {
        assert_eq!(q.err("blockdev-add", add(offset, size)), want);
    }
    // A write there is not cut off.
    q.ok("blockdev-add", add(512, json!(512)));
    let x = q.vm.graph.find("x").unwrap();
    x.write(0, &crate::sys::iov::Iov::from_slice(&[9; 512]), crate::block::driver::Flags::NONE).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [[7; 512], [9; 512]].concat());
}

#[test]
fn what_is_tested_with_errors_is_reopened_too() {
    let dir = Scratch::new("cmd-reopen-blkdebug");
    let mut q = Qmp::new();
    let file = json!({"driver": "file", "node-name": "f", "filename": dir.file("f", 1 << 20)});
    q.ok("blockdev-add", file);
    let rule = json!([{"event": "read_aio", "errno": 5, "sector": 8}]);
    let node = json!({"driver": "blkdebug", "node-name": "b", "image": "f", "inject-error": rule});
    q.ok("blockdev-add", node.clone());
    for (key, value, want) in [
        ("read-only", json!(true), None),
        ("read-only", json!(false), None),
        ("discard", json!("unmap"), None),
        ("align", json!(4096), Some("Cannot change the option 'align'")),
        ("inject-error", json!([]), Some("Cannot change the option 'inject-error'")),
    ] {
        let mut other = node.clone();
        other[key] = value;
        let done = q.run("blockdev-reopen", json!({"options": [other]}));
        assert_eq!(done.err().map(|e| e.desc).as_deref(), want, "{key}");
    }
    assert!(!q.vm.graph.find("b").unwrap().read_only());
}

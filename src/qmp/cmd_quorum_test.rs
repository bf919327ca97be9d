use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};

/// Raw nodes `na`, `nb`, `nc` on three files.
fn three(dir: &Scratch) -> Qmp {
    let mut q = Qmp::new();
    for name in ["a", "b", "c"] {
        let file = json!({"driver": "file", "filename": dir.file(name, 1 << 20)});
        q.ok("blockdev-add", json!({"driver": "raw", "node-name": format!("n{name}"), "file": file}));
    }
    q
}

fn quorum(threshold: i64, children: Value) -> Value {
    json!({"driver": "quorum", "node-name": "q", "vote-threshold": threshold, "children": children})
}

#[test]
fn children_come_and_go() {
    let dir = Scratch::new("quorum-change");
    let mut q = three(&dir);
    q.ok("blockdev-add", quorum(1, json!(["na", "nb"])));
    let change = |q: &mut Qmp, args| q.run("x-blockdev-change", args).map_err(|e| e.desc);
    for (args, want) in [
        (json!({"parent": "q", "node": "nc"}), ""),
        (json!({"parent": "q", "node": "nc"}), "The node nc already has a parent"),
        (json!({"parent": "q", "child": "children.1"}), ""),
        (json!({"parent": "q", "child": "children.1"}), "Node 'q' does not have child 'children.1'"),
        (
            json!({"parent": "q", "child": "children.0", "node": "nb"}),
            "The parameters child and node are in conflict",
        ),
        (json!({"parent": "q"}), "Either child or node must be specified"),
        (json!({"parent": "no", "node": "nb"}), "Cannot find device='no' nor node-name='no'"),
        (json!({"parent": "q", "node": "no"}), "Node 'no' not found"),
        (json!({"parent": "na", "node": "nb"}), "The node na does not support adding a child"),
        (json!({"parent": "na", "child": "file"}), "The node na does not support removing a child"),
        (json!({"parent": "q", "node": "q"}), "Node 'q' would be its own child"),
        (json!({"parent": "q", "child": "children.0"}), ""),
        (
            json!({"parent": "q", "child": "children.2"}),
            "The number of children cannot be lower than the vote threshold 1",
        ),
        // Numbers are not used again, nor is one lost when a child is refused.
        (json!({"parent": "q", "node": "na"}), ""),
        (json!({"parent": "q", "child": "children.3"}), ""),
    ] {
        let seen = change(&mut q, args.clone()).err().unwrap_or_default();
        assert_eq!(seen, want, "{args}");
    }
    assert_eq!(q.err("blockdev-del", json!({"node-name": "nc"})), "Block device nc is in use");
    q.ok("blockdev-del", json!({"node-name": "q"}));
    q.ok("blockdev-del", json!({"node-name": "nc"}));
}

#[test]
fn inner_children_are_closed_when_they_go() {
    let dir = Scratch::new("quorum-inner");
    let mut q = three(&dir);
    let inner = json!({"driver": "file", "node-name": "inner", "filename": dir.file("i", 1 << 20)});
    q.ok("blockdev-add", quorum(1, json!(["na", inner])));
    q.ok("x-blockdev-change", json!({"parent": "q", "child": "children.1"}));
    assert!(q.vm.graph.find("inner").is_none());
}

#[test]
fn events_and_the_name_of_a_quorum() {
    let dir = Scratch::new("quorum-events");
    let mut q = three(&dir);
    let children = json!(["na", "nb", {"driver": "file", "filename": dir.path("c"), "node-name": "other"}]);
    q.ok("blockdev-del", json!({"node-name": "nc"}));
    let drive = json!({"id": "d0", "if": "none", "format": "quorum", "node-name": "q", "vote-threshold": 2,
                       "children": children, "read-pattern": "quorum"});
    q.vm.add_drive(drive.as_object().unwrap().clone()).unwrap();
    let name = q.ok("query-block", json!({}))[0]["inserted"]["file"].as_str().unwrap().to_string();
    let options: Value = serde_json::from_str(name.strip_prefix("json:").unwrap()).unwrap();
    assert_eq!(options["vote-threshold"], 2);
    assert_eq!(options["children"].as_array().unwrap().len(), 3);
    assert_eq!(options["children"][2], json!({"driver": "file", "filename": dir.path("c")}));
    let io = |q: &mut Qmp, line: &str| {
        q.ok("human-monitor-command", json!({"command-line": format!("qemu-io d0 \"{line}\"")}));
        q.vm.take_events();
        q.vm.outbox.drain(..).map(|e| (e.name, json!(e.data))).collect::<Vec<_>>()
    };
    assert_eq!(io(&mut q, "write -q -P 7 0 4k"), []);
    std::fs::write(dir.path("c"), vec![0; 1 << 20]).unwrap();
    let bad = |node: &str| json!({"type": "read", "node-name": node, "sector-num": 1, "sectors-count": 2});
    assert_eq!(io(&mut q, "read -q -P 7 600 600"), [("QUORUM_REPORT_BAD", bad("other"))]);
    std::fs::write(dir.path("b"), vec![1; 1 << 20]).unwrap();
    let failure = json!({"reference": "d0", "sector-num": 1, "sectors-count": 2});
    assert_eq!(io(&mut q, "read -q 600 600"), [("QUORUM_FAILURE", failure)]);
}

use super::*;
use crate::block::graph::Graph;
use crate::block::open;
use crate::control::formats::{BlockdevOptions, Formats, plan};
use crate::control::objects::Objects;
use crate::qapi::{Path, Wire};
use crate::sys::fdset::FdSets;

fn open(graph: &mut Graph, options: Value) -> Arc<Node> {
    let (mut fds, objects) = (FdSets::new(), Objects::default());
    let plan = plan(BlockdevOptions::take(options, &Path::Root).unwrap()).unwrap();
    open::add(graph, &Formats::new(&mut fds, &objects), plan).unwrap()
}

#[test]
fn a_plain_name_says_what_would_be_opened_by_it_and_nothing_else() {
    let mut graph = Graph::new();
    for (options, want) in [
        (json!({"driver": "null-co"}), "null-co://"),
        (json!({"driver": "null-aio", "latency-ns": 5}), "null-aio://"),
        (json!({"driver": "null-co", "size": 5}), r#"json:{"driver":"null-co","size":5}"#),
        (
            json!({"driver": "null-co", "read-zeroes": true}),
            r#"json:{"driver":"null-co","read-zeroes":true}"#,
        ),
        (json!({"driver": "raw", "file": {"driver": "null-co"}}), "null-co://"),
        (
            json!({"driver": "raw", "offset": 0, "file": {"driver": "null-co"}}),
            r#"json:{"driver":"raw","file":{"driver":"null-co"},"offset":0}"#,
        ),
        (
            // Only of a file by itself is the format's name the file's.
            json!({"driver": "raw", "file": {"driver": "raw", "file": {"driver": "null-co"}}}),
            r#"json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"null-co"}}}"#,
        ),
        (
            json!({"driver": "copy-on-read", "file": {"driver": "null-co"}}),
            r#"json:{"driver":"copy-on-read","file":{"driver":"null-co"}}"#,
        ),
    ] {
        assert_eq!(names(&open(&mut graph, options)).shown(), want);
    }
}

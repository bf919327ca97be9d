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

#[test]
fn nodes_with_many_ways_between_them_have_names_in_time() {
    let mut graph = Graph::new();
    let null = json!({"driver": "null-co", "node-name": "q0", "size": 1 << 20, "read-only": true});
    let bottom = open(&mut graph, null);
    graph.own(&bottom);
    for n in 1..40 {
        let raw = |side: &str| {
            let below = format!("q{}", n - 1);
            json!({"driver": "raw", "node-name": format!("{side}{n}"), "read-only": true, "file": below})
        };
        let sides = ["a", "b"].map(|side| open(&mut graph, raw(side)));
        sides.iter().for_each(|node| graph.own(node));
        let quorum = json!({"driver": "quorum", "node-name": format!("q{n}"), "read-only": true,
                            "vote-threshold": 1, "children": [format!("a{n}"), format!("b{n}")]});
        let quorum = open(&mut graph, quorum);
        graph.own(&quorum);
    }
    let top = graph.find("q39").unwrap().clone();
    assert!(names(&top).shown().len() < 1 << 20);
    assert_eq!(top.driver.info().actual_size, None, "null-co takes no space");
    // To change what is at the bottom everybody above is found, too.
    let quiesced = graph.quiesce(&[&graph.find("q0").unwrap().clone()], &[]);
    drop(quiesced);
    // To flush it would take for ever, as every other request.
    drop(graph);
}

use super::*;
use crate::machine::Accel;
use crate::machine::cpu::Topology;
use serde_json::json;

fn parse(text: &str, sets: &[&str]) -> Result<Config, String> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    Config::parse("c.toml", text, Path::new("/dir"), &sets)
}

fn error(text: &str) -> String {
    parse(text, &[]).map(|c| panic!("accepted: {c:?}")).unwrap_err()
}

#[test]
fn tables_come_in_the_order_of_the_file() {
    let config = parse(
        "[[drive]]\nid = 'b'\n[[device]]\ndriver = 'x'\n[machine]\nname = 'n'\ncpus = 2\n[[drive]]\nid = 'a'\nfile = 'f'\n\
         [[blockdev]]\ndriver = 'raw'\nbacking = ''\nsize = 18446744073709551615\n[blockdev.file]\nfilename = 'y'\n",
        &[],
    )
    .unwrap();
    let got: Vec<_> = config.tables.iter().map(|t| (t.kind, Value::Object(t.arguments.clone()))).collect();
    assert_eq!(
        got,
        [
            (Kind::Drive, json!({"id": "b"})),
            (Kind::Device, json!({"driver": "x"})),
            (Kind::Drive, json!({"id": "a", "file": "/dir/f"})),
            (
                Kind::Blockdev,
                json!({"driver": "raw", "backing": null, "size": u64::MAX, "file": {"filename": "/dir/y"}})
            ),
        ]
    );
    assert_eq!((config.settings.name.as_deref(), config.settings.topology.cpus()), (Some("n"), 2));
}

#[test]
fn objects_are_named_once_and_their_files_found_beside_the_configuration() {
    let config = parse("[[object]]\nqom-type = 'secret'\nid = 's'\nfile = 'key'\n", &[]).unwrap();
    let got = (config.tables[0].kind, Value::Object(config.tables[0].arguments.clone()));
    assert_eq!(got, (Kind::Object, json!({"qom-type": "secret", "id": "s", "file": "/dir/key"})));
    assert_eq!(
        error("[[object]]\nid = 's'\n[[object]]\nid = 's'\n"),
        "c.toml:4:6: [[object]] 'id': the object id 's' is taken already, at c.toml:2:6"
    );
}

#[test]
fn overrides_reach_every_part() {
    let text = "[[drive]]\nid = 'a'\nfile = 'f'\n[[blockdev]]\nnode-name = 'n'\nfile.filename = 'x'\n";
    let sets = [
        "machine.accel = 'none'",
        "drive.0.file = '/g'",
        "drive.1.id = 'new'",
        "blockdev.n.file.filename = '/y'",
        "qmp.0.socket = 's'",
        "drive.a.read-only = true",
    ];
    let config = parse(text, &sets).unwrap();
    assert_eq!(config.settings.accel, Accel::None);
    assert_eq!(config.qmp[0].end, QmpEnd::Socket("/dir/s".into()));
    let got: Vec<_> = config.tables.iter().map(|t| Value::Object(t.arguments.clone())).collect();
    assert_eq!(
        got,
        [
            json!({"id": "a", "file": "/g", "read-only": true}),
            json!({"node-name": "n", "file": {"filename": "/y"}}),
            json!({"id": "new"}),
        ]
    );
    for (set, want) in [
        ("drive.7.id = 'x'", "--set 'drive.7.id = 'x'': there is no element 7: the array has 1"),
        ("drive.q.id = 'x'", "--set 'drive.q.id = 'x'': no element has index, id or node-name 'q'"),
        (
            "machine.cpus = 65",
            "--set 'machine.cpus = 65': [machine] 'cpus' must be a number from 1 to 64, not 65",
        ),
        ("machine.name = vm7", "a string needs quotes"),
        ("", "sets nothing"),
        ("nope.x = 1", "unknown table 'nope'"),
    ] {
        let got = parse(text, &[set]).map(|c| panic!("accepted: {c:?}")).unwrap_err();
        assert!(got.contains(want), "{set}: {got}");
    }
}

#[test]
fn topology_is_filled_in_as_qemu_does() {
    for (text, want) in [
        ("cpus = 4", (4, 4, 1, 4, 1)),
        ("cpus = 2\nmax-cpus = 8\nsockets = 2", (2, 8, 2, 4, 1)),
        ("sockets = 2\ncores = 2\nthreads = 2", (8, 8, 2, 2, 2)),
        ("max-cpus = 6\ncores = 3", (6, 6, 2, 3, 1)),
        ("cpus = 1\nmax-cpus = 4\nthreads = 2", (1, 4, 1, 2, 2)),
        ("cpus = 1\nsockets = 2\ncores = 2", (1, 4, 2, 2, 1)),
    ] {
        let s = parse(&format!("[machine]\n{text}\n"), &[]).unwrap().settings;
        let (cpus, max, sockets, cores, threads) = want;
        let topology = Topology::new(max, Some(sockets), Some(cores), Some(threads)).unwrap();
        assert_eq!(s.topology, topology.with_present(cpus), "{text}");
        assert_eq!(s.topology.cpus(), cpus as usize, "{text}");
    }
    let text = "[machine]\ncpus = 3\nmax-cpus = 5\nsockets = 2\n";
    assert!(
        error(text).starts_with("c.toml:3:1: [machine] 'max-cpus' does not fit: Invalid CPU topology"),
        "{}",
        error(text)
    );
}

#[test]
fn an_error_of_a_command_is_placed_at_its_argument() {
    let config =
        parse("[[blockdev]]\ndriver = 'raw'\n  file.filename = 1\nlist = [{}, {a = 1}]\n", &[]).unwrap();
    let shown = |text: &str| config.sources.message(&config.tables[0].fault(text));
    assert_eq!(
        shown("Invalid parameter type for 'file.filename', expected: string"),
        "c.toml:3:8: [[blockdev]] 'file.filename' must be of type string"
    );
    assert_eq!(
        shown("Parameter 'list[1].a' is unexpected"),
        "c.toml:4:14: [[blockdev]] 'list[1].a' is unexpected"
    );
    assert_eq!(shown("Parameter 'node-name' is missing"), "c.toml:1:1: [[blockdev]] 'node-name' is missing");
    assert_eq!(shown("No such file"), "c.toml:1:1: [[blockdev]] No such file");
    let config = parse("[[drive]]\nid = 'd'\nfile = 'x.img'\n", &[]).unwrap();
    assert_eq!(
        config.sources.message(&config.tables[0].fault("Block node is read-only")),
        "c.toml:3:1: [[drive]] 'x.img': Block node is read-only (give it write permission, or say \
         read-only = true)"
    );
}

#[test]
fn deep_nesting_and_wrong_text_are_errors_not_crashes() {
    for bad in [
        format!("{}a = 1\n", "a.".repeat(100_000)),
        format!("a = {}{}\n", "[".repeat(100_000), "]".repeat(100_000)),
        "a = \"\\u0000".into(),
        "[machine]\nmemory = 99999999999999999999999\n".into(),
        "[machine]\nname = 1979-05-27\n".into(),
        "[machine]\nname = nan\n".into(),
    ] {
        assert!(error(&bad).starts_with("c.toml:"), "{}", error(&bad));
    }
}

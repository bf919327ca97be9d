//! The house rules that a compiler cannot watch: who may import whom, where `unsafe` may stand, how long a file gets.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Folders and files of `src`, lowest floor first. A file imports from its own floor's own folder and from lower floors.
const FLOORS: &[&[&str]] = &[
    &["error"],
    &["qapi"],
    &["sys"],
    &["event"],
    &["block", "net", "chardev", "machine"],
    &["qcow2", "nbd", "devices", "pci"],
    &["jobs"],
    &["virtio"],
    &["control"],
    &["qmp"],
    &["config", "args"],
    &["startup"],
    &["main", "lib"],
];

/// Where a system call, shared memory or KVM needs it, and nowhere else.
const UNSAFE: &[&str] = &[
    "sys/",
    "machine/kvm.rs",
    "machine/memory.rs",
    "machine/vcpu.rs",
    "virtio/queue.rs",
    "block/file.rs",
    "block/file_",
];

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            p if p.is_dir() => sources(&p, out),
            p if p.extension().is_some_and(|e| e == "rs") => out.push(p),
            _ => {}
        }
    }
}

/// (path below src, text) of everything that is not a test.
fn files() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&src, &mut paths);
    paths
        .into_iter()
        .map(|p| (p.strip_prefix(&src).unwrap().display().to_string(), fs::read_to_string(&p).unwrap()))
        .filter(|(name, _)| {
            !name.ends_with("_test.rs") && !name.contains("testing") && !name.contains("testkit")
        })
        .collect()
}

/// The text before an inline test module.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap()
}

fn assert_none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn imports_go_down() {
    let floor = |room: &str| FLOORS.iter().position(|f| f.contains(&room));
    let mut bad = Vec::new();
    for (name, text) in files() {
        let room = name.split(['/', '.']).next().unwrap();
        let room = if room.starts_with("config") { "config" } else { room };
        let Some(mine) = floor(room) else {
            bad.push(format!("src/{name}: no floor in this test's table"));
            continue;
        };
        for line in code(&text).lines().filter(|l| !l.trim_start().starts_with("//")) {
            for part in line.split("crate::").skip(1) {
                let to = part.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let Some(theirs) = floor(to) else { continue };
                if to != room && theirs >= mine && !line.contains("$crate") {
                    bad.push(format!("src/{name} imports {to}: {}", line.trim()));
                }
            }
        }
    }
    assert_none("imports that do not go down", bad);
}

#[test]
fn unsafe_stays_where_it_belongs() {
    let bad = files()
        .into_iter()
        .filter(|(name, _)| !UNSAFE.iter().any(|u| name.starts_with(u)))
        .flat_map(|(name, text)| {
            code(&text)
                .lines()
                .enumerate()
                .filter(|(_, l)| !l.trim_start().starts_with("//") && l.contains("unsafe "))
                .map(|(n, l)| format!("src/{name}:{}: {}", n + 1, l.trim()))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_none("unsafe outside its places", bad);
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let mut bad = Vec::new();
    for (name, text) in files() {
        let lines = code(&text).lines().count();
        if lines > 650 {
            bad.push(format!("src/{name} has {lines} lines: more than one idea?"));
        }
        if !text.starts_with("//!") {
            bad.push(format!("src/{name} does not begin with what it owns"));
        }
    }
    assert_none("files", bad);
}

#[test]
fn nothing_is_unfinished_or_asynchronous() {
    let words =
        ["todo!", "unimplemented!", "async fn", ".await;", ".await?", "tokio", "futures::", "#[ignore"];
    let bad = files()
        .into_iter()
        .flat_map(|(name, text)| {
            words
                .iter()
                .filter(|w| code(&text).contains(**w))
                .map(|w| format!("src/{name}: {w}"))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_none("unfinished or asynchronous code", bad);
}

#[test]
fn an_unwrap_says_why_it_cannot_fail() {
    let mut bad = Vec::new();
    for (name, text) in files() {
        let lines: Vec<&str> = code(&text).lines().collect();
        for (n, line) in lines.iter().enumerate() {
            let is_code = !line.trim_start().starts_with("//");
            if is_code && (line.contains(".unwrap()") || line.contains(".expect(")) {
                let explained =
                    line.contains("//") || lines[n.saturating_sub(4)..n].iter().any(|l| l.contains("//"));
                if !explained {
                    bad.push(format!("src/{name}:{}: {}", n + 1, line.trim()));
                }
            }
        }
    }
    assert_none("unwrap without a reason", bad);
}

#[test]
fn the_top_level_is_the_design_cards() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let allowed: BTreeSet<&str> =
        ["Cargo.toml", "Cargo.lock", "src", "tests", "fixtures", "Justfile", "README.md", "target"].into();
    let bad = fs::read_dir(top)
        .unwrap()
        .flatten()
        .map(|e| e.file_name().into_string().unwrap())
        .filter(|n| !n.starts_with('.') && !allowed.contains(n.as_str()))
        .collect();
    assert_none("top-level entries outside the design", bad);
}

/// Every direct dependency has its line with a reason in README's table.
#[test]
fn dependencies_are_accounted_for() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(top.join("Cargo.toml")).unwrap();
    let readme = fs::read_to_string(top.join("README.md")).unwrap();
    let table = readme.split("## Dependencies").nth(1).unwrap().split("\n## ").next().unwrap();
    let section = manifest.split("[dependencies]\n").nth(1).unwrap().split("\n[").next().unwrap();
    let bad = section
        .lines()
        .filter_map(|l| l.split_once(" =").map(|(name, _)| name.trim().to_string()))
        .filter(|name| !table.contains(name.as_str()))
        .collect();
    assert_none("dependencies without a reason in README.md", bad);
}

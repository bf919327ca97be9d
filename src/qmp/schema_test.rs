use super::*;
use crate::control::vm::Settings;
use crate::qmp::introspect;
use crate::wire_enum;
use serde_json::json;
use std::collections::{HashMap, HashSet};

wire_enum! {
    /// Kind.
    pub enum Kind {
        /// One.
        "one" One,
    }
}

commands! {
    /// A table for the test.
    static TEST;

    /// Adds.
    "add" | "x-add" => add {
        /// First.
        "first-number" a: i64,
        /// Second.
        b: Option<i64>,
    } -> i64;

    /// Whatever comes.
    oob "any" => any {
        /// Kind.
        kind: Kind,
        /// Others.
        rest: Rest,
    } -> Vec<String>;
}

fn add(_: &mut Cx, a: i64, b: Option<i64>) -> Result<i64> {
    Ok(a + b.unwrap_or(10))
}

fn any(_: &Yanks, _: Kind, rest: Rest) -> Result<Vec<String>> {
    Ok(rest.0.keys().cloned().collect())
}

fn run(command: &Command, args: Value) -> Result<Value> {
    let mut vm = Vm::new(Settings::default()).unwrap();
    let Value::Object(args) = args else { panic!("not an object") };
    (command.run)(&mut Cx { vm: &mut vm, conn: &mut Conn::new() }, args)
}

#[test]
fn arguments_come_to_the_handler() {
    assert_eq!(run(&TEST[0], json!({"first-number": 1, "b": 2})).unwrap(), json!(3));
    assert_eq!(run(&TEST[0], json!({"first-number": 1})).unwrap(), json!(11));
    assert_eq!(run(&TEST[1], json!({"kind": "one", "x": 1, "y": []})).unwrap(), json!(["x", "y"]));
    let error = |n: usize, v| run(&TEST[n], v).unwrap_err().desc;
    assert_eq!(error(0, json!({})), "Parameter 'first-number' is missing");
    assert_eq!(error(0, json!({"first-number": 1, "c": 2})), "Parameter 'c' is unexpected");
    assert_eq!(error(1, json!({"kind": "two"})), "Parameter 'kind' does not accept value 'two'");
    assert_eq!(
        (TEST[0].aliases, TEST[0].oob.is_some(), TEST[1].oob.is_some()),
        (&["x-add"][..], false, true)
    );
}

#[test]
fn every_name_is_there_once() {
    let mut seen = HashSet::new();
    for (name, c) in names() {
        assert!(seen.insert(name), "{name} is there twice");
        assert!(std::ptr::eq(find(name).unwrap(), c));
        assert!(!c.doc.is_empty(), "{name} has no documentation");
    }
    assert!(find("no-such").is_none());
}

#[test]
fn the_schema_defines_every_type_that_it_uses() {
    let all = introspect::schema();
    let names: HashSet<&str> = all.iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), all.len(), "a name is there twice");
    let mut used = Vec::new();
    for e in &all {
        for key in ["arg-type", "ret-type", "element-type"] {
            used.extend(e.get(key).and_then(Value::as_str));
        }
        for key in ["members", "variants"] {
            let list = e.get(key).and_then(Value::as_array).into_iter().flatten();
            used.extend(list.filter_map(|m| m.get("type").and_then(Value::as_str)));
        }
    }
    for name in used {
        assert!(names.contains(name), "type {name} is not defined");
    }
    for name in ["str", "any", "bool", "int", "null", "number"] {
        let e = all.iter().find(|e| e["name"] == name).unwrap();
        assert_eq!(e["meta-type"], "builtin");
    }
    let add_fd = all.iter().find(|e| e["name"] == "add-fd").unwrap();
    let arg = all.iter().find(|e| e["name"] == add_fd["arg-type"]).unwrap();
    assert_eq!(
        arg["members"],
        json!([{"name": "fdset-id", "type": "int", "default": null},
               {"name": "opaque", "type": "str", "default": null}])
    );
    // One object without members serves all commands without arguments.
    let arg_of = |name| &all.iter().find(|e| e["name"] == name).unwrap()["arg-type"];
    assert_eq!(arg_of("query-version"), arg_of("STOP"));
}

/// Types are told apart by name in the schema: two of one name must be the same.
#[test]
fn types_of_one_name_are_one_type() {
    fn shape(def: &Def) -> (Vec<&'static str>, Vec<Ty>) {
        match def {
            Def::Enum(words) => (words.iter().map(|w| w.name).collect(), Vec::new()),
            Def::Object(members) => {
                (members.iter().map(|m| m.name).collect(), members.iter().map(|m| m.ty).collect())
            }
            Def::Union { members, variants, .. } => (
                members.iter().map(|m| m.name).chain(variants.iter().map(|v| v.0)).collect(),
                members.iter().map(|m| m.ty).chain(variants.iter().map(|v| v.1)).collect(),
            ),
            Def::Alternate(branches) => (Vec::new(), branches.clone()),
        }
    }
    let mut seen: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut todo: Vec<Ty> = names().flat_map(|(_, c)| [c.args, c.returns]).collect();
    todo.extend(crate::qmp::event::EVENTS.iter().map(|e| e.data));
    while let Some(ty) = todo.pop() {
        match ty {
            Ty::Builtin(..) => {}
            Ty::Array(of) => todo.push(*of),
            Ty::Named(name, def) => {
                let (parts, types) = shape(&def());
                match seen.get(name) {
                    Some(other) => assert_eq!(*other, parts, "two types are named {name}"),
                    None => {
                        seen.insert(name, parts);
                        todo.extend(types);
                    }
                }
            }
        }
    }
    assert!(seen.len() > 20);
}

#[test]
fn the_reference_names_arguments_and_what_they_mean() {
    let text = introspect::help(Some("add-fd")).unwrap();
    for part in ["add-fd", "SCM_RIGHTS", "fdset-id (int, optional): The set's number.", "Returns AddfdInfo"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let all = introspect::help(None).unwrap();
    assert!(all.contains("EVENTS") && all.contains("query-fdsets") && all.contains("SHUTDOWN"));
    assert!(introspect::help(Some("no-such")).is_err());
}

use super::*;
use crate::{wire_alternate, wire_enum, wire_struct, wire_union};
use serde_json::json;

wire_enum! {
    /// Discard.
    pub enum Discard {
        /// No.
        "ignore" Ignore,
        /// Yes.
        "unmap" Unmap,
    }
    default Ignore
}

wire_struct! {
    /// Cache.
    pub struct Cache {
        /// O_DIRECT.
        direct: Option<bool>,
        /// Nothing.
        "no-flush" no_flush: Option<bool>,
    }
}

wire_struct! {
    /// File.
    pub struct FileOptions {
        /// Its name.
        filename: String,
        /// Any.
        aio: Option<Discard>,
    }
}

wire_struct! {
    /// Raw.
    pub struct RawOptions {
        /// Below.
        base: Flat<Generic>,
        /// Bytes.
        offset: Option<u64>,
    }
}

wire_struct! {
    /// Base of all formats.
    pub struct Generic {
        /// Below.
        file: Ref,
    }
}

wire_union! {
    /// A node.
    pub struct Options {}
    /// Its driver.
    "driver" => pub enum Driver as driver {
        /// A file.
        "file" File(FileOptions),
        /// Raw.
        "raw" Raw(Box<RawOptions>),
        /// Nothing.
        "none" None(Empty),
    }
    .. {
        /// Its name.
        "node-name" node_name: Option<String>,
        /// Cache.
        cache: Option<Cache>,
        /// Discard.
        discard: Option<Discard>,
    }
}

wire_alternate! {
    /// A node or its name.
    pub enum Ref {
        /// New.
        Definition(Box<Options>),
        /// Existing.
        Reference(String),
    }
}

wire_struct! {
    /// Numbers.
    pub struct Numbers {
        /// a
        a: Option<i64>,
        /// b
        b: Option<u64>,
        /// c
        c: Option<u32>,
        /// d
        d: Option<f64>,
        /// e
        e: Option<Vec<Discard>>,
        /// f
        f: Option<Vec<FileOptions>>,
        /// g
        g: Option<i32>,
    }
}

fn error<T: Wire>(v: Value) -> String {
    match T::take(v, &Path::Root) {
        Ok(_) => "accepted".to_string(),
        Err(e) => e.desc,
    }
}

#[test]
fn nested_options_are_read_and_written() {
    let v = json!({"driver": "raw", "node-name": "n", "offset": 512,
                   "file": {"driver": "file", "filename": "/x", "cache": {"direct": true}}});
    let options = Options::take(v.clone(), &Path::Root).unwrap();
    let Driver::Raw(raw) = &options.driver else { panic!("{options:?}") };
    assert_eq!((raw.offset, options.node_name.as_deref()), (Some(512), Some("n")));
    let Ref::Definition(file) = &raw.base.file else { panic!("{raw:?}") };
    assert_eq!((file.driver.word(), file.cache.as_ref().unwrap().direct), ("file", Some(true)));
    assert_eq!(options.give(), v);
}

#[test]
fn errors_are_qemus() {
    let table = [
        (json!({"node-name": "n"}), "Parameter 'driver' is missing"),
        (json!({"driver": "no-such"}), "Parameter 'driver' does not accept value 'no-such'"),
        (json!({"driver": 5}), "Invalid parameter type for 'driver', expected: string"),
        (json!({"driver": "file"}), "Parameter 'filename' is missing"),
        (json!({"driver": "file", "filename": "/x", "bogus": 1}), "Parameter 'bogus' is unexpected"),
        // The common members come first, then the driver's own, then those that nobody knows.
        (
            json!({"driver": "file", "bogus": 1, "node-name": 5}),
            "Invalid parameter type for 'node-name', expected: string",
        ),
        (
            json!({"driver": "file", "bogus": 1, "node-name": null}),
            "Invalid parameter type for 'node-name', expected: string",
        ),
        (json!({"driver": "file", "bogus": 1}), "Parameter 'filename' is missing"),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": 5}}),
            "Invalid parameter type for 'file.filename', expected: string",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "/x", "zz": 1}}),
            "Parameter 'file.zz' is unexpected",
        ),
        (json!({"driver": "raw", "file": 5}), "Invalid parameter type for 'file', expected: Ref"),
        (
            json!({"driver": "raw", "file": {"driver": "raw", "file": 5}}),
            "Invalid parameter type for 'file', expected: Ref",
        ),
        (json!({"driver": "raw", "file": {"driver": "raw"}}), "Parameter 'file.file' is missing"),
        (
            json!({"driver": "raw", "cache": {"direct": 1}, "file": "f"}),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "", "discard": "x"}}),
            "Parameter 'discard' does not accept value 'x'",
        ),
        (
            json!({"driver": "raw", "cache": [], "file": "f"}),
            "Invalid parameter type for 'cache', expected: object",
        ),
        (json!({"driver": "none", "file": "f"}), "Parameter 'file' is unexpected"),
        (json!({"driver": "none"}), "accepted"),
    ];
    for (v, text) in table {
        assert_eq!(error::<Options>(v.clone()), text, "{v}");
    }
}

#[test]
fn numbers_have_qemus_ranges_and_texts() {
    let table = [
        (json!({"a": i64::MIN}), "accepted"),
        (json!({"a": 1u64 << 63}), "Invalid parameter type for 'a', expected: integer"),
        (json!({"a": 1.0}), "Invalid parameter type for 'a', expected: integer"),
        (json!({"a": "5"}), "Invalid parameter type for 'a', expected: integer"),
        (json!({"a": true}), "Invalid parameter type for 'a', expected: integer"),
        (json!({"b": u64::MAX}), "accepted"),
        (json!({"b": -1}), "accepted"),
        (json!({"b": 1.5}), "Parameter 'b' expects uint64"),
        (json!({"b": "1M"}), "Parameter 'b' expects uint64"),
        (json!({"c": u64::MAX}), "Parameter 'c' expects uint32_t"),
        (json!({"c": -1}), "Parameter 'c' expects uint32_t"),
        (json!({"c": 1e20}), "Parameter 'c' expects uint64"),
        (json!({"c": u32::MAX}), "accepted"),
        (json!({"d": 5}), "accepted"),
        (json!({"d": "5"}), "Invalid parameter type for 'd', expected: number"),
        (json!({"e": "x"}), "Invalid parameter type for 'e', expected: array"),
        (json!({"e": ["unmap", "x"]}), "Parameter 'null' does not accept value 'x'"),
        (json!({"e": ["unmap", 1]}), "Invalid parameter type for 'e[1]', expected: string"),
        (json!({"f": [1]}), "Invalid parameter type for 'f[0]', expected: object"),
        (json!({"f": [{"filename": ""}, {}]}), "Parameter 'f[1].filename' is missing"),
        (json!({"g": 1u64 << 40}), "Parameter 'g' expects int32_t"),
        (json!([]), "Invalid parameter type for 'null', expected: object"),
    ];
    for (v, text) in table {
        assert_eq!(error::<Numbers>(v.clone()), text, "{v}");
    }
    assert_eq!(Numbers::take(json!({"b": -1}), &Path::Root).unwrap().b, Some(u64::MAX));
}

#[test]
fn enums_have_words_and_defaults() {
    assert_eq!(Discard::default(), Discard::Ignore);
    assert_eq!(Discard::from_word("unmap"), Some(Discard::Unmap));
    assert_eq!(Discard::ALL.iter().map(|d| d.as_str()).collect::<Vec<_>>(), ["ignore", "unmap"]);
}

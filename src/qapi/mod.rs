//! Typed values and their JSON form: the trait [`Wire`], and the macros that declare structs,
//! enums, unions and alternates the way QAPI does, once for reading, writing and introspection.
//!
//! Owns: QEMU's rules and texts for "this JSON value is not what was asked for" (they are those
//! of `qobject-input-visitor.c` in effect: members are checked in the order of their declaration:
//! missing, wrong type, bad value; then members that nobody asked for). Never: knows a command, a
//! socket or a device; stands on the lowest floor, so that option structs can live beside the
//! code that they are the options of. Threads: any. Locks: none.

mod builtin;
mod macros;

use crate::error::{Error, Result};
use serde_json::Map;
pub use serde_json::Value;
use std::fmt;

/// A JSON object.
pub type Object = Map<String, Value>;

/// Where in the arguments a value stands; for the error's text.
#[derive(Clone, Copy, Debug)]
pub enum Path<'a> {
    /// The whole.
    Root,
    /// A member of an object.
    Member(&'a Path<'a>, &'a str),
    /// An element of an array.
    Index(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    /// The member `name` of the object that stands here.
    pub fn member(&'a self, name: &'a str) -> Path<'a> {
        Path::Member(self, name)
    }

    /// Element `n` of the array that stands here.
    pub fn index(&'a self, n: usize) -> Path<'a> {
        Path::Index(self, n)
    }

    /// The last member's name alone; for an element of an array QEMU says `null`.
    pub fn last(&self) -> &'a str {
        match self {
            Path::Member(_, name) => name,
            Path::Root | Path::Index(..) => "null",
        }
    }

    /// `Invalid parameter type for 'x', expected: T`.
    pub fn wrong_type(&self, expected: &str) -> Error {
        Error::new(format!("Invalid parameter type for '{self}', expected: {expected}"))
    }

    /// `Parameter 'x' is missing`.
    pub fn missing(&self) -> Error {
        Error::new(format!("Parameter '{self}' is missing"))
    }

    /// `Parameter 'x' is unexpected`.
    pub fn unexpected(&self) -> Error {
        Error::new(format!("Parameter '{self}' is unexpected"))
    }

    /// `Parameter 'x' does not accept value 'word'`; names the last member only.
    pub fn bad_word(&self, word: &str) -> Error {
        Error::new(format!("Parameter '{}' does not accept value '{word}'", self.last()))
    }

    /// `Parameter 'x' expects T`.
    pub fn expects(&self, what: &str) -> Error {
        Error::new(format!("Parameter '{self}' expects {what}"))
    }
}

/// `file.filename`, `keys[0].data`; `null` for the whole.
impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => f.write_str("null"),
            Path::Member(Path::Root, name) => f.write_str(name),
            Path::Member(up, name) => write!(f, "{up}.{name}"),
            Path::Index(Path::Root, n) => write!(f, "[{n}]"),
            Path::Index(up, n) => write!(f, "{up}[{n}]"),
        }
    }
}

/// What a type looks like on the wire, for `query-qmp-schema` and the reference.
#[derive(Clone, Copy, Debug)]
pub enum Ty {
    /// `str`, `int`…: the name, the JSON type as the schema has it, and as errors name it.
    Builtin(&'static str, &'static str),
    /// An array of something.
    Array(&'static Ty),
    /// An enum, object, union or alternate. The function breaks cycles.
    Named(&'static str, fn() -> Def),
}

impl Ty {
    /// Could a value of this type begin like `v`? Decides between the branches of an alternate.
    pub fn accepts(&self, v: &Value) -> bool {
        match self {
            Ty::Array(_) => v.is_array(),
            Ty::Builtin(_, json) => match *json {
                "string" => v.is_string(),
                "boolean" => v.is_boolean(),
                "int" | "number" => v.is_number(),
                "null" => v.is_null(),
                _ => true,
            },
            Ty::Named(_, def) => match def() {
                Def::Enum(_) => v.is_string(),
                Def::Object(_) | Def::Union { .. } => v.is_object(),
                Def::Alternate(branches) => branches.iter().any(|b| b.accepts(v)),
            },
        }
    }
}

/// What a named type consists of.
#[derive(Clone, Debug)]
pub enum Def {
    /// Its words.
    Enum(Vec<Word>),
    /// Its members.
    Object(Vec<Member>),
    /// The members that all have, the name of the one that decides, and what follows from it.
    Union {
        /// Common members, the deciding one among them.
        members: Vec<Member>,
        /// Name of the deciding member.
        tag: &'static str,
        /// Word and members' type.
        variants: Vec<(&'static str, Ty)>,
    },
    /// One of these, by JSON type.
    Alternate(Vec<Ty>),
}

/// One word of an enum.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    /// As it is written.
    pub name: &'static str,
    /// Its documentation, line by line.
    pub doc: &'static [&'static str],
}

/// One member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// As it is written.
    pub name: &'static str,
    /// Its type.
    pub ty: Ty,
    /// It may be absent.
    pub optional: bool,
    /// Its documentation, line by line.
    pub doc: &'static [&'static str],
}

/// A type that has a JSON form.
pub trait Wire: Sized {
    /// How it is described.
    const TY: Ty;

    /// Makes it from JSON, or says what is wrong in QEMU's words.
    fn take(v: Value, at: &Path) -> Result<Self>;

    /// Its JSON form.
    fn give(self) -> Value;

    /// Takes it out of the object it is the member `name` of. Types that may be absent, or are
    /// spread over several members, have their own.
    fn take_member(from: &mut Object, name: &'static str, at: &Path) -> Result<Self> {
        match from.remove(name) {
            Some(v) => Self::take(v, &at.member(name)),
            None => Err(at.member(name).missing()),
        }
    }

    /// Puts it into `to` as member `name`.
    fn give_member(self, name: &'static str, to: &mut Object) {
        to.insert(name.to_string(), self.give());
    }

    /// Adds its description as member `name` to `to`.
    fn describe_member(name: &'static str, doc: &'static [&'static str], to: &mut Vec<Member>) {
        to.push(Member { name, ty: Self::TY, optional: false, doc });
    }
}

/// A type whose JSON form is an object with fixed members.
pub trait WireObject: Wire {
    /// Takes its members out of `from`, which may have others.
    fn take_members(from: &mut Object, at: &Path) -> Result<Self>;

    /// Puts its members into `to`.
    fn give_members(self, to: &mut Object);

    /// Its members, in order.
    fn members() -> Vec<Member>;
}

/// [`Wire::take`] for objects: the members, and nothing beside them.
pub fn take_object<T: WireObject>(v: Value, at: &Path) -> Result<T> {
    let Value::Object(mut map) = v else { return Err(at.wrong_type("object")) };
    let taken = T::take_members(&mut map, at)?;
    nothing_left(&map, at)?;
    Ok(taken)
}

/// Complains about the members that nobody took.
pub fn nothing_left(map: &Object, at: &Path) -> Result<()> {
    // With several, QEMU names any one of them (hash order).
    match map.keys().next_back() {
        Some(name) => Err(at.member(name).unexpected()),
        None => Ok(()),
    }
}

/// [`Wire::give`] for objects.
pub fn give_object<T: WireObject>(v: T) -> Value {
    let mut map = Object::new();
    v.give_members(&mut map);
    Value::Object(map)
}

/// [`Wire::take`] for enums: the word's number.
pub fn take_word(v: Value, words: &[&str], at: &Path) -> Result<usize> {
    let Value::String(word) = v else { return Err(at.wrong_type("string")) };
    words.iter().position(|w| *w == word).ok_or_else(|| at.bad_word(&word))
}

/// The built-in types, for introspection: clients expect them in every schema.
pub const BUILTINS: &[Ty] = &[String::TY, i64::TY, f64::TY, bool::TY, Null::TY, <Value as Wire>::TY];

pub use builtin::{Empty, Flat, Null, Rest};

#[cfg(test)]
#[path = "qapi_test.rs"]
mod tests;

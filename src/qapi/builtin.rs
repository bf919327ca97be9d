//! [`Wire`] for the built-in types of QAPI, and for the shapes that members come in.
//!
//! Owns: number ranges and their texts. Never: named types. Threads: any. Locks: none.

use super::*;

macro_rules! simple {
    ($T:ty, $name:literal, $json:literal, $expected:literal, $take:expr, $give:expr) => {
        impl Wire for $T {
            const TY: Ty = Ty::Builtin($name, $json);
            fn take(v: Value, at: &Path) -> Result<$T> {
                $take(v).ok_or_else(|| at.wrong_type($expected))
            }
            fn give(self) -> Value {
                $give(self)
            }
        }
    };
}

fn string(v: Value) -> Option<String> {
    match v {
        Value::String(s) => Some(s),
        _ => None,
    }
}

simple!(String, "str", "string", "string", string, Value::from);
simple!(bool, "bool", "boolean", "boolean", |v: Value| v.as_bool(), Value::from);
simple!(f64, "number", "number", "number", |v: Value| v.as_f64(), Value::from);
// A number written with a point or an exponent is never an integer, 1.0 included.
simple!(i64, "int", "int", "integer", |v: Value| v.as_i64(), Value::from);
simple!(Null, "null", "null", "null", |v: Value| v.is_null().then_some(Null), |_| Value::Null);

/// JSON's null: as a branch of an alternate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Null;

/// Any 64 bits: negative numbers are accepted, as QEMU does for the sake of its oldest clients.
fn uint64(v: &Value) -> Option<u64> {
    v.as_u64().or_else(|| v.as_i64().map(|n| n as u64))
}

impl Wire for u64 {
    const TY: Ty = Ty::Builtin("int", "int");
    fn take(v: Value, at: &Path) -> Result<u64> {
        uint64(&v).ok_or_else(|| at.expects("uint64"))
    }
    fn give(self) -> Value {
        Value::from(self)
    }
}

macro_rules! small {
    ($($T:ident $text:literal $wide:expr,)*) => { $(
        impl Wire for $T {
            const TY: Ty = Ty::Builtin("int", "int");
            fn take(v: Value, at: &Path) -> Result<$T> {
                // What is no 64-bit number is complained about as such, by its full name; one
                // that does not fit by the last name, as for enums.
                let wide = $wide(v, at)?;
                $T::try_from(wide)
                    .map_err(|_| Error::new(format!("Parameter '{}' expects {}", at.last(), $text)))
            }
            fn give(self) -> Value {
                Value::from(self)
            }
        }
    )* };
}

small! {
    u8 "uint8_t" u64::take,
    u16 "uint16_t" u64::take,
    u32 "uint32_t" u64::take,
    i8 "int8_t" i64::take,
    i16 "int16_t" i64::take,
    i32 "int32_t" i64::take,
}

/// Anything at all.
impl Wire for Value {
    const TY: Ty = Ty::Builtin("any", "value");
    fn take(v: Value, _: &Path) -> Result<Value> {
        Ok(v)
    }
    fn give(self) -> Value {
        self
    }
}

impl<T: Wire> Wire for Vec<T> {
    const TY: Ty = Ty::Array(&T::TY);
    fn take(v: Value, at: &Path) -> Result<Vec<T>> {
        let Value::Array(list) = v else { return Err(at.wrong_type("array")) };
        list.into_iter().enumerate().map(|(n, v)| T::take(v, &at.index(n))).collect()
    }
    fn give(self) -> Value {
        Value::Array(self.into_iter().map(T::give).collect())
    }
}

/// A member that may be absent. (null is not absence: it is a value of the wrong type.)
impl<T: Wire> Wire for Option<T> {
    const TY: Ty = T::TY;
    fn take(v: Value, at: &Path) -> Result<Option<T>> {
        T::take(v, at).map(Some)
    }
    fn give(self) -> Value {
        self.map_or(Value::Null, T::give)
    }
    fn take_member(from: &mut Object, name: &'static str, at: &Path) -> Result<Option<T>> {
        from.remove(name).map(|v| T::take(v, &at.member(name))).transpose()
    }
    fn give_member(self, name: &'static str, to: &mut Object) {
        if let Some(v) = self {
            v.give_member(name, to);
        }
    }
    fn describe_member(name: &'static str, doc: &'static [&'static str], to: &mut Vec<Member>) {
        to.push(Member { name, ty: T::TY, optional: true, doc });
    }
}

impl<T: Wire> Wire for Box<T> {
    const TY: Ty = T::TY;
    fn take(v: Value, at: &Path) -> Result<Box<T>> {
        T::take(v, at).map(Box::new)
    }
    fn give(self) -> Value {
        T::give(*self)
    }
}

impl<T: WireObject> WireObject for Box<T> {
    fn take_members(from: &mut Object, at: &Path) -> Result<Box<T>> {
        T::take_members(from, at).map(Box::new)
    }
    fn give_members(self, to: &mut Object) {
        T::give_members(*self, to);
    }
    fn members() -> Vec<Member> {
        T::members()
    }
}

/// A member of a Rust struct whose own members stand beside the others on the wire: QAPI's `base`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flat<T>(pub T);

impl<T: WireObject> Wire for Flat<T> {
    const TY: Ty = T::TY;
    fn take(v: Value, at: &Path) -> Result<Flat<T>> {
        T::take(v, at).map(Flat)
    }
    fn give(self) -> Value {
        self.0.give()
    }
    fn take_member(from: &mut Object, _: &'static str, at: &Path) -> Result<Flat<T>> {
        T::take_members(from, at).map(Flat)
    }
    fn give_member(self, _: &'static str, to: &mut Object) {
        self.0.give_members(to);
    }
    fn describe_member(_: &'static str, _: &'static [&'static str], to: &mut Vec<Member>) {
        to.extend(T::members());
    }
}

impl<T> std::ops::Deref for Flat<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// All the members that no earlier one took: for commands whose members are not fixed
/// (`device_add`). Must be the last field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rest(pub Object);

impl Wire for Rest {
    const TY: Ty = Ty::Builtin("any", "value");
    fn take(v: Value, at: &Path) -> Result<Rest> {
        match v {
            Value::Object(map) => Ok(Rest(map)),
            _ => Err(at.wrong_type("object")),
        }
    }
    fn give(self) -> Value {
        Value::Object(self.0)
    }
    fn take_member(from: &mut Object, _: &'static str, _: &Path) -> Result<Rest> {
        Ok(Rest(std::mem::take(from)))
    }
    fn give_member(mut self, _: &'static str, to: &mut Object) {
        to.append(&mut self.0);
    }
    fn describe_member(_: &'static str, _: &'static [&'static str], _: &mut Vec<Member>) {}
}

crate::wire_struct! {
    /// An object without members.
    pub struct Empty {}
}

/// The result of a command that answers with nothing but `{}`.
impl Wire for () {
    const TY: Ty = Empty::TY;
    fn take(v: Value, at: &Path) -> Result<()> {
        Empty::take(v, at).map(|_| ())
    }
    fn give(self) -> Value {
        Value::Object(Object::new())
    }
}

//! The macros that declare types with a JSON form. Their doc comments become the reference.
//!
//! A name on the wire that is not the Rust name stands before it: `"node-name" node_name: String`.

/// Declares a struct whose members are the members of a JSON object, in the order in which they
/// are checked. `Option<T>` may be absent, `Flat<T>` stands for T's own members.
///
/// ```
/// minivmm::wire_struct! {
///     /// Where a picture goes.
///     pub struct Target {
///         /// Path of the file.
///         filename: String,
///         /// Which head of the display.
///         "head-number" head: Option<u32>,
///     }
/// }
/// ```
#[macro_export]
macro_rules! wire_struct {
    (
        $(#[doc = $doc:literal])*
        $vis:vis struct $Name:ident { $(
            $(#[doc = $fdoc:literal])*
            $($wire:literal)? $field:ident : $T:ty
        ),* $(,)? }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $Name { $(
            $(#[doc = $fdoc])*
            pub $field: $T,
        )* }

        impl $crate::qapi::Wire for $Name {
            const TY: $crate::qapi::Ty = $crate::qapi::Ty::Named(stringify!($Name), || {
                $crate::qapi::Def::Object(<$Name as $crate::qapi::WireObject>::members())
            });
            fn take(
                v: ::serde_json::Value,
                at: &$crate::qapi::Path,
            ) -> $crate::error::Result<Self> {
                $crate::qapi::take_object(v, at)
            }
            fn give(self) -> ::serde_json::Value {
                $crate::qapi::give_object(self)
            }
        }

        impl $crate::qapi::WireObject for $Name {
            #[allow(unused_variables)]
            fn take_members(
                from: &mut $crate::qapi::Object,
                at: &$crate::qapi::Path,
            ) -> $crate::error::Result<Self> {
                Ok($Name { $(
                    $field: <$T as $crate::qapi::Wire>::take_member(
                        from,
                        $crate::wire_name!($($wire)? $field),
                        at,
                    )?,
                )* })
            }
            #[allow(unused_variables)]
            fn give_members(self, to: &mut $crate::qapi::Object) {
                $( $crate::qapi::Wire::give_member(
                    self.$field,
                    $crate::wire_name!($($wire)? $field),
                    to,
                ); )*
            }
            #[allow(unused_mut)]
            fn members() -> Vec<$crate::qapi::Member> {
                let mut list = Vec::new();
                $( <$T as $crate::qapi::Wire>::describe_member(
                    $crate::wire_name!($($wire)? $field),
                    &[$($fdoc),*],
                    &mut list,
                ); )*
                list
            }
        }
    };
}

/// Declares an enum whose values are words.
///
/// ```
/// minivmm::wire_enum! {
///     /// What is done about a failed request.
///     pub enum OnError {
///         /// The guest hears of it.
///         "report" Report,
///         /// The guest does not.
///         "ignore" Ignore,
///     }
///     default Report
/// }
/// ```
///
/// `wire_enum! { impl RunState { "paused" Paused, … } }` gives an enum that exists already its
/// words (all of its values must be named).
#[macro_export]
macro_rules! wire_enum {
    (
        $(#[doc = $doc:literal])*
        $vis:vis enum $Name:ident { $(
            $(#[doc = $vdoc:literal])*
            $word:literal $Value:ident
        ),* $(,)? }
        $(default $Default:ident)?
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $Name { $(
            $(#[doc = $vdoc])*
            $Value,
        )* }

        $crate::wire_enum! { impl $Name { $( $(#[doc = $vdoc])* $word $Value ),* } }

        $( impl Default for $Name {
            fn default() -> $Name {
                $Name::$Default
            }
        } )?

        impl $Name {
            /// All values.
            #[allow(dead_code)]
            pub const ALL: &'static [$Name] = &[$($Name::$Value),*];

            /// The word on the wire.
            #[allow(dead_code)]
            pub fn as_str(self) -> &'static str {
                match self { $( $Name::$Value => $word, )* }
            }

            /// The value of a word.
            #[allow(dead_code)]
            pub fn from_word(word: &str) -> Option<$Name> {
                match word { $( $word => Some($Name::$Value), )* _ => None }
            }
        }
    };
    (
        impl $Name:ident { $(
            $(#[doc = $vdoc:literal])*
            $word:literal $Value:ident
        ),* $(,)? }
    ) => {
        impl $crate::qapi::Wire for $Name {
            const TY: $crate::qapi::Ty = $crate::qapi::Ty::Named(stringify!($Name), || {
                $crate::qapi::Def::Enum(vec![
                    $( $crate::qapi::Word { name: $word, doc: &[$($vdoc),*] } ),*
                ])
            });
            fn take(
                v: ::serde_json::Value,
                at: &$crate::qapi::Path,
            ) -> $crate::error::Result<Self> {
                let all = [$($Name::$Value),*];
                Ok(all[$crate::qapi::take_word(v, &[$($word),*], at)?])
            }
            fn give(self) -> ::serde_json::Value {
                match self { $( $Name::$Value => $word.into(), )* }
            }
        }
    };
}

/// Declares a union: an object of which one member, the tag, decides about the others. The struct
/// has the members before the tag, then (after `..`) those after it, and the enum as one field.
///
/// ```
/// # use minivmm::qapi::Empty;
/// minivmm::wire_struct! {
///     /// Options of `tap`.
///     pub struct TapOptions {
///         /// The interface.
///         ifname: Option<String>,
///     }
/// }
/// minivmm::wire_union! {
///     /// A network backend.
///     pub struct Netdev {
///         /// Its name.
///         id: String,
///     }
///     /// What kind it is.
///     "type" => pub enum NetdevKind as kind {
///         /// A tap device of the host.
///         "tap" Tap(TapOptions),
///         /// Nothing at all.
///         "none" None(Empty),
///     }
///     .. {
///         /// After the tag in the order of checks.
///         "vhost-net" vhost: Option<bool>,
///     }
/// }
/// ```
///
/// Gives `Netdev { id, kind: NetdevKind, vhost }`; `kind.word()` is the tag's word.
#[macro_export]
macro_rules! wire_union {
    (
        $(#[doc = $doc:literal])*
        $vis:vis struct $Name:ident { $(
            $(#[doc = $fdoc:literal])*
            $($wire:literal)? $field:ident : $T:ty
        ),* $(,)? }
        $(#[doc = $kdoc:literal])*
        $tag:literal => $kvis:vis enum $Kind:ident as $kfield:ident { $(
            $(#[doc = $vdoc:literal])*
            $word:literal $Variant:ident ( $V:ty )
        ),* $(,)? }
        $( .. { $(
            $(#[doc = $adoc:literal])*
            $($awire:literal)? $afield:ident : $A:ty
        ),* $(,)? } )?
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $Name {
            $( $(#[doc = $fdoc])* pub $field: $T, )*
            $(#[doc = $kdoc])*
            pub $kfield: $Kind,
            $($( $(#[doc = $adoc])* pub $afield: $A, )*)?
        }

        $(#[doc = $kdoc])*
        #[derive(Clone, Debug, PartialEq)]
        $kvis enum $Kind { $(
            $(#[doc = $vdoc])*
            $Variant($V),
        )* }

        impl $Kind {
            /// The tag's words.
            #[allow(dead_code)]
            pub const WORDS: &'static [&'static str] = &[$($word),*];

            /// The tag's word for this value.
            #[allow(dead_code)]
            pub fn word(&self) -> &'static str {
                match self { $( $Kind::$Variant(_) => $word, )* }
            }
        }

        impl $crate::qapi::Wire for $Name {
            const TY: $crate::qapi::Ty = $crate::qapi::Ty::Named(stringify!($Name), || {
                $crate::qapi::Def::Union {
                    members: <$Name as $crate::qapi::WireObject>::members(),
                    tag: $tag,
                    variants: vec![$( ($word, <$V as $crate::qapi::Wire>::TY) ),*],
                }
            });
            fn take(
                v: ::serde_json::Value,
                at: &$crate::qapi::Path,
            ) -> $crate::error::Result<Self> {
                $crate::qapi::take_object(v, at)
            }
            fn give(self) -> ::serde_json::Value {
                $crate::qapi::give_object(self)
            }
        }

        impl $crate::qapi::WireObject for $Name {
            fn take_members(
                from: &mut $crate::qapi::Object,
                at: &$crate::qapi::Path,
            ) -> $crate::error::Result<Self> {
                $( let $field = <$T as $crate::qapi::Wire>::take_member(
                    from,
                    $crate::wire_name!($($wire)? $field),
                    at,
                )?; )*
                let word = match from.remove($tag) {
                    Some(v) => $crate::qapi::take_word(v, $Kind::WORDS, &at.member($tag))?,
                    None => return Err(at.member($tag).missing()),
                };
                $($( let $afield = <$A as $crate::qapi::Wire>::take_member(
                    from,
                    $crate::wire_name!($($awire)? $afield),
                    at,
                )?; )*)?
                // A function for each branch: here, where definitions nest, all of them together
                // would make a large stack frame.
                type Take = fn(&mut $crate::qapi::Object, &$crate::qapi::Path) -> $crate::error::Result<$Kind>;
                let mut branch: Option<Take> = None;
                let mut n = 0;
                $(
                    if n == word {
                        branch = Some(|from, at| {
                            <$V as $crate::qapi::WireObject>::take_members(from, at).map($Kind::$Variant)
                        });
                    }
                    n += 1;
                )*
                debug_assert!(n == $Kind::WORDS.len());
                // Every word has its branch: both lists come from the same macro arguments.
                let Some(take) = branch else { return Err(at.member($tag).missing()) };
                let $kfield = take(from, at)?;
                Ok($Name { $($field,)* $kfield, $($($afield,)*)? })
            }
            fn give_members(self, to: &mut $crate::qapi::Object) {
                $( $crate::qapi::Wire::give_member(
                    self.$field,
                    $crate::wire_name!($($wire)? $field),
                    to,
                ); )*
                to.insert($tag.to_string(), self.$kfield.word().into());
                $($( $crate::qapi::Wire::give_member(
                    self.$afield,
                    $crate::wire_name!($($awire)? $afield),
                    to,
                ); )*)?
                match self.$kfield { $(
                    $Kind::$Variant(v) => $crate::qapi::WireObject::give_members(v, to),
                )* }
            }
            fn members() -> Vec<$crate::qapi::Member> {
                let mut list = Vec::new();
                $( <$T as $crate::qapi::Wire>::describe_member(
                    $crate::wire_name!($($wire)? $field),
                    &[$($fdoc),*],
                    &mut list,
                ); )*
                list.push($crate::qapi::Member {
                    name: $tag,
                    ty: $crate::qapi::Ty::Named(stringify!($Kind), || {
                        $crate::qapi::Def::Enum(vec![
                            $( $crate::qapi::Word { name: $word, doc: &[$($vdoc),*] } ),*
                        ])
                    }),
                    optional: false,
                    doc: &[$($kdoc),*],
                });
                $($( <$A as $crate::qapi::Wire>::describe_member(
                    $crate::wire_name!($($awire)? $afield),
                    &[$($adoc),*],
                    &mut list,
                ); )*)?
                list
            }
        }
    };
}

/// Declares an alternate: one of several types, told apart by the JSON type of the value.
///
/// ```
/// # use minivmm::qapi::Null;
/// minivmm::wire_alternate! {
///     /// A string, or null for none.
///     pub enum StrOrNull {
///         /// The string.
///         Str(String),
///         /// None.
///         Null(Null),
///     }
/// }
/// ```
#[macro_export]
macro_rules! wire_alternate {
    (
        $(#[doc = $doc:literal])*
        $vis:vis enum $Name:ident { $(
            $(#[doc = $vdoc:literal])*
            $Variant:ident ( $V:ty )
        ),* $(,)? }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        $vis enum $Name { $(
            $(#[doc = $vdoc])*
            $Variant($V),
        )* }

        impl $crate::qapi::Wire for $Name {
            const TY: $crate::qapi::Ty = $crate::qapi::Ty::Named(stringify!($Name), || {
                $crate::qapi::Def::Alternate(vec![$( <$V as $crate::qapi::Wire>::TY ),*])
            });
            fn take(
                v: ::serde_json::Value,
                at: &$crate::qapi::Path,
            ) -> $crate::error::Result<Self> {
                $(
                    if <$V as $crate::qapi::Wire>::TY.accepts(&v) {
                        return Ok($Name::$Variant(<$V as $crate::qapi::Wire>::take(v, at)?));
                    }
                )*
                let last = at.last();
                Err($crate::error::Error::new(format!(
                    "Invalid parameter type for '{last}', expected: {}",
                    stringify!($Name),
                )))
            }
            fn give(self) -> ::serde_json::Value {
                match self { $(
                    $Name::$Variant(v) => $crate::qapi::Wire::give(v),
                )* }
            }
        }
    };
}

/// The name on the wire: the literal if there is one, else the Rust name.
#[doc(hidden)]
#[macro_export]
macro_rules! wire_name {
    ($wire:literal $field:ident) => {
        $wire
    };
    ($field:ident) => {
        stringify!($field)
    };
}

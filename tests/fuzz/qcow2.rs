//! libFuzzer's entry to the qcow2 targets; the first byte of an input chooses one.

#![no_main]

#[path = "../support/qcow2_fuzz.rs"]
mod fuzz;
#[path = "../support/qcow2.rs"]
mod support;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::any(input));

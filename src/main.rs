//! The `minivmm` program.
fn main() {}

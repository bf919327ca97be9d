//! The block layer: nodes in a graph, and the gate through which everybody reaches them.
//!
//! Knows no jobs, no guests and no QMP.
//!
//! Lock order (take only rightwards): `Ticket → Edge (clone, drop) → a driver's own locks →
//! bitmap list / stats / inbox`.

pub mod driver;
pub mod gate;
pub mod handle;
pub mod node;
mod serial;
pub mod stats;
#[cfg(test)]
pub mod testing;

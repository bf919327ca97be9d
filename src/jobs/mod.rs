//! Block jobs: long work on disks that go on being used.
//!
//! Each job has a thread of its own with blocking I/O; whatever has a name (the list of jobs, their
//! states, transactions, changes of the graph) is the control thread's. The two talk through one
//! small mutex per job, which is never held across I/O.
//!
//! Knows no QMP text beyond the errors a user sees, and no guests.

pub mod backup;
pub mod commit;
pub mod create;
mod crew;
pub mod filter;
pub mod job;
pub mod layers;
pub mod mirror;
pub mod mirror_top;
pub mod rate;
pub mod registry;
mod shared;
pub mod stream;
pub mod table;
mod txn;
mod verbs;

#[cfg(test)]
mod backup_image_test;
#[cfg(test)]
mod mutant_test;
#[cfg(test)]
mod pace_test;
#[cfg(test)]
mod stress_test;
#[cfg(test)]
mod testing;

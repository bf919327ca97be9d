//! The qcow2 image format, as a [`Driver`](crate::block::driver::Driver).

//! The one owner: the VM, its run state, and the event loop.

pub mod board;
pub mod devices;
pub mod drive_limits;
pub mod drive_options;
pub mod encrypt_options;
pub mod event_loop;
pub mod exports;
pub mod formats;
mod jobs;
mod json_name;
pub mod new_image;
pub mod objects;
pub mod qemu_io;
mod qemu_io_text;
pub mod secret;
pub mod state;
pub mod throttle_group;
pub mod vm;

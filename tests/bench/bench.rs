//! `just bench`: what minivmm costs, beside the raw floor (`floor.c`: only the KVM calls), a plain echo server, and QEMU
//! where it is installed. Every comparison runs the sides in turn, A B A B, in one run of this program, and is printed
//! as a ratio of medians: machines differ and drift, ratios less so.
//!
//! On a machine that does other things as well, start, fleet and qmp are best run in a real-time class
//! (`chrt -f 10 just bench start fleet qmp`): else they measure the others.
//!
//! `only=TEXT` of nbd: the rows of images whose names have the text (`raw`, `direct`); of jobs: of `cached`, `direct`, `sparse`,
//! `guest`, `speed`, which are pages. `size=MIB` (2048) of jobs: of their images.
//!
//!     cargo bench --bench bench -- [start|memory|fleet|qmp|disk|qcow2|jobs|nbd|throttle] … [rounds=N] [only=TEXT] [size=MIB]

mod disk;
mod fleet;
mod jobs;
mod jobs_guest;
mod jobs_speed;
mod memory;
mod nbd;
mod qcow2;
mod qmp;
mod start;
mod throttle;
mod util;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [role, socket] = args.as_slice()
        && role == "echo-server"
    {
        return qmp::echo_server(socket);
    }
    if let [role, socket, image, direct] = args.as_slice()
        && role == "nbd-floor"
    {
        return nbd::floor_server(socket, image, direct == "true");
    }
    let rounds =
        args.iter().find_map(|a| a.strip_prefix("rounds=")).map_or(30, |n| n.parse().expect("rounds=N"));
    let names: Vec<&str> = args.iter().map(String::as_str).filter(|a| !a.contains('=')).collect();
    let only = args.iter().find_map(|a| a.strip_prefix("only=")).unwrap_or_default();
    let size =
        args.iter().find_map(|a| a.strip_prefix("size=")).map_or(2048, |n| n.parse().expect("size=MIB"));
    let bench = util::Bench::new(rounds, only.into(), size);
    for (name, run) in [
        ("start", start::run as fn(&util::Bench)),
        ("memory", memory::run),
        ("fleet", fleet::run),
        ("qmp", qmp::run),
        ("disk", disk::run),
        ("qcow2", qcow2::run),
        ("jobs", jobs::run),
        ("nbd", nbd::run),
        ("throttle", throttle::run),
    ] {
        if names.is_empty() || names.contains(&name) {
            println!("== {name}");
            run(&bench);
        }
    }
}

use super::*;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::Node;
use crate::block::open::{self, Common, Env, PassedFd, Plan};
use crate::block::testing::{Mem, NoEnv};
use crate::block::throttle::{Group, Limit, Limits as Rates, Which};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One group.
struct One(Arc<Group>);

impl Env for One {
    fn layer(&self, format: &str, file: Child) -> Option<Plan> {
        NoEnv.layer(format, file)
    }
    fn parse(&self, options: Value) -> Result<Plan> {
        NoEnv.parse(options)
    }
    fn protocol(&self, driver: &str, filename: &str) -> Option<Plan> {
        NoEnv.protocol(driver, filename)
    }
    fn secret(&self, id: &str) -> Result<Vec<u8>> {
        NoEnv.secret(id)
    }
    fn throttle_group(&self, name: &str) -> Option<Arc<Group>> {
        (self.0.name == name).then(|| self.0.clone())
    }
    fn fdset(&self, path: &str, flags: i32) -> Result<PassedFd> {
        NoEnv.fdset(path, flags)
    }
}

fn group(which: Which, avg: u64) -> One {
    let group = Group::new("g");
    let mut rates = Rates::new(0);
    rates.set(which, Limit { avg, ..Limit::default() });
    group.set_limits(rates);
    One(group)
}

fn disk(graph: &mut Graph, env: &One, name: &str) -> Arc<Handle> {
    let mem = Node::new(format!("{name}-mem"), Box::new(Mem::new(65536)), Default::default());
    graph.add(mem.clone()).unwrap();
    graph.own(&mem);
    let driver = ThrottlePlan { file: Child::Node(mem.name.clone()), group: "g".into() };
    let common = Common { node_name: Some(name.into()), ..Common::default() };
    let node = open::add(graph, env, Plan { common, driver: Box::new(driver) }).unwrap();
    graph.attach(Some(node), HandleSpec::default()).unwrap()
}

#[test]
fn nodes_of_a_group_share_its_limits_alike() {
    let env = group(Which::OpsTotal, 500);
    let mut graph = Graph::new();
    let disks = [disk(&mut graph, &env, "a"), disk(&mut graph, &env, "b")];
    let stop = Arc::new(AtomicBool::new(false));
    let counts: Arc<[AtomicU64; 2]> = Arc::default();
    let start = Instant::now();
    // One disk has three threads, the other one.
    let threads: Vec<_> = [0, 0, 0, 1]
        .into_iter()
        .map(|n| {
            let (disk, stop, counts) = (disks[n].clone(), stop.clone(), counts.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    disk.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
                    counts[n].fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(1200));
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| t.join().unwrap());
    let seconds = start.elapsed().as_secs_f64();
    let [a, b] = [counts[0].load(Ordering::Relaxed), counts[1].load(Ordering::Relaxed)];
    let most = 500.0 * seconds + 50.0 + 8.0;
    assert!(((a + b) as f64) < most, "{a} + {b} in {seconds} s");
    assert!(a + b > 300, "{a} + {b} in {seconds} s");
    assert!(b * 2 > a, "the disk with one thread starved: {a} against {b}");
}

#[test]
fn whoever_waits_for_limits_does_not_hold_up_the_graph() {
    let env = group(Which::BpsWrite, 1000);
    let mut graph = Graph::new();
    let disk = disk(&mut graph, &env, "a");
    let guest = {
        let disk = disk.clone();
        // The second would wait for a minute.
        std::thread::spawn(move || {
            disk.write(0, &Iov::from_slice(&[1; 60_000]), Flags::NONE).unwrap();
            disk.write(0, &Iov::from_slice(&[2; 512]), Flags::NONE).unwrap();
        })
    };
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    let node = disk.node().unwrap();
    drop(graph.quiesce(&[&node], &[]));
    assert!(start.elapsed() < Duration::from_secs(10));
    guest.join().unwrap();
    graph.detach(&disk);
}

#[test]
fn a_group_has_to_exist_and_is_shown() {
    let env = group(Which::BpsWrite, 1000);
    let mut graph = Graph::new();
    let disk = disk(&mut graph, &env, "a");
    let driver = ThrottlePlan { file: Child::Node("a".into()), group: "h".into() };
    let common = Common { node_name: Some("b".into()), ..Common::default() };
    let e = open::add(&mut graph, &env, Plan { common, driver: Box::new(driver) }).err().unwrap();
    assert_eq!(e.to_string(), "Throttle group 'h' does not exist");
    assert_eq!(Value::Object(disk.node().unwrap().driver.own_options()), json!({ "throttle-group": "g" }));
    // A member keeps the group.
    assert!(Arc::strong_count(&env.0) > 1);
    assert!(Arc::ptr_eq(&graph.find_throttle_group("g").unwrap(), &env.0));
    graph.close_all();
    drop(disk);
    assert_eq!(Arc::strong_count(&env.0), 1);
}

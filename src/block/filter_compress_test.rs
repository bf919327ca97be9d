use super::*;
use crate::block::graph::Graph;
use crate::block::open::{self, Common, Plan};
use crate::block::testing::{NoEnv, Rng, Scratch};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::plan::Qcow2Plan;

fn common(name: &str) -> Common {
    Common { node_name: Some(name.into()), ..Common::default() }
}

#[test]
fn what_is_written_is_compressed_whatever_its_size() {
    const SIZE: u64 = (4 << 20) + 1000;
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let dir = Scratch::new("compress");
    let path = dir.file("image", 0);
    let mut graph = Graph::new();
    let file = Plan { common: common("f"), ..open::from_file_name(&NoEnv, &path).unwrap() };
    let file = open::add(&mut graph, &NoEnv, file).unwrap();
    create(&file, None, &CreateOptions { size: SIZE.next_multiple_of(512), ..CreateOptions::default() })
        .unwrap();
    let image = Plan { common: common("q"), driver: Box::new(Qcow2Plan::new(Child::Node("f".into()))) };
    open::add(&mut graph, &NoEnv, image).unwrap();
    let filter = CompressPlan { file: Child::Node("q".into()) };
    let filter =
        open::add(&mut graph, &NoEnv, Plan { common: common("c"), driver: Box::new(filter) }).unwrap();
    let len = filter.len();
    let mut model = vec![0u8; len as usize];
    let mut rng = Rng(seed + 1);
    for round in 1..60u8 {
        let n = 1 + rng.below(200_000);
        let off = rng.below(len - n);
        let (first, last) = (off as usize, (off + n) as usize);
        filter.write(off, &Iov::from_slice(&vec![round; n as usize]), Flags::NONE).unwrap();
        model[first..last].fill(round);
    }
    // The last cluster is not whole.
    filter.write(len - 100, &Iov::from_slice(&[77; 100]), Flags::NONE).unwrap();
    model[len as usize - 100..].fill(77);
    let mut all = vec![0; len as usize];
    filter.read(0, &mut IovMut::from_slice(&mut all)).unwrap();
    assert!(all == model);
    filter.flush().unwrap();
    let used = file.driver.info().actual_size.unwrap();
    let plain = model.chunks(65536).filter(|c| c.iter().any(|b| *b != 0)).count() as u64 * 65536;
    assert!(used < plain / 3 + (1 << 19), "{used} bytes for {plain}");
    drop((filter, file));
    graph.close_all();
}

#[test]
fn only_some_formats_can() {
    let dir = Scratch::new("compress-raw");
    let path = dir.file("image", 4096);
    let mut graph = Graph::new();
    let file = Child::New(Box::new(open::from_file_name(&NoEnv, &path).unwrap()));
    let plan = Plan { common: common("c"), driver: Box::new(CompressPlan { file }) };
    let e = open::add(&mut graph, &NoEnv, plan).err().unwrap();
    assert_eq!(e.to_string(), "Compression is not supported for underlying format: file");
    assert_eq!(graph.nodes().count(), 0);
}

use super::*;

fn topo(cpus: u32, s: Option<u32>, c: Option<u32>, t: Option<u32>) -> (u32, u32, u32) {
    Topology::new(cpus, s, c, t).unwrap().shape()
}

#[test]
fn what_is_not_said_of_the_topology_is_computed_as_qemu_does() {
    assert_eq!(topo(1, None, None, None), (1, 1, 1));
    assert_eq!(topo(8, None, None, None), (1, 8, 1));
    assert_eq!(topo(8, Some(2), None, None), (2, 4, 1));
    assert_eq!(topo(8, None, None, Some(2)), (1, 4, 2));
    assert_eq!(topo(8, None, Some(2), Some(2)), (2, 2, 2));
    assert_eq!(topo(8, Some(2), Some(2), None), (2, 2, 2));
    assert_eq!(topo(64, Some(4), Some(8), Some(2)), (4, 8, 2));
    let e = Topology::new(3, Some(2), None, None).unwrap_err().desc;
    assert_eq!(
        e,
        "Invalid CPU topology: product of the hierarchy must match maxcpus: \
         sockets (2) * cores (1) * threads (1) != maxcpus (3)"
    );
    for (n, s, c, t) in [(0, None, None, None), (1, Some(0), None, None), (65, None, None, None)] {
        assert!(Topology::new(n, s, c, t).is_err());
    }
    let max = Some(u32::MAX);
    for (s, c, t) in [(max, max, max), (max, max, None), (None, max, max), (max, None, max)] {
        assert!(Topology::new(64, s, c, t).is_err());
    }
}

fn all() -> Vec<Topology> {
    let mut out = Vec::new();
    for s in 1..=64 {
        for c in 1..=64 / s {
            for t in 1..=64 / s / c {
                out.push(Topology::new(s * c * t, Some(s), Some(c), Some(t)).unwrap());
            }
        }
    }
    out
}

#[test]
fn apic_ids_are_distinct_and_small_in_every_topology() {
    for t in all() {
        let ids: Vec<u32> = (0..t.cpus()).map(|n| t.apic_id(n)).collect();
        assert!(ids.windows(2).all(|w| w[0] < w[1]), "{t:?} {ids:?}");
        assert!(*ids.last().unwrap() < 255, "{t:?}");
    }
}

fn entry(function: u32, index: u32, regs: [u32; 4]) -> Entry {
    let [eax, ebx, ecx, edx] = regs;
    Entry { function, index, eax, ebx, ecx, edx, ..Entry::default() }
}

fn supported(vendor: &[u8; 12]) -> Vec<Entry> {
    let v = |n: usize| u32::from_le_bytes(vendor[4 * n..4 * n + 4].try_into().unwrap());
    vec![
        entry(0, 0, [0x1f, v(0), v(2), v(1)]),
        entry(1, 0, [0x806f8, 0x07_20_08_00, 0, 0]),
        // L1d, L2, L3 as a host with 2 threads a core and 32 a socket says it.
        entry(4, 0, [0x3c00_4121, 1, 2, 3]),
        entry(4, 2, [0x3c00_4143, 1, 2, 3]),
        entry(4, 3, [0x3c07_c163, 1, 2, 3]),
        entry(4, 4, [0; 4]),
        entry(0xb, 0, [1, 2, 0x100, 77]),
        entry(0x1f, 0, [1, 2, 0x100, 77]),
        entry(0x4000_0000, 0, [0, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x8000_0001, 0, [0; 4]),
        entry(0x8000_0008, 0, [0x3030, 0, 0x5077, 0]),
        entry(0x8000_001d, 3, [0x7c163, 0, 0, 0]),
        entry(0x8000_001e, 0, [77, 77, 77, 0]),
        entry(0x8000_0026, 0, [77, 77, 77, 77]),
    ]
}

fn get(cpuid: &[Entry], function: u32, index: u32) -> Entry {
    let found: Vec<_> = cpuid.iter().filter(|e| e.function == function && e.index == index).collect();
    assert_eq!(found.len(), 1, "{function:#x}.{index}");
    *found[0]
}

/// Takes the APIC id apart as the SDM's algorithm does, by leaf 0xb alone.
#[test]
fn leaf_b_leads_to_the_place_of_each_processor() {
    for t in all() {
        let base = common(&supported(b"GenuineIntel"), &t, true);
        let mut places = Vec::new();
        for n in 0..t.cpus() {
            let cpuid = for_cpu(&base, &t, n);
            for leaf in [0xb, 0x1f] {
                let (smt, core, end) = (get(&cpuid, leaf, 0), get(&cpuid, leaf, 1), get(&cpuid, leaf, 2));
                assert_eq!((smt.ecx, core.ecx, end.ecx, end.ebx), (0x100, 0x201, 2, 0));
                let (_, cores, threads) = t.shape();
                assert_eq!((smt.ebx, core.ebx), (threads, cores * threads));
                let id = smt.edx;
                let place =
                    (id >> core.eax, (id & ((1 << core.eax) - 1)) >> smt.eax, id & ((1 << smt.eax) - 1));
                assert_eq!(place, t.place(n));
                assert_eq!(get(&cpuid, 1, 0).ebx >> 24, id);
                places.push((leaf, place));
            }
        }
        places.sort();
        places.dedup();
        assert_eq!(places.len(), 2 * t.cpus());
    }
}

#[test]
fn nothing_of_the_host_s_topology_shines_through() {
    let t = Topology::new(8, Some(2), Some(2), Some(2)).unwrap();
    let base = common(&supported(b"GenuineIntel"), &t, true);
    let cpuid = for_cpu(&base, &t, 7);
    let one = get(&cpuid, 1, 0);
    assert_eq!((one.ebx, one.ecx, one.edx), (0x0704_0800, 1 << 31 | 1 << 24, 1 << 28));
    // L1 and L2 shared by the 2 threads of a core, L3 by the 4 of a socket; 2 cores a socket.
    for (index, eax) in [(0, 0x0400_4121), (2, 0x0400_4143), (3, 0x0400_c163), (4, 0)] {
        assert_eq!(get(&cpuid, 4, index).eax, eax, "{index}");
    }
    assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 0);
    assert_eq!(get(&cpuid, 0x4000_0000, 0).eax, 0x4000_0001);
    assert!(cpuid.iter().all(|e| e.function != 0x8000_0026));

    let amd = for_cpu(&common(&supported(b"AuthenticAMD"), &t, false), &t, 7);
    assert_eq!(get(&amd, 1, 0).ecx, 1 << 31);
    assert_eq!(get(&amd, 0x8000_0001, 0).ecx, 2);
    assert_eq!(get(&amd, 0x8000_0008, 0).ecx, 2 << 12 | 3);
    assert_eq!(get(&amd, 0x8000_001d, 3).eax, 0xc163);
    let e = get(&amd, 0x8000_001e, 0);
    assert_eq!((e.eax, e.ebx, e.ecx), (7, 0x101, 1));
}

#[test]
fn one_processor_has_no_siblings() {
    let t = Topology::default();
    let cpuid = for_cpu(&common(&supported(b"AuthenticAMD"), &t, true), &t, 0);
    assert_eq!(get(&cpuid, 1, 0).edx & 1 << 28, 0);
    assert_eq!(get(&cpuid, 1, 0).ebx, 0x0001_0800);
    assert_eq!(get(&cpuid, 4, 3).eax, 0x163);
    assert_eq!(get(&cpuid, 0x8000_0001, 0).ecx, 0);
    assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 0);
}

use super::*;
use crate::block::testing::Rng;

/// One flag per granule, and bytes.
struct Model {
    flags: Vec<bool>,
    granularity: u64,
    len: u64,
}

impl Model {
    fn new(granularity: u64, len: u64) -> Model {
        Model { flags: vec![false; len.div_ceil(granularity) as usize], granularity, len }
    }

    fn set(&mut self, off: u64, len: u64, to: bool) {
        for (n, flag) in self.flags.iter_mut().enumerate() {
            let at = n as u64 * self.granularity;
            if len > 0 && off < self.len && at < off.saturating_add(len) && off < at + self.granularity {
                *flag = to;
            }
        }
    }

    fn runs(&self) -> Vec<Range<u64>> {
        let mut out: Vec<Range<u64>> = Vec::new();
        for (n, _) in self.flags.iter().enumerate().filter(|(_, f)| **f) {
            let at = n as u64 * self.granularity;
            let end = (at + self.granularity).min(self.len);
            match out.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => out.push(at..end),
            }
        }
        out
    }
}

fn runs(b: &Bitmap) -> Vec<Range<u64>> {
    let (mut out, mut at) = (Vec::new(), 0);
    while let Some(run) = b.next_dirty(at, u64::MAX, u64::MAX) {
        at = run.end;
        out.push(run);
    }
    out
}

#[test]
fn random_operations_do_what_they_do_on_a_vector() {
    let seconds: u64 = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    while std::time::Instant::now() < end {
        eprintln!("SEED={seed}");
        one_run(&mut Rng(seed));
        seed += 1;
    }
}

fn one_run(rng: &mut Rng) {
    let granularity = 512u64 << rng.below(4);
    // Up to 80 Ki granules: more than two leaves.
    let max = granularity * [100, 5_000, 80_000][rng.below(3) as usize];
    let len = 1 + rng.below(max);
    let bitmap = Bitmap::new(Some("b"), granularity as u32, len).unwrap();
    let mut model = Model::new(granularity, len);
    for _ in 0..60 {
        let off = rng.below(model.len + granularity);
        let n = match rng.below(4) {
            0 => rng.below(3),
            1 => u64::MAX,
            _ => rng.below(model.len / 4 + 3),
        };
        match rng.below(10) {
            0..=3 => {
                bitmap.mark(off, n);
                model.set(off, n, true);
            }
            4 | 5 => {
                bitmap.clear(off, n);
                model.set(off, n, false);
            }
            6 => {
                let was =
                    model.flags.get((off / granularity) as usize).is_some_and(|f| *f && off < model.len);
                assert_eq!(bitmap.is_dirty(off), was);
                assert_eq!(bitmap.take(off), was);
                model.set(off, 1, false);
            }
            7 => {
                let len = 1 + rng.below(max);
                bitmap.resize(len);
                model.flags.resize(len.div_ceil(granularity) as usize, false);
                model.len = len;
            }
            8 => {
                // Another granularity, and back through bytes.
                let fine = 512u64 << rng.below(5);
                let other = Bitmap::new(None, fine as u32, model.len).unwrap();
                let mut theirs = Model::new(fine, model.len);
                other.mark(off, n);
                theirs.set(off, n, true);
                bitmap.merge(&other);
                theirs.runs().iter().for_each(|r| model.set(r.start, r.end - r.start, true));
            }
            _ => {
                let mut bytes = vec![0xff; model.flags.len().div_ceil(8) + 9];
                let any = bitmap.save(0, &mut bytes);
                assert_eq!(any, model.flags.iter().any(|f| *f));
                for (n, flag) in model.flags.iter().enumerate() {
                    assert_eq!(bytes[n / 8] >> (n % 8) & 1 != 0, *flag, "bit {n}");
                }
                let copy = Bitmap::new(None, granularity as u32, model.len).unwrap();
                // What lies beyond the end is not believed.
                let last = bytes.len() - 1;
                bytes[last] = 0xff;
                let half = bytes.len() / 16 * 8;
                copy.load(0, &bytes[..half]);
                copy.load(half as u64 * 8, &bytes[half..]);
                assert_eq!(runs(&copy), model.runs());
                assert_eq!(copy.count(), bitmap.count());
            }
        }
        assert_eq!(runs(&bitmap), model.runs());
        let dirty = model.flags.iter().filter(|f| **f).count() as u64;
        assert_eq!(bitmap.count(), dirty * granularity);
        // A part of it, in pieces.
        let (from, max) = (rng.below(model.len), granularity * (1 + rng.below(5)));
        let end = from + rng.below(model.len);
        let want = model.runs().into_iter().find(|r| r.end > from && r.start < end);
        let want = want.map(|r| {
            let first = r.start.max(from / granularity * granularity);
            r.start.max(from)..r.end.min(first + max).min(end)
        });
        assert_eq!(bitmap.next_dirty(from, end, max), want, "{from}..{end} at most {max}");
        let clean = (from / granularity..model.flags.len() as u64).find(|g| !model.flags[*g as usize]);
        let clean = clean.map(|g| (g * granularity).max(from)).filter(|c| *c < end.min(model.len));
        assert_eq!(bitmap.next_clean(from, end), clean);
    }
}

#[test]
fn a_terabyte_takes_two_megabytes_and_an_empty_one_nothing() {
    let bitmap = Bitmap::new(None, 65536, 1 << 40).unwrap();
    let memory = |b: &Bitmap| {
        let bits = b.read();
        let branches = bits.tree.iter().filter_map(|b| b.get());
        let leaves = branches.clone().flat_map(|b| b.iter()).filter(|l| l.get().is_some()).count();
        bits.tree.capacity() * 16 + branches.count() * size_of::<Branch>() + leaves * size_of::<Leaf>()
    };
    assert!(memory(&bitmap) < 4096);
    bitmap.mark(1 << 39, 1);
    assert!(memory(&bitmap) < 16384);
    bitmap.mark(0, u64::MAX);
    assert_eq!(bitmap.count(), 1 << 40);
    assert!(memory(&bitmap) < 5 << 19, "{}", memory(&bitmap));
    // At the finest granularity the directory alone stays small.
    let fine = Bitmap::new(None, 512, 1 << 46).unwrap();
    assert!(memory(&fine) < 2 << 20);
    assert_eq!(fine.next_dirty(0, u64::MAX, u64::MAX), None);
    assert!(Bitmap::new(None, 512, 1 << 62).is_err());
}

#[test]
fn what_cannot_be_a_granularity() {
    for g in [0, 1, 256, 511, 513, 3 << 20] {
        let e = Bitmap::new(None, g, 1 << 20).err().unwrap();
        assert_eq!(e.desc, "Granularity must be power of 2 and at least 512");
    }
    let big = Bitmap::new(None, 1 << 31, 1 << 20).unwrap();
    big.mark(7, 1);
    assert_eq!((big.count(), big.next_dirty(0, u64::MAX, 1)), (1 << 31, Some(0..1 << 20)));
}

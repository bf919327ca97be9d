//! A driver's end of a split virtqueue (virtio 1.2, 2.7), by hand, for tests: it can do right and
//! it can do wrong. Knows nothing but how to read and write guest memory.

/// A descriptor goes on.
pub const NEXT: u16 = 1;
/// A descriptor that the device writes.
pub const WRITE: u16 = 2;
/// A descriptor that points to a table.
pub const INDIRECT: u16 = 4;

/// How the driver reaches memory.
pub trait Memory {
    /// All of `to`, from `addr` on; panics outside memory.
    fn get(&self, addr: u64, to: &mut [u8]);
    /// All of `from`, to `addr` on; panics outside memory.
    fn put(&self, addr: u64, from: &[u8]);
}

/// A part of a request: where, how long, and whether the device writes it.
pub type Piece = (u64, u32, bool);

/// One queue. The parts lie one after another from `base` on.
pub struct Ring<M> {
    mem: M,
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    free: Vec<u16>,
    next: Vec<Option<u16>>,
    avail_idx: u16,
    used_idx: u16,
}

impl<M: Memory> Ring<M> {
    /// An empty ring at `base`, a multiple of 16.
    pub fn new(mem: M, size: u16, base: u64) -> Ring<M> {
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let (free, next) = ((0..size).rev().collect(), vec![None; usize::from(size)]);
        let ring = Ring { mem, size, desc: base, avail, used, free, next, avail_idx: 0, used_idx: 0 };
        ring.mem.put(base, &vec![0; (ring.end() - base) as usize]);
        ring
    }

    /// The first address behind it.
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    /// Writes descriptor `n` of the table at `table`.
    pub fn describe_in(&self, table: u64, n: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut d = [0; 16];
        d[..8].copy_from_slice(&addr.to_le_bytes());
        d[8..12].copy_from_slice(&len.to_le_bytes());
        d[12..14].copy_from_slice(&flags.to_le_bytes());
        d[14..].copy_from_slice(&next.to_le_bytes());
        self.mem.put(table + 16 * u64::from(n), &d);
    }

    /// Writes descriptor `n` of the ring's table.
    pub fn describe(&self, n: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.describe_in(self.desc, n, addr, len, flags, next);
    }

    /// Free descriptors.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// A chain of free descriptors; its head. None when there are too few.
    pub fn chain(&mut self, pieces: &[Piece]) -> Option<u16> {
        if self.free.len() < pieces.len() {
            return None;
        }
        let mine = self.free.split_off(self.free.len() - pieces.len());
        for (i, ((addr, len, write), n)) in pieces.iter().zip(&mine).enumerate() {
            let next = mine.get(i + 1).copied();
            let flags = if *write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.describe(*n, *addr, *len, flags, next.unwrap_or(0));
            self.next[usize::from(*n)] = next;
        }
        Some(mine[0])
    }

    /// One descriptor that points to a table with `pieces`, at `table`.
    pub fn indirect(&mut self, pieces: &[Piece], table: u64) -> Option<u16> {
        let head = self.free.pop()?;
        for (i, (addr, len, write)) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe_in(table, i as u16, *addr, *len, flags, i as u16 + 1);
        }
        self.describe(head, table, 16 * pieces.len() as u32, INDIRECT, 0);
        self.next[usize::from(head)] = None;
        Some(head)
    }

    /// Makes `head` available.
    pub fn offer(&mut self, head: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.mem.put(at, &head.to_le_bytes());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index, right or wrong.
    pub fn set_avail_idx(&mut self, idx: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.avail_idx = idx;
        self.mem.put(self.avail + 2, &idx.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// The available index.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// The used ring's index, as the device wrote it.
    pub fn used_idx(&self) -> u16 {
        let mut idx = [0; 2];
        self.mem.get(self.used + 2, &mut idx);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        u16::from_le_bytes(idx)
    }

    /// The next answer: head, and length written. Its descriptors are free again.
    pub fn answer(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.used_idx_seen() {
            return None;
        }
        let mut element = [0; 8];
        self.mem.get(self.used + 4 + 8 * u64::from(self.used_idx % self.size), &mut element);
        self.used_idx = self.used_idx.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        let head = u16::try_from(word(0)).expect("an answer to a request that never was");
        let mut n = Some(head);
        while let Some(d) = n {
            assert!(!self.free.contains(&d), "answered twice");
            self.free.push(d);
            n = self.next[usize::from(d)].take();
        }
        Some((head, word(4)))
    }

    /// Answers taken so far.
    pub fn used_idx_seen(&self) -> u16 {
        self.used_idx
    }
}

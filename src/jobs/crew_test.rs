//! Work that copies nothing, by several threads.

use super::super::job::Work;
use super::super::registry::{JobEvent, JobKey, Jobs, Spec};
use super::super::table::Kind;
use super::*;
use crate::block::driver::Perm;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::NodeOptions;
use crate::block::testing::Mem;
use crate::event::{Event, Events};
use crate::sys::inbox::Inbox;
use crate::sys::iov::IovMut;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread::{ThreadId, current, sleep};

type Run = Box<dyn FnMut(&JobCtx) -> Result<(), Stop> + Send>;

struct Script(Run);

impl Work for Script {
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        (self.0)(cx)
    }
}

/// The control thread's things, with a disk and its user.
struct Desk {
    jobs: Jobs,
    graph: Graph,
    events: Events,
    disk: Arc<Handle>,
    node: Arc<Node>,
}

impl Desk {
    fn new() -> Desk {
        let mut graph = Graph::new();
        let node = Node::new("disk", Box::new(Mem::new(4096)), NodeOptions::default());
        graph.add(node.clone()).unwrap();
        let spec = HandleSpec { uses: Perm::CONSISTENT_READ, ..HandleSpec::default() };
        let disk = graph.attach(Some(node.clone()), spec).unwrap();
        Desk { jobs: Jobs::new(), graph, events: Arc::new(Inbox::new().unwrap()), disk, node }
    }

    fn crew(&self) -> Arc<Crew> {
        Arc::new(Crew::new(&self.graph, &self.node))
    }

    fn start(&mut self, run: impl FnMut(&JobCtx) -> Result<(), Stop> + Send + 'static) -> JobKey {
        let spec = Spec::new("j", Kind::Stream);
        let work = Box::new(Script(Box::new(run)));
        let key = self.jobs.create(spec, &self.events.clone(), &[], || Ok(work)).unwrap();
        self.jobs.start(&mut self.graph, key);
        key
    }

    /// Turns until there is something; what went wrong, if it was the end.
    fn until<T>(&mut self, mut done: impl FnMut(&mut Desk, &[JobEvent]) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            for event in self.events.take() {
                if let Event::Job(serial) = event {
                    self.jobs.serve(&mut self.graph, serial);
                }
            }
            let out = std::mem::take(&mut self.jobs.out);
            if let Some(what) = done(self, &out) {
                return what;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", self.jobs.query());
            sleep(Duration::from_millis(1));
        }
    }

    /// How the job ended.
    fn end(&mut self) -> Option<String> {
        self.until(|_, out| {
            out.iter().find_map(|e| match e {
                JobEvent::Completed(_, why) => Some(why.clone()),
                _ => None,
            })
        })
    }
}

/// What steps write down.
#[derive(Default)]
struct Book {
    pieces: Mutex<Vec<Range<u64>>>,
    threads: Mutex<HashSet<ThreadId>>,
    inside: AtomicUsize,
    most: AtomicUsize,
}

impl Book {
    fn piece(&self, range: Range<u64>, time: Duration) {
        let now = self.inside.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
        sleep(time);
        self.inside.fetch_sub(1, SeqCst);
        lock(&self.threads).insert(current().id());
        lock(&self.pieces).push(range);
    }

    /// Every byte was in one piece.
    fn check(&self, len: u64) {
        let mut pieces = lock(&self.pieces).clone();
        pieces.sort_by_key(|r| r.start);
        let end = pieces.iter().fold(0, |at, r| {
            assert_eq!(r.start, at, "{pieces:?}");
            r.end
        });
        assert_eq!(end, len);
    }
}

const MS: Duration = Duration::from_millis(1);

fn next(todo: &Todo, n: u64) -> Option<Range<u64>> {
    todo.take(|_, len| Ok(((), n.min(len)))).map(|(range, _)| range)
}

#[test]
fn a_free_disk_has_several_pieces_under_way() {
    together(|_| {});
}

#[test]
fn another_job_is_no_user_of_the_disk() {
    // As one above this one reads what it copies.
    together(|disk| disk.read(0, &mut IovMut::from_slice(&mut [0; 512])).unwrap());
}

/// A job for which several threads work, whatever each does with the disk in every piece.
fn together(each: impl Fn(&Handle) + Send + Sync + 'static) {
    let mut desk = Desk::new();
    let (crew, book) = (desk.crew(), Arc::new(Book::default()));
    let (written, disk) = (book.clone(), desk.disk.clone());
    desk.start(move |cx| {
        let todo = Todo::new(1001);
        let failed = crew.work::<()>(cx, || {
            let Some(range) = next(&todo, 10) else { return Ok(None) };
            each(&disk);
            written.piece(range, MS * 3);
            Ok(Some(10))
        })?;
        assert!(failed.is_empty());
        Ok(())
    });
    assert_eq!(desk.end(), None);
    book.check(1001);
    assert_eq!(book.most.load(SeqCst), HANDS, "pieces at a time");
    assert_eq!(lock(&book.threads).len(), HANDS);
}

#[test]
fn what_has_failed_is_handed_back_and_done_again() {
    let mut desk = Desk::new();
    let (crew, book) = (desk.crew(), Arc::new(Book::default()));
    let written = book.clone();
    desk.start(move |cx| {
        let (todo, tries) = (Todo::new(400), AtomicU64::new(0));
        let mut rounds = 0;
        loop {
            let failed = crew.work(cx, || {
                let Some(range) = next(&todo, 10) else { return Ok(None) };
                if tries.fetch_add(1, SeqCst) % 5 == 4 {
                    return Err(range);
                }
                written.piece(range, MS);
                Ok(Some(10))
            })?;
            if failed.is_empty() {
                assert!(todo.is_empty() && rounds > 1, "{rounds}");
                return Ok(());
            }
            assert_eq!(written.inside.load(SeqCst), 0, "somebody is at it still");
            rounds += 1;
            failed.into_iter().for_each(|range| todo.give_back(range));
        }
    });
    assert_eq!(desk.end(), None);
    book.check(400);
}

#[test]
fn a_place_that_cannot_be_looked_at_is_a_piece() {
    let todo = Todo::new(PIECE + 5);
    let (range, what) = todo.take::<()>(|_, _| Err(io::ErrorKind::Other.into())).unwrap();
    assert!(what.is_err() && range == (0..PIECE));
    assert_eq!(next(&todo, u64::MAX), Some(PIECE..PIECE + 5));
    assert!(todo.is_empty() && next(&todo, 1).is_none());
    todo.give_back(0..7);
    todo.give_back(9..9);
    // Nothing is no answer.
    assert_eq!((next(&todo, 0), next(&todo, 9)), (Some(0..1), Some(1..7)));
}

#[test]
fn a_used_disk_is_left_to_its_users_after_each_piece() {
    rests(Duration::from_millis(5), false);
}

#[test]
fn who_copies_for_the_job_is_left_alone_for_longer() {
    rests(Duration::from_millis(1), true);
}

/// Steps of such a time on a disk that others use, who copy for the job, too, perhaps.
fn rests(each: Duration, helped: bool) {
    let least = if helped { each * REST_OF_HELPED } else { each };
    assert!(least < USED, "the disk, which is read in steps, would not count as used after a rest");
    let mut desk = Desk::new();
    let (crew, book, disk) = (desk.crew(), Arc::new(Book::default()), desk.disk.clone());
    let (written, short) = (book.clone(), Arc::new(AtomicU64::new(0)));
    let hurried = short.clone();
    let theirs = crew.clone();
    desk.start(move |cx| {
        // When the last piece ended, and whether the one before it was so long ago, on a busy machine, that
        // the disk did not count as used any more: the next one comes at once then.
        let (todo, last) = (Todo::new(30), Mutex::new(None::<(Instant, bool)>));
        crew.work::<()>(cx, || {
            let Some(range) = next(&todo, 1) else { return Ok(None) };
            let rest = lock(&last).take().map(|(end, late)| (end.elapsed(), late));
            hurried.fetch_add(u64::from(rest.is_none_or(|(time, late)| time < least && !late)), SeqCst);
            // What somebody else does meanwhile.
            let read = || disk.read(0, &mut IovMut::from_slice(&mut [0; 512]));
            std::thread::scope(|scope| scope.spawn(read).join().unwrap().unwrap());
            if helped {
                theirs.was_helped();
            }
            written.piece(range, each);
            *lock(&last) = Some((Instant::now(), rest.is_some_and(|(time, _)| time >= USED)));
            Ok(Some(1))
        })?;
        Ok(())
    });
    assert_eq!(desk.end(), None);
    book.check(30);
    assert_eq!(book.most.load(SeqCst), 1, "pieces at a time");
    // The first piece has nothing before it, and after it nobody knew yet.
    assert!(
        short.load(SeqCst) <= 2,
        "{} pieces came without a rest as long as it is due",
        short.load(SeqCst)
    );
}

#[test]
fn a_job_that_is_paused_or_limited_is_one_thread_s() {
    let mut desk = Desk::new();
    let (crew, book) = (desk.crew(), Arc::new(Book::default()));
    let written = book.clone();
    let job = desk.start(move |cx| {
        let todo = Todo::new(200);
        crew.work::<()>(cx, || {
            let Some(range) = next(&todo, 1) else { return Ok(None) };
            written.piece(range, MS * 2);
            Ok(Some(1))
        })?;
        Ok(())
    });
    let many = book.clone();
    desk.until(|_, _| (many.most.load(SeqCst) > 1).then_some(()));
    desk.jobs.pause(job).unwrap();
    desk.until(|desk, _| desk.jobs.query().iter().any(|j| !j.now.busy).then_some(()));
    assert_eq!(book.inside.load(SeqCst), 0, "a paused job works");
    let before = lock(&book.pieces).len();
    sleep(MS * 30);
    assert_eq!(lock(&book.pieces).len(), before, "a paused job works");
    // A speed that nothing has to wait for.
    desk.jobs.set_speed(job, 1 << 40).unwrap();
    book.most.store(0, SeqCst);
    desk.jobs.resume(job).unwrap();
    assert_eq!(desk.end(), None);
    assert_eq!(book.most.load(SeqCst), 1, "pieces at a time");
    book.check(200);
}

#[test]
fn a_helper_that_panics_fails_the_job() {
    let mut desk = Desk::new();
    let crew = desk.crew();
    desk.start(move |cx| {
        let (todo, me) = (Todo::new(1 << 40), current().id());
        crew.work::<()>(cx, || {
            assert!(current().id() == me, "a helper's own fault");
            sleep(MS);
            Ok(next(&todo, 1).map(|_| 1))
        })?;
        Ok(())
    });
    let why = desk.end().unwrap_or_default();
    assert!(why.contains("a helper's own fault"), "{why}");
}

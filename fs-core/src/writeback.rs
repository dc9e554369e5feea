//! Write-back: dirty pages on their way to the device.
//!
//! A pass over a file ([`Pass::run`]) takes its dirty units from the front, up to [`FLIGHT_UNITS`] that follow each other at a time, and
//! keeps up to [`FLIGHTS_MAX`] such flights under way. For each:
//!
//! 1. lock the units shared: no writer is amid them ([`Pass::lock`]; a pass [under the lock](under_lock) of its caller has it already);
//! 2. register an ordered extent over what is dirty; if there is another in the range: unlock, wait for it, start over;
//! 3. take the pages: they are in write-back now, no longer dirty, and their reservation is the flight's
//!    ([`FilePages::begin_writeback`]);
//! 4. unlock. From here on the ordered extent is what others see;
//! 5. allocate from the reservation, in the order of the file; copy to device buffers, checksum, send ([`Pass::send`]);
//! 6. when all is on the device: publish, which settles the reservation ([`crate::publish`]); the pages are clean unless they
//!    were written again; the ordered extent ends ([`Pass::land`]). A unit is never split over two publications.
//!
//! No step after 4 needs a range lock: whoever holds one may wait for a flight.
//!
//! If it fails, the pages are dirty again with their reservation, and the error is kept with the file: every sync of it answers it until
//! [`File::clear_error`](crate::File::clear_error). The next pass goes to new blocks. Want of space is no failure: what is needed
//! was reserved, so it can only be pending (a commit frees it) or held by a reader (it waits, with ever smaller flights).
//!
//! One pass at a time over a file ([`FilePages::turn`]), so that its blocks are allocated in the order of its bytes.
//!
//! Who asks: syncs ([`sync`], [`all`]), direct I/O ([`range`]), writers when too much is dirty ([`throttle`]), the helper thread by age ([`due`]).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::commit;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_BLOCKS_MAX, FileInner};
use crate::inline;
use crate::mutation::{Point, reached};
use crate::ordered::Slot;
use crate::page_cache::{Batch, FilePages, Page, UNIT_BLOCKS};
use crate::publish::{Change, publish};
use crate::range_lock::{Mode, RangeGuard};
use crate::records::extents::{Content, Span};
use crate::reserve::Reservation;
use crate::store::{self, Sent};
use crate::txn::{Stop, Txn, transact};
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock};

/// Units that a flight takes at most: 1 MiB.
const FLIGHT_UNITS: u64 = 16;
/// Flights of a pass that are under way at once.
const FLIGHTS_MAX: usize = 8;
/// Pages that one writer writes back for the sake of the others.
const HELP_PAGES: u64 = 4096;
/// Times that a pass waits for reserved space to become available. Each takes up to a second while a reader is in the way.
const SPACE_ROUNDS_MAX: u32 = 120;

const ALL: Range<u64> = 0..FILE_BLOCKS_MAX;

// ---- who asks

/// Writes back the dirty pages of `blocks`, and waits for what others have under way there.
///
/// # Errors
/// Why it failed.
pub(crate) async fn range(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    blocks: Range<u64>,
) -> Result<()> {
    let Some(pages) = file.pages_if_any() else { return Ok(()) };
    loop {
        let failures = pages.failures();
        pass(core, io, file, pages, blocks.clone(), u64::MAX).await.1?;
        file.ordered.wait(blocks.clone()).await;
        // What others had under way may be dirty again.
        if pages.failures() == failures {
            return Ok(());
        }
    }
}

/// The same for a sync: an earlier failure is an error too.
pub(crate) async fn sync(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, blocks: Range<u64>) -> Result<()> {
    let Some(pages) = file.pages_if_any() else { return Ok(()) };
    let whole = blocks == ALL;
    if whole {
        pages.rejuvenate(file);
    }
    let result = range(core, io, file, blocks).await;
    // Pages before the range may hold the size on disk back, and with it what the range has behind the old end.
    let holds_back = |file: &FileInner| {
        let _meta = core.meta.lock();
        file.disk_size().1 && pages.bound() != u64::MAX
    };
    let result = match result {
        Ok(()) if !whole && holds_back(file) => range(core, io, file, ALL).await,
        result => result,
    };
    result.and(pages.error().map_or(Ok(()), Err))
}

/// The same for every file.
pub(crate) async fn all(core: &Arc<Core>, io: &Io) -> Result<()> {
    let mut result = Ok(());
    for file in core.pages.dirty_files() {
        result = result.and(sync(core, io, &file, ALL).await);
    }
    result.and(core.pages.first_error().map_or(Ok(()), Err))
}

/// Whether space may come back with the write-back of pages.
pub(crate) fn may_free(core: &Core) -> bool {
    core.pages.busy_pages() > 0
}

/// [`transact`] for a caller that holds no range lock: should there be no space while pages wait to be written back, they are, once.
pub(crate) async fn transact_with_room<T>(
    core: &Arc<Core>,
    io: &Io,
    mut body: impl FnMut(&mut Txn<'_>) -> Result<T, Stop> + Send,
) -> Result<T> {
    match transact(core, io, &mut body).await {
        Err(Error::NoSpace { .. }) if may_free(core) => {
            // Their errors are noted with their files.
            let _ = all(core, io).await;
            transact(core, io, body).await
        }
        result => result,
    }
}

/// The same for a whole operation, which may be done again after it has failed.
pub(crate) async fn with_room<F: Future<Output = Result<()>>>(
    core: &Arc<Core>,
    io: &Io,
    operation: impl Fn() -> F,
) -> Result<()> {
    match operation().await {
        Err(Error::NoSpace { .. }) if may_free(core) => {
            // Their errors are noted with their files.
            let _ = all(core, io).await;
            operation().await
        }
        result => result,
    }
}

/// Whether so much is dirty that writers have to help.
pub(crate) fn is_too_much(core: &Core) -> bool {
    core.pages.busy_pages() > core.pages.dirty_limit()
}

/// Helps to write back if too much is dirty: the files that have been dirty for longest, a bounded number of pages. Errors are noted with
/// the files.
pub(crate) async fn throttle(core: &Arc<Core>, io: &Io) {
    let mut left = HELP_PAGES;
    while left > 0 && is_too_much(core) {
        let Some((_, file)) = core.pages.oldest_dirty() else { return };
        let Some(pages) = file.pages_if_any() else { return };
        let (written, result) = pass(core, io, &file, pages, ALL, left).await;
        if written == 0 || result.is_err() {
            return;
        }
        left = left.saturating_sub(written);
    }
}

/// Lets a writer in only while dirty pages are not far beyond what they may be: when write-back fails, or does not keep up, memory
/// must not fill.
///
/// # Errors
/// Why pages cannot be written back.
pub(crate) async fn admit(core: &Arc<Core>, io: &Io) -> Result<()> {
    while core.pages.busy_pages() > 2 * core.pages.dirty_limit() {
        let Some((_, file)) = core.pages.oldest_dirty() else { return Ok(()) };
        range(core, io, &file, ALL).await?;
    }
    Ok(())
}

/// Whether the helper has something to write back.
pub(crate) fn is_due(core: &Core) -> bool {
    let Some((since, _)) = core.pages.oldest_dirty() else { return false };
    let old = core.options.writeback_age.is_some_and(|age| since.elapsed() >= age);
    old || core.pages.busy_pages() > core.pages.dirty_limit() / 2
}

/// Writes back what is old; and, when much is dirty, what is oldest.
///
/// # Errors
/// The first failure; it is noted with its file too.
pub(crate) async fn due(core: &Arc<Core>, io: &Io) -> Result<()> {
    let mut result = Ok(());
    let old = core.options.writeback_age.map_or_else(Vec::new, |age| core.pages.dirty_for(age));
    for file in old {
        if let Some(pages) = file.pages_if_any() {
            pages.rejuvenate(&file);
            result = result.and(pass(core, io, &file, pages, ALL, u64::MAX).await.1);
        }
    }
    if core.pages.busy_pages() > core.pages.dirty_limit() / 2
        && let Some((_, file)) = core.pages.oldest_dirty()
        && let Some(pages) = file.pages_if_any()
    {
        pages.rejuvenate(&file);
        result = result.and(pass(core, io, &file, pages, ALL, HELP_PAGES).await.1);
    }
    result
}

/// Writes back the units that overlap `blocks` for a caller that holds them exclusively, all of each, and waits for it.
///
/// # Errors
/// Why it failed.
pub(crate) async fn under_lock(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    blocks: Range<u64>,
) -> Result<()> {
    let Some(pages) = file.pages_if_any() else { return Ok(()) };
    let mut pass = Pass::new(core, io, file, pages, false);
    pass.run(blocks, u64::MAX).await;
    pass.error.map_or(Ok(()), Err)
}

/// A pass over `blocks` of a file, when it is its turn, until `budget` pages are written. Returns how many were.
async fn pass(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    pages: &Arc<FilePages>,
    blocks: Range<u64>,
    budget: u64,
) -> (u64, Result<()>) {
    if !pages.is_busy() {
        return (0, Ok(()));
    }
    let turn = pages.turn.lock(0..1, Mode::Exclusive).await;
    let mut pass = Pass::new(core, io, file, pages, true);
    pass.run(blocks, budget).await;
    drop(turn);
    if !pages.is_busy() {
        reached(Point::PassOver);
        // It may have been in memory for this only.
        core.forget_if_unused(file);
    }
    (pass.written, pass.error.map_or(Ok(()), Err))
}

// ---- a pass

/// A flight: pages that are on their way.
struct Flight {
    batch: Batch,
    slot: Arc<Slot>,
    reservation: Reservation,
    /// They go into the tree, as this.
    inline: Option<Content>,
    /// Or to the device.
    sent: SmallVec<[Sent; 1]>,
}

struct Pass<'a> {
    core: &'a Arc<Core>,
    io: &'a Io,
    file: &'a Arc<FileInner>,
    pages: &'a Arc<FilePages>,
    /// It locks what it takes.
    locks: bool,
    flights: VecDeque<Flight>,
    written: u64,
    error: Option<Error>,
    /// Times that there was no space at the moment.
    space_rounds: u32,
    /// The first unit that has to be taken again for that reason.
    again: Option<u64>,
}

impl<'a> Pass<'a> {
    fn new(
        core: &'a Arc<Core>,
        io: &'a Io,
        file: &'a Arc<FileInner>,
        pages: &'a Arc<FilePages>,
        locks: bool,
    ) -> Pass<'a> {
        Pass {
            core,
            io,
            file,
            pages,
            locks,
            flights: VecDeque::new(),
            written: 0,
            error: None,
            space_rounds: 0,
            again: None,
        }
    }

    /// See the module documentation.
    async fn run(&mut self, blocks: Range<u64>, budget: u64) {
        let end = blocks.end.div_ceil(UNIT_BLOCKS);
        let mut cursor = blocks.start / UNIT_BLOCKS;
        let mut taken = 0;
        loop {
            while self.error.is_none() && self.again.is_none() && taken < budget {
                let most = if self.space_rounds > 0 { 1 } else { FLIGHT_UNITS };
                let Some(units) = self.pages.next_dirty(cursor, end, most) else { break };
                taken += self.take_off(units, &mut cursor).await;
                while self.flights.len() >= FLIGHTS_MAX {
                    self.land_first().await;
                }
            }
            self.land_all().await;
            let Some(again) = self.again.take() else { return };
            cursor = cursor.min(again);
            if let Err(error) = self.wait_for_space().await {
                self.error.get_or_insert(error);
                return;
            }
        }
    }

    /// Steps 1 to 5 for these units; moves the cursor behind them, unless it has to start over. Returns the pages that were taken.
    async fn take_off(&mut self, units: Range<u64>, cursor: &mut u64) -> u64 {
        let guard = if self.locks { Some(self.lock(&units).await) } else { None };
        // While it waited others may have taken them.
        let Some((span, bound)) = self.pages.dirty_span(&units) else {
            *cursor = units.end;
            return 0;
        };
        let Some(slot) = Slot::try_register(self.core, self.file, &span, bound) else {
            drop(guard);
            self.land_all().await;
            self.file.ordered.wait(span).await;
            return 0;
        };
        *cursor = units.end;
        let batch = self.pages.begin_writeback(units);
        slot.set_bound(batch.bound);
        drop(guard);
        let count = batch.pages.len() as u64;
        let reservation = Reservation::from_pool(self.core, self.file, count);
        let mut flight = Flight { batch, slot, reservation, inline: None, sent: SmallVec::new() };
        let outcome = self.depart(&mut flight).await;
        match outcome {
            Ok(()) => self.flights.push_back(flight),
            Err(error) => self.fail(flight, error),
        }
        count
    }

    /// Step 1. Nothing of this pass is left under way while it waits: somebody may wait for that with the range held.
    async fn lock(&mut self, units: &Range<u64>) -> RangeGuard {
        let unit_bytes = UNIT_BLOCKS << BLOCK_SHIFT;
        let bytes = units.start * unit_bytes..units.end * unit_bytes;
        if let Some(guard) = self.file.lock.try_lock(bytes.clone(), Mode::Shared) {
            return guard;
        }
        self.land_all().await;
        self.file.lock.lock(bytes, Mode::Shared).await
    }

    /// Step 5.
    async fn depart(&self, flight: &mut Flight) -> Result<()> {
        flight.inline = self.inline(&flight.batch).await?;
        if flight.inline.is_none() {
            flight.sent = self.send(&flight.batch, &flight.slot).await?;
        }
        Ok(())
    }

    /// The content of a small file, which goes into the tree. (The ordered extent keeps others from changing block 0.)
    async fn inline(&self, batch: &Batch) -> Result<Option<Content>> {
        let [(0, page)] = &batch.pages[..] else { return Ok(None) };
        let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let end = used.max(usize::try_from(batch.end).unwrap_or(usize::MAX));
        let Some(bytes) = page.get(..end) else { return Ok(None) };
        match inline::content_after(self.core, self.io, self.file, &[(0, bytes)]).await {
            // A block is reserved for it; room in the tree is not.
            Err(Error::NoSpace { .. }) => Ok(None),
            content => content,
        }
    }

    /// Copies the pages of `batch` and sends them.
    async fn send(&self, batch: &Batch, slot: &Arc<Slot>) -> Result<SmallVec<[Sent; 1]>> {
        let pieces: Vec<&[(u64, Page)]> = batch.pages.chunk_by(|a, b| a.0 + 1 == b.0).collect();
        let mut bufs = Vec::with_capacity(pieces.len());
        let mut spans: SmallVec<[Span; 4]> = SmallVec::new();
        for piece in &pieces {
            // All buffers first: once a request is out, nothing may fail before it has come back.
            bufs.push(self.io.buffer(piece.len() << BLOCK_SHIFT)?);
            let at = FileBlock(piece[0].0);
            spans.push((at, at.plus(piece.len() as u64)));
        }
        let all = store::place_reserved(self.core, self.io, slot, &spans).await?;
        let parts = pieces.into_iter().zip(bufs).zip(all);
        Ok(parts
            .map(|((piece, mut buf), ordered)| {
                for (block, (_, page)) in buf.chunks_exact_mut(BLOCK_SIZE).zip(piece) {
                    block.copy_from_slice(&page[..]);
                }
                store::send(self.core, self.io, FileBlock(piece[0].0), ordered, buf)
            })
            .collect())
    }

    async fn land_all(&mut self) {
        while !self.flights.is_empty() {
            self.land_first().await;
        }
    }

    /// Step 6 for the flight that is under way for longest.
    async fn land_first(&mut self) {
        let Some(mut flight) = self.flights.pop_front() else { return };
        let mut stored = SmallVec::new();
        let mut outcome = Ok(());
        // All of them, also after one has failed: their blocks must not be given back while the device writes to them.
        for sent in std::mem::take(&mut flight.sent) {
            match sent.finish().await.0 {
                Ok(part) => stored.push(part),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        if outcome.is_ok() {
            let change = Change {
                stored,
                inline: flight.inline.take(),
                size: flight.batch.end,
                reserved: Some(flight.batch.pages.len() as u64),
                ..Change::none(self.file)
            };
            outcome = publish(self.core, self.io, SmallVec::from_buf([change])).await;
        } else {
            drop(stored);
        }
        match outcome {
            Ok(()) => self.succeed(flight),
            Err(error) => self.fail(flight, error),
        }
    }

    fn succeed(&mut self, flight: Flight) {
        let Flight { batch, slot, reservation, .. } = flight;
        self.written += batch.pages.len() as u64;
        reservation.settled();
        self.pages.end_writeback(self.file, &batch);
        drop(slot);
    }

    /// The pages are dirty again. The blocks were given back before.
    fn fail(&mut self, flight: Flight, error: Error) {
        let Flight { batch, slot, reservation, sent, .. } = flight;
        drop(sent);
        let again = self.pages.fail_writeback(self.file, &batch);
        reservation.into_pool(again);
        // Before the ordered extent ends: who waits for it looks at these next.
        self.pages.note_failure();
        if matches!(error, Error::NoSpace { .. }) && self.space_rounds < SPACE_ROUNDS_MAX {
            let first = batch.pages.first().map_or(0, |(block, _)| block / UNIT_BLOCKS);
            self.again = Some(self.again.map_or(first, |again| again.min(first)));
        } else {
            log::warn!("{}: writing {:?} back: {error}", self.core.device.name(), self.file.id);
            self.pages.note_error(&error);
            self.error.get_or_insert(error);
        }
        drop(slot);
    }

    /// What was reserved is pending, or held by readers.
    async fn wait_for_space(&mut self) -> Result<()> {
        self.space_rounds += 1;
        commit::make_room(self.core, self.io).await.map(drop)
    }
}

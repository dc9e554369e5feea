//! Create and delete, with very many files present.
//!
//! A sample creates files with random names, then deletes them in another order, then commits; all of it is timed.
//! Ours is the base interface: submit and poll with many operations in flight on one channel, on one core. The peer is the
//! same work in blocking calls, one after the other, which is what a caller without batches gets.

use std::time::Duration;

use fs_core::Operation;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};

use crate::compare::lab::{Lab, Mounted};
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Doing, Result};
use crate::flight::Flight;
use crate::sys::Pinned;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[Row {
    metric: "create_delete_per_s",
    unit: "pairs/s",
    peer_name: Some("the same in blocking calls"),
    figure: Figure::Ours,
    goal: Some(Goal::AtLeast(100_000.0)),
    on_device: true,
    about: "create + delete pairs with 1e6 files present, random names, another order, final commit inside; 64 in flight",
    prepare: |lab| Ok(Box::new(Names::prepare(lab)?)),
}];

/// Files that are present all the time.
const PRESENT: u64 = 1_000_000;
/// Files between two commits while they are made.
const COMMIT_EVERY: u64 = 100_000;
/// Operations in flight.
const DEPTH: usize = 64;
/// Pairs of a sample for each second that it is to take: what the goal asks for.
const PAIRS_PER_SECOND: f64 = 100_000.0;

struct Names {
    mounted: Mounted,
    rng: SmallRng,
}

impl Names {
    fn prepare(lab: &Lab) -> Result<Names> {
        let mounted = lab.fresh()?;
        let mut rng = SmallRng::seed_from_u64(lab.seed);
        let bar = lab.bars.steps("create files", PRESENT);
        for done in (0..PRESENT).step_by(COMMIT_EVERY as usize) {
            let names: Vec<u64> = (0..COMMIT_EVERY).map(|_| rng.next_u64()).collect();
            in_flight(&mounted, &names, |name| Operation::Create { name })?;
            mounted.channel.sync().doing("sync the filesystem")?;
            bar.set_position(done + COMMIT_EVERY);
        }
        bar.finish_and_clear();
        Ok(Names { mounted, rng })
    }

    /// Names to create, and the same in another order.
    fn orders(&mut self, seconds: Duration) -> (Vec<u64>, Vec<u64>) {
        let pairs = (seconds.as_secs_f64() * PAIRS_PER_SECOND).clamp(1000.0, 1e7) as usize;
        let create: Vec<u64> = (0..pairs).map(|_| self.rng.next_u64()).collect();
        let mut delete = create.clone();
        delete.shuffle(&mut self.rng);
        (create, delete)
    }
}

/// A random name: 16 hexadecimal digits of a random number. Two of 1e6 are the same with a chance of 3e-8.
fn name(number: u64) -> Vec<u8> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    (0..16).map(|digit| DIGITS[(number >> (60 - 4 * digit) & 15) as usize]).collect()
}

/// Runs an operation on each of `names`, [`DEPTH`] in flight.
fn in_flight(mounted: &Mounted, names: &[u64], operation: impl Fn(Vec<u8>) -> Operation) -> Result<()> {
    let mut flight = Flight::new(&mounted.channel, DEPTH);
    let mut names = names.iter();
    loop {
        while flight.has_room()
            && let Some(&number) = names.next()
        {
            flight.submit(operation(name(number)), ());
        }
        let Some(((), completion)) = flight.next() else { return Ok(()) };
        completion.result.doing("create or delete a file")?;
    }
}

impl Contest for Names {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let (create, delete) = self.orders(lab.seconds);
        let _pinned = Pinned::to_last_core();
        let started = lab.clock.start();
        in_flight(&self.mounted, &create, |name| Operation::Create { name })?;
        in_flight(&self.mounted, &delete, |name| Operation::Delete { name })?;
        self.mounted.channel.sync().doing("sync the filesystem")?;
        Ok(create.len() as f64 / started.elapsed().as_secs_f64())
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let (create, delete) = self.orders(lab.seconds);
        let _pinned = Pinned::to_last_core();
        let channel = &self.mounted.channel;
        let started = lab.clock.start();
        for &number in &create {
            channel.create(name(number)).doing("create a file")?;
        }
        for &number in &delete {
            channel.delete(name(number)).doing("delete a file")?;
        }
        channel.sync().doing("sync the filesystem")?;
        Ok(Some(create.len() as f64 / started.elapsed().as_secs_f64()))
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.mounted.unmount()
    }
}

//! Sequences: a request's way through a schedule.

use crate::error::Error;
use crate::lease::{LeaseSet, Pending, Use, missing};
use crate::shared::{Holder, Note};
use overspill_core::{BlockId, Schedule, SequenceId, StepId};
use overspill_nvme::FileSet;
use std::sync::Arc;

/// One request's cursor through a schedule. Steps are entered in order; a step that comes out of order is served all
/// the same, and what was brought for the steps skipped is dropped.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) schedule: Arc<Schedule>,
    pub(crate) holder: Arc<Holder>,
    pub(crate) files: Arc<FileSet>,
}

impl Sequence {
    /// Enters a step and leases all its blocks, waiting until they are there.
    ///
    /// # Errors
    /// What kept the blocks from coming ([`Pending::wait`]); [`Error::Changed`] if a file of the model is no longer
    /// what it was (looked at when step 0 is entered).
    pub fn acquire(&mut self, step: StepId) -> Result<LeaseSet, Error> {
        self.request(step)?.wait()
    }

    /// As [`Self::acquire`], without waiting.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a step that the schedule has not got; [`Error::Changed`]; [`Error::Closed`].
    pub fn request(&mut self, step: StepId) -> Result<Pending, Error> {
        self.enter(step)?;
        let schedule = Arc::clone(&self.schedule);
        let place = &schedule.steps[step.index()];
        Pending::ask(&self.holder, place.tier, &place.blocks, Use::Step(self.id, step))
    }

    /// Enters a step that chooses its blocks (experts) and leases those that were chosen.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn acquire_chosen(&mut self, step: StepId, blocks: &[BlockId]) -> Result<LeaseSet, Error> {
        self.enter(step)?;
        let tier = self.schedule.steps[step.index()].tier;
        Pending::ask(&self.holder, tier, blocks, Use::Chosen(self.id, step))?.wait()
    }

    /// Says that a step begins, without leasing anything.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a step that the schedule has not got; [`Error::Changed`] at step 0.
    pub fn enter(&mut self, step: StepId) -> Result<(), Error> {
        if step.index() >= self.schedule.steps.len() {
            return Err(missing("step", step.0));
        }
        if step.0 == 0
            && let Err(changed) = self.files.check_unchanged()
            && !changed.what.keeps_bytes()
        {
            return Err(Error::Changed { path: changed.path, what: changed.what.to_string() });
        }
        self.holder.shared.mailbox.post_quietly(Note::Entered { sequence: self.id, step });
        Ok(())
    }

    /// Says that a step will probably use these blocks, with what probability (0 to 1). Unlikely guesses are ignored,
    /// and guesses that turn out not to pay are ignored for a while. Costs next to nothing if all are there.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a step that the schedule has not got, or a block that the engine has not got.
    pub fn expect(&mut self, step: StepId, blocks: &[BlockId], probability: f32) -> Result<(), Error> {
        let place = self.schedule.steps.get(step.index()).ok_or_else(|| missing("step", step.0))?;
        let shared = &self.holder.shared;
        let cells = shared.tiers.get(place.tier.index()).map_or(&[][..], |table| &table.cells);
        if let Some(block) = blocks.iter().find(|b| b.index() >= cells.len()) {
            return Err(missing("block", block.0));
        }
        let probability_milli = (probability.clamp(0.0, 1.0) * 1000.0) as u16;
        let (sequence, count) = (self.id, blocks.len());
        shared.tell(|| crate::Event::Expected {
            at_ns: shared.now(),
            sequence,
            step,
            blocks: count,
            probability_milli,
        });
        let absent = |block: &&BlockId| !cells[block.index()].word.is_resident();
        if !blocks.iter().any(|block| absent(&block)) {
            return Ok(());
        }
        let mut wanted = shared.spare_blocks.lock().pop().unwrap_or_default();
        wanted.extend(blocks.iter().filter(absent));
        let note = Note::Expected { sequence, step, blocks: wanted, probability_milli };
        shared.mailbox.post(note, true);
        Ok(())
    }

    /// Its schedule.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        let id = self.id;
        self.holder.shared.mailbox.post(Note::Ask(Box::new(move |brain| brain.close_sequence(id))), true);
    }
}
